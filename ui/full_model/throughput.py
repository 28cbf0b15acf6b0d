"""The Throughput view: how long one waits for a token, and how many come a second, against batch and length."""

from __future__ import annotations

from functools import partial

import pandas as pd
import streamlit as st

from engine.experiments import full_model_throughput
from engine.experiments._full_model import SWITCHES
from engine.experiments._full_model_recorded import recorded_throughput
from ui import chart, controls, export, run, theme
from ui.charts import full_model_runs as charts
from ui.evidence import provenance
from ui.flash.recorded import heading
from ui.full_model.recorded import size_in_words
from ui.full_model.settings import PREFIX, Settings
from ui.measure_button import measure_button
from ui.prose import plain

RUN = f"{PREFIX}_throughput_run"
OWN = f"{PREFIX}_throughput"
DECODE, PREFILL = "Writing a token", "Reading a prompt"
_PHASES: dict[str, full_model_throughput.Phase] = {DECODE: "decode", PREFILL: "prefill"}
_WAITS = {DECODE: "one token more", PREFILL: "all prompts"}
_HEIGHT = 560


def throughput(given: Settings) -> None:
    """What will be measured, the button, and both pictures as their points come."""
    params = controls.validated(full_model_throughput.Params, given.params.model_dump())
    if params is None:
        return
    st.markdown(plain(plan_sentence(params)))
    started = measure_button("full_model_throughput", params, key=RUN)
    if started is None:
        st.info(
            "A prompt is read at once; after it every token waits for the one before. Does writing eight texts at once "
            "take eight times as long as writing one?",
            icon=":material/lightbulb:",
        )
    recorded = recorded_throughput(params)
    if started is None and recorded is None:
        return
    what = st.segmented_control(
        "What is timed",
        list(_PHASES),
        default=DECODE,
        required=True,
        key=f"{OWN}_phase",
        bind="query-params",
        label_visibility="collapsed",
    )
    if started is not None:
        run.watch("full_model_throughput", started, partial(_draw, what), key=RUN, height=_HEIGHT)
    if recorded is not None:
        on = ", ".join(label for name, label in SWITCHES.items() if getattr(recorded.params, name))
        switched = f"Recorded with {on or 'nothing'} on, whatever is switched on here."
        heading(recorded, f"{size_in_words(recorded.params)} {switched}", dashed=False)
        _picture(what, recorded.found, recorded.params, f"{OWN}_recorded")


def plan_sentence(params: full_model_throughput.Params) -> str:
    """What will be measured."""
    batches, lengths = (", ".join(map(str, numbers)) for numbers in (params.batches, params.lengths))
    return (
        f"The model of the switches reads prompts, then writes with a cache of keys and values: batches of {batches} "
        f"texts of {lengths} tokens, up to the batch and the length that are set."
    )


def lines(found: full_model_throughput.Result, phase: full_model_throughput.Phase) -> list[list[charts.Line]]:
    """Latency and throughput of a phase, a line for every length."""
    drawn: list[list[charts.Line]] = [[], []]
    for length in sorted({point.length for point in found.points}):
        points = [point for point in found.points if (point.length, point.phase) == (length, phase)]
        if not points:
            continue
        name, batches = f"{length} tokens", [point.batch for point in points]
        times = [(point.median_ms, point.low_ms, point.high_ms) for point in points]
        drawn[0].append(charts.Line(name, batches, *map(list, zip(*times, strict=True))))
        speeds = [(point.tokens_per_second, *point.spread_of_speed) for point in points]
        drawn[1].append(charts.Line(name, batches, *map(list, zip(*speeds, strict=True))))
    return drawn


def table(found: full_model_throughput.Result) -> pd.DataFrame:
    """The points as rows."""
    return pd.DataFrame([vars(point) for point in found.points])


def _draw(what: str, found: full_model_throughput.Result, params: full_model_throughput.Params) -> None:
    if found.ended == "running":
        st.caption(f"{len(found.points)} of {found.total} points are done.")
    elif found.ended != "finished":
        st.info(plain(found.ending), icon=":material/info:")
    if len(found.points) > 1:
        _picture(what, found, params, f"{OWN}_curves")


def _picture(what: str, found: full_model_throughput.Result, params: full_model_throughput.Params, key: str) -> None:
    latency, speed = lines(found, _PHASES[what])
    fig = charts.throughput(latency, speed, params.batches, _WAITS[what], mode=theme.mode())
    chart.figure(fig, key=key, sentence=found.sentence, height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="whole-model-throughput",
        experiment="full_model_throughput",
        params=params,
        data=lambda: table(found),
    )
    if found.ended != "running":
        provenance(found)
