"""A lab in small that uses all of the frame: the tests drive it, a browser can open it."""

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from engine.experiments.probe import Params

from ui import chart, checks, compare, controls, evidence, export, page, run, source
from ui.controls import Look
from ui.labs import Lab

LAB = Lab("probe", "Probe", "What does the probe say?", ":material/science:", "tests/ui/probe_page.py")
FIELDS = ["text", "layer", "temperature", "mask", "scale", "average", "window", "drop", "seconds", "fail"]


def settings():
    values = controls.controls(
        Params, prefix="probe", fields=FIELDS, layer=Look(maximum=st.session_state.get("deepest", 29))
    )
    return controls.validated(Params, values)


def heatmap(result):
    return go.Figure(go.Heatmap(z=result.weights, colorscale="Cividis"))


def explore(params):
    view = st.segmented_control(
        "Show", ["Whole", "Parts"], default="Whole", required=True, key="probe_view", bind="query-params"
    )
    if view == "Parts":
        st.selectbox("Part", range(100), format_func=lambda part: f"part {part}", key="probe_part", bind="query-params")
        st.pills(
            "Marks", ["a", "b"], default=["a", "b"], selection_mode="multi", key="probe_marks", bind="query-params"
        )
        st.segmented_control("Guess", ["more", "less"], key="probe_guess", bind="query-params")
    pinned = compare.pin(params, prefix="probe")
    if pinned is not None:
        run_of_a = run.run("probe", pinned, key="probe_a")
        if run_of_a is not None:
            chart.figure(heatmap(run_of_a), key="figure_a", sentence=f"A is layer {run_of_a.layer}.")
    result = run.run("probe", params, key="probe", wait=st.session_state.get("wait", 1.0))
    if result is None:
        return
    fig = heatmap(result)
    chart.figure(fig, key="figure", sentence=f"Layer {result.layer} sums to {result.weights.sum():.0f}.")
    export.export(
        fig,
        key="figure",
        name="probe",
        data=lambda: pd.DataFrame(result.weights),
        experiment="probe",
        params=run.params_of("probe"),
    )
    evidence.evidence(
        {
            "median_ms": 1.24,
            "low_ms": 1.2,
            "high_ms": 1.31,
            "runs": 10,
            "warmup": "2 runs",
            "device": "Test CPU",
            "dtype": "float32",
            "shape": "32 × 32",
            "versions": {"torch": "2.13.0"},
        }
    )


def code():
    source.show(["engine.experiments:ExperimentParams", "engine.runtime.jobs:LocalJob.report"])


def tests(params):
    result = run.run("probe", params, key="probe")
    if result is not None:
        checks.checks(result.checks)


page.lab(LAB, controls=settings, explore=explore, code=code, tests=tests)
