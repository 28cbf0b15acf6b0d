"""The Model view: what fewer bits do to the perplexity of the whole model, by method and data type."""

from __future__ import annotations

import math
from typing import Any, get_args

import pandas as pd
import streamlit as st

from engine.experiments import _quantization, quantization_model
from engine.experiments._quantization import method_name
from ui import chart, controls, export, run, theme
from ui.charts import quantization_rates as charts
from ui.prose import plain
from ui.quantization.sentences import guessing_sentence, perplexity, two_bits_sentence
from ui.quantization.settings import KEPT, PREFIX, Settings

RUN = f"{PREFIX}_model_run"
_STARTED = f"_{PREFIX}_model_started"
_HEIGHT = 540
_CLOSER = f"{PREFIX}_closer"
_CEILING = 1.25  # times the original's perplexity, where one looks closer
_CHOICES: dict[str, tuple[Any, ...]] = {
    "methods": get_args(_quantization.Method),
    "data_types": ("Integer", "NormalFloat"),
    "widths": tuple(range(_quantization.MAX_BITS, _quantization.MIN_BITS - 1, -1)),
}
"""What a sweep can be made of, by field."""


def model(given: Settings) -> None:
    """What is to be tried, the button that starts it, and its points as they come."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="medium")
    values = given.params.model_dump()
    with bar:
        for field, choices in _CHOICES.items():
            values[field] = _several(field, choices)
    wanted = controls.validated(quantization_model.Params, values)
    started, running = st.session_state.get(_STARTED), run.is_running(RUN)
    bar.button(
        "Running…" if running else "Run the sweep",
        key=f"_{PREFIX}_model_start",
        type="primary",
        icon=f":material/{'hourglass_top' if running else 'stacked_line_chart'}:",
        disabled=running or wanted is None,
        on_click=_start,
        args=(wanted,),
    )
    if started is None:
        st.info(_invitation(wanted or given.params), icon=":material/lightbulb:")
        return
    if wanted is not None and started != wanted:
        st.caption(
            "The sweep goes on with the settings that it began with; these are for the next one."
            if running
            else "What you see is a sweep with other settings."
        )
    run.watch("quantization_model", started, _draw, key=RUN, height=_HEIGHT)


def _several(field: str, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    """Some of the choices of a field that holds several."""
    info, key = quantization_model.Params.model_fields[field], f"{PREFIX}_{field}"
    KEPT.restore(key)
    chosen = st.pills(
        info.title,
        choices,
        selection_mode="multi",
        default=list(info.default),
        key=key,
        help=info.description,
        bind="query-params",
        width="content",
    )
    is_default = set(chosen) == set(info.default)
    KEPT.keep(key, chosen, None if is_default else [str(choice) for choice in chosen])
    return tuple(choice for choice in choices if choice in chosen)


def count(params: quantization_model.Params) -> int:
    """Quantized models that a sweep makes."""
    return len(params.methods) * len(params.data_types) * len(params.widths)


def _invitation(params: quantization_model.Params) -> str:
    widths, what = sorted(params.widths), "your text" if params.text else "stories"
    return plain(
        f"Perplexity says among how many tokens the model hesitates: 1 is certain. {params.model} is quantized "
        f"{count(params)} times, from {widths[-1]} bits down to {widths[0]}, and reads up to {params.tokens:,} tokens "
        f"of {what} each time. At how many bits will it break, and which method saves it? Run the sweep to see."
    )


def _start(params: quantization_model.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask("quantization_model", params, key=RUN)


def points(found: quantization_model.Result) -> list[charts.PerplexityPoint]:
    """The points as they are drawn."""
    return [
        charts.PerplexityPoint(
            method_name(point.method), point.data_type, point.bits, point.bits_per_weight, point.perplexity
        )
        for point in found.points
    ]


def _draw(found: quantization_model.Result, params: quantization_model.Params) -> None:
    done = len(found.points)
    if found.ended == "running":
        st.caption(f"{done} of {found.total} quantized models are measured.")
    else:
        seconds = sum(point.seconds for point in found.points)
        st.caption(
            plain(
                f"{found.ending} {found.tokens:,} tokens each, {seconds:.0f} s in all when measured, on "
                f"{found.device}, torch {found.versions.get('torch', '')}."
            )
        )
    KEPT.restore(_CLOSER)
    closer = st.toggle(
        "Look closer",
        key=_CLOSER,
        help=f"Show perplexities up to {_CEILING:g} times the original's; what is worse leaves the picture.",
        bind="query-params",
    )
    KEPT.keep(_CLOSER, closer, "true" if closer else None)
    key = f"{PREFIX}_perplexity"
    original = found.original.perplexity if found.original else None
    sentences = [found.sentence, guessing_sentence(found, params.model), two_bits_sentence(found)]
    fig = charts.perplexities(
        points(found),
        original,
        (min(params.widths), max(params.widths) + 1),
        ceiling=_CEILING * original if closer and original is not None and math.isfinite(original) else None,
        mode=theme.mode(),
    )
    chart.figure(fig, key=key, sentence=" ".join(filter(None, sentences)), height=_HEIGHT)
    if found.ended not in ("running", "finished"):
        st.caption("Finished points are kept: a sweep that needs them, this one or another, gets them back at once.")
    export.export(
        fig,
        key=key,
        name="quantization-perplexity",
        experiment="quantization_model",
        params=params,
        data=lambda: _table(found),
    )
    if done and found.ended != "running":
        _numbers(found)
    st.caption(plain(f"{found.source} {found.text} {found.weights:.0%} of its parameters are quantized."))


def _table(found: quantization_model.Result) -> pd.DataFrame:
    return pd.DataFrame([vars(point) for point in [found.original, *found.points] if point])


def _numbers(found: quantization_model.Result) -> None:
    """Perplexities by method and bits, for those who want to read them off."""
    with st.expander("The numbers", icon=":material/table:"):
        rows: dict[str, dict[str, str]] = {}
        for point in found.points:
            rows.setdefault(f"{method_name(point.method)}, {point.data_type}", {})[f"{point.bits} bits"] = perplexity(
                point.perplexity
            )
        st.table(pd.DataFrame(rows).T.fillna("—"), border="horizontal")
