"""The controls of the FlashAttention lab: those of the experiment behind the view that is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from engine.experiments import (
    ExperimentParams,
    flash_accuracy,
    flash_decode,
    flash_online,
    flash_roofline,
    flash_speed,
    flash_tiles,
)
from engine.experiments._flash import BACKENDS, MAX_LENGTH
from ui import controls, page, run
from ui.controls import Look
from ui.kept import Kept
from ui.labs import FLASH

PREFIX = FLASH.url_path
VIEW = f"{PREFIX}_view"
SPEED, TILES, SOFTMAX = "Speed and memory", "Tiles", "Online softmax"
ROOFLINE, ACCURACY, DECODE = "Roofline", "Accuracy", "Decode"
KEPT = Kept(PREFIX)
ROW = f"{PREFIX}_tiles_row"

_PARAMS: dict[str, type[ExperimentParams]] = {
    SPEED: flash_speed.Params,
    TILES: flash_tiles.Params,
    SOFTMAX: flash_online.Params,
    ROOFLINE: flash_roofline.Params,
    ACCURACY: flash_accuracy.Params,
    DECODE: flash_decode.Params,
}
_PREFIXES = {
    SPEED: PREFIX,
    ROOFLINE: PREFIX,
    TILES: f"{PREFIX}_tiles",
    SOFTMAX: f"{PREFIX}_softmax",
    ACCURACY: f"{PREFIX}_accuracy",
    DECODE: f"{PREFIX}_decode",
}
_BACKENDS = f"{PREFIX}_backends"
_GPU_LENGTH = 16384


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        view: what the Explore tab shows.
        params: of the experiment behind it; of `engine.experiments.flash_speed` in the other tabs.
    """

    view: str
    params: Any


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    KEPT.begin()
    view = _view()
    values = _CONTROLS[view]()
    params = controls.validated(_PARAMS[view], values)
    return Settings(view, params) if params else None


def has_gpu() -> bool:
    """Whether the experiments run on a GPU, as far as that is known.

    Who comes to a server that is still starting is given a processor's defaults.
    """
    started = run.starting()
    if not started.done() or started.exception() is not None:
        return False
    return any(device.kind == "cuda" for device in started.result().devices())


def thousands(number: int) -> str:
    """A number as the lists of lengths have it, e.g. ``"16,384"``."""
    return f"{number:,}"


def _view() -> str:
    """What is shown: it is drawn after the controls, which depend on it."""
    KEPT.restore(VIEW)
    if st.session_state.get(f"{PREFIX}_tab", page.EXPLORE) != page.EXPLORE:
        return SPEED
    view = st.session_state.get(VIEW) or st.query_params.get(VIEW)
    return view if view in _PARAMS else SPEED


def _doubling(first: int, last: int) -> list[int]:
    """`first`, twice that, … up to `last`."""
    return [first << step for step in range((last // first).bit_length())]


def _controls(view: str, *fields: str, **looks: Look) -> dict[str, Any]:
    return KEPT.controls(_PARAMS[view], prefix=_PREFIXES[view], fields=fields, **looks)


def _of_sweep(view: str) -> dict[str, Any]:
    gpu = has_gpu()
    values = _controls(
        view,
        "max_length",
        "direction",
        "causal",
        "head_dim",
        "dtype",
        max_length=Look(
            options=_doubling(256, MAX_LENGTH), name=thousands, widget="select", value=_GPU_LENGTH if gpu else None
        ),
        direction=Look(widget="select"),
        head_dim=Look(step=8),
        dtype=Look(widget="select", value="bfloat16" if gpu else None),
    )
    with st.expander("Heads, batch, backends", icon=":material/tune:"):
        values |= _controls(view, "heads", "batch", "tokens", tokens=Look(widget="select"))
        values["backends"] = _backends(_PARAMS[view])
    return values


def _of_tiles() -> dict[str, Any]:
    values = _controls(TILES, "length")
    most = values["length"]
    values |= _controls(
        TILES,
        "block_q",
        "block_k",
        "causal",
        "row",
        block_q=Look(maximum=most),
        block_k=Look(maximum=most),
        row=Look(maximum=most - 1),
    )
    with st.expander("Head width, on-chip memory, seed", icon=":material/tune:"):
        values |= _controls(TILES, "head_dim", "on_chip", "seed", seed=Look(maximum=99))
    return values


def _of_softmax() -> dict[str, Any]:
    values = _controls(
        SOFTMAX, "factor", "dtype", "chunk", "scores", factor=Look(maximum=100, step=1), chunk=Look(maximum=16)
    )
    if values["scores"].strip().lower() == "random":
        values |= _controls(SOFTMAX, "length", "seed", seed=Look(maximum=99))
    return values


def _of_accuracy() -> dict[str, Any]:
    values = _controls(
        ACCURACY,
        "dtype",
        "length",
        "size",
        "causal",
        "head_dim",
        dtype=Look(widget="select"),
        length=Look(options=_doubling(16, 4096), name=thousands, widget="select"),
        head_dim=Look(step=8),
    )
    with st.expander("Heads, seed", icon=":material/tune:"):
        values |= _controls(ACCURACY, "heads", "seed", seed=Look(maximum=99))
    return values


def _of_decode() -> dict[str, Any]:
    gpu = has_gpu()
    return _controls(
        DECODE,
        "max_length",
        "splits",
        "heads",
        "kv_heads",
        "head_dim",
        "batch",
        "dtype",
        max_length=Look(
            options=_doubling(flash_decode.MIN_LENGTH, flash_decode.MAX_LENGTH), name=thousands, widget="select"
        ),
        kv_heads=Look(options=_doubling(1, 64), widget="select"),
        heads=Look(options=_doubling(1, 64), widget="select"),
        head_dim=Look(step=8),
        dtype=Look(widget="select", value="bfloat16" if gpu else None),
    )


def _backends(model: type[ExperimentParams]) -> tuple[str, ...]:
    info = model.model_fields["backends"]
    KEPT.restore(_BACKENDS)
    chosen = st.pills(
        info.title,
        BACKENDS,
        selection_mode="multi",
        default=list(BACKENDS),
        key=_BACKENDS,
        help=info.description,
        bind="query-params",
    )
    KEPT.keep(_BACKENDS, chosen, None if set(chosen) == set(BACKENDS) else list(chosen))
    return tuple(name for name in BACKENDS if name in chosen)


_CONTROLS = {
    SPEED: lambda: _of_sweep(SPEED),
    ROOFLINE: lambda: _of_sweep(ROOFLINE),
    TILES: _of_tiles,
    SOFTMAX: _of_softmax,
    ACCURACY: _of_accuracy,
    DECODE: _of_decode,
}
