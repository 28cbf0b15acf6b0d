"""The Sensitivity view: which part of the model hurts most when it alone is quantized."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from engine.experiments import quantization_sensitivity
from ui import chart, export, run, theme
from ui.charts import quantization_layers, quantization_rates
from ui.prose import plain
from ui.quantization.layer_map import height
from ui.quantization.sentences import chance_sentence, change, kind_labels, layer_label, perplexity
from ui.quantization.settings import PREFIX, Settings

_RUN = f"{PREFIX}_sensitivity_run"
_STARTED = f"_{PREFIX}_sensitivity_started"
_RANKED = 12
_HEIGHT = 480


def sensitivity(given: Settings) -> None:
    """The button that starts, and the parts as they come."""
    wanted = given.params
    started, running = st.session_state.get(_STARTED), run.is_running(_RUN)
    said, button = st.columns([3, 1.2], vertical_alignment="center")
    said.markdown(
        f"One {wanted.unit} at a time is stored as {plain(wanted.in_words)}; all the rest keeps its precision. "
        "By how much does the perplexity rise?"
    )
    button.button(
        "Running…" if running else "Measure",
        key=f"_{PREFIX}_sensitivity_start",
        type="primary",
        icon=f":material/{'hourglass_top' if running else 'troubleshoot'}:",
        width="stretch",
        disabled=running,
        on_click=_start,
        args=(wanted,),
    )
    if started is None:
        many = " With fewer bits the differences are plainer: try 3 or 2." if wanted.width > 3 else ""
        st.info(
            f"Before you measure: is it the first layers, the last ones, or one kind of them?{many}",
            icon=":material/lightbulb:",
        )
        return
    if started != wanted:
        st.caption(
            "The measurement goes on with the settings that it began with; these are for the next one."
            if running
            else "What you see was measured with other settings."
        )
    run.watch("quantization_sensitivity", started, _draw, key=_RUN, height=_HEIGHT)


def _start(params: quantization_sensitivity.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask("quantization_sensitivity", params, key=_RUN)


def grid(found: quantization_sensitivity.Result) -> tuple[np.ndarray, list[list[str]]]:
    """The increases by block and kind, NaN where there is none yet, and what to say of each."""
    values = np.full((len(found.blocks), len(found.kinds)), np.nan)
    hover = [[""] * len(found.kinds) for _ in found.blocks]
    for part in found.parts:
        y, x = found.blocks.index(part.block), found.kinds.index(part.kind)
        values[y, x] = part.increase
        hover[y][x] = (
            f"{part_label(part, found.kinds)}<br>perplexity {change(found.original_perplexity, part.perplexity)}, "
            f"to {perplexity(part.perplexity)}<br>{spread(part)}{part.weights:,} weights"
        )
    return values, hover


def part_label(part: quantization_sensitivity.PartCost, kinds: list[str]) -> str:
    """A part in a few words, among all `kinds` of the model."""
    if not part.kind:
        return f"block {part.name}"
    kind = dict(zip(kinds, kind_labels(kinds), strict=True))[part.kind]
    return layer_label(part.block, kind) if part.block else kind


def spread(part: quantization_sensitivity.PartCost) -> str:
    """The change with its standard error as a line, where that is known."""
    return f"{part.increase:+.3%} ± {part.error:.3%}<br>".replace("-", "−") if math.isfinite(part.error) else ""


def _draw(found: quantization_sensitivity.Result, params: quantization_sensitivity.Params) -> None:
    if found.ended == "running":
        st.caption(f"{len(found.parts)} of {found.total} are measured.")
    else:
        st.caption(plain(f"{found.ending} {found.text} On {found.device}, torch {found.versions.get('torch', '')}."))
    if not found.parts:
        st.skeleton(height=_HEIGHT)
        return
    if params.unit == "layer":
        left, right = st.columns(2, gap="small")
        with left:
            _map(found, params)
        with right:
            _ranking(found, params)
    else:
        _ranking(found, params)


def _map(found: quantization_sensitivity.Result, params: quantization_sensitivity.Params) -> None:
    values, hover = grid(found)
    key = f"{PREFIX}_sensitivity_map"
    fig = quantization_layers.layer_map(
        values,
        found.blocks,
        kind_labels(found.kinds),
        title="change of perplexity",
        tickformat="+.2~p",
        hover=hover,
        signed=True,
        mode=theme.mode(),
    )
    chart.figure(
        fig,
        key=key,
        sentence=chance_sentence(found),
        height=max(_HEIGHT, height(len(found.blocks))),
    )
    _export(fig, key, "quantization-sensitivity-map", found, params)


def _harm(part: quantization_sensitivity.PartCost) -> float:
    return math.inf if math.isnan(part.increase) else part.increase


def _ranking(found: quantization_sensitivity.Result, params: quantization_sensitivity.Params) -> None:
    ranked = sorted(found.parts, key=_harm, reverse=True)[: _RANKED if params.unit == "layer" else 40]
    key = f"{PREFIX}_sensitivity_ranking"
    fig = quantization_rates.ranking(
        [part_label(part, found.kinds) for part in ranked],
        [100 * part.increase for part in ranked],
        unit="change of perplexity, %",
        mode=theme.mode(),
    )
    chart.figure(fig, key=key, sentence=found.sentence, height=max(_HEIGHT, 90 + 28 * len(ranked)))
    _export(fig, key, "quantization-sensitivity", found, params)


def _export(
    fig: go.Figure,
    key: str,
    name: str,
    found: quantization_sensitivity.Result,
    params: quantization_sensitivity.Params,
) -> None:
    export.export(
        fig,
        key=key,
        name=name,
        experiment="quantization_sensitivity",
        params=params,
        data=lambda: pd.DataFrame([vars(part) for part in found.parts]),
    )
