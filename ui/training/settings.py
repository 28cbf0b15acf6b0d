"""The controls of the training lab, what the run will cost, and the button that starts it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import streamlit as st

from engine.experiments import training
from ui import controls, run
from ui.controls import Look
from ui.labs import TRAINING

PREFIX = TRAINING.url_path
RUN = f"{PREFIX}_run"
_STARTED = f"_{PREFIX}_started"
_PREFIXES = ("", "k", "M", "G", "T", "P")
_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        params: the settings now.
        started: those that were last started; None before the first run.
    """

    params: training.Params
    started: training.Params | None


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    values = controls.controls(
        training.Params,
        prefix=PREFIX,
        fields=["steps", "learning_rate", "num_layers", "d_model", "num_heads"],
        steps=Look(minimum=10, maximum=2000, step=10),
        learning_rate=Look(options=_RATES, name=lambda rate: f"{rate:g}", widget="select"),
        num_heads=Look(options=(1, 2, 3, 4, 8, 16), widget="select"),
    )
    with st.expander("Text, batch and seed", icon=":material/tune:"):
        values |= controls.controls(
            training.Params, prefix=PREFIX, fields=["random_share", "batch_size", "seed", "text"]
        )
    params = controls.validated(training.Params, values)
    if params is None:
        return None
    cost = params.predict()
    st.caption(
        f"Predicted: {amount(cost.parameters)} parameters, {amount(cost.flops)}FLOP, "
        f"{amount(cost.memory_bytes)}B of memory."
    )
    started, running = st.session_state.get(_STARTED), run.is_running(RUN)
    label, icon = ("Train", "play_arrow") if started is None else ("Train again", "replay")
    st.button(
        "Training…" if running else label,
        key=f"_{PREFIX}_train",
        type="primary",
        icon=f":material/{'hourglass_top' if running else icon}:",
        width="stretch",
        disabled=running,
        help="One training at a time: let it end, or cancel it, which keeps what it has learned." if running else None,
        on_click=_start,
        args=(params,),
    )
    if started is not None and started != params:
        st.caption(
            "The training goes on with the settings that it began with; these are for the next one."
            if running
            else "What you see was trained with other settings: press “Train again” for these."
        )
    return Settings(params, started)


def amount(number: float) -> str:
    """A number with an SI prefix, e.g. ``"1.32 M"``; without one it ends in a space."""
    power = min(max(0, int(math.log10(max(abs(number), 1)) // 3)), len(_PREFIXES) - 1)
    return f"{number / 1000**power:.3g} {_PREFIXES[power]}"


def _start(params: training.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask_again(RUN)
