"""The button of a view that measures: one measurement at a time, started with the settings of that moment."""

from __future__ import annotations

import streamlit as st

from engine.experiments import ExperimentParams
from ui import run


def measure_button(experiment: str, params: ExperimentParams, *, key: str) -> ExperimentParams | None:
    """Draw the button that starts `experiment` under the key `key` of `ui.run`.

    Returns:
        The settings that were last measured with; None before the first time.
    """
    started, running = st.session_state.get(_started(key)), run.is_running(key)
    st.button(
        "Measuring…" if running else "Measure" if started is None else "Measure again",
        key=f"_{key}_start",
        type="primary",
        icon=f":material/{'hourglass_top' if running else 'speed'}:",
        disabled=running,
        on_click=_start,
        args=(experiment, params, key),
    )
    if started is not None and started != params:
        st.caption(
            "The measurement goes on with the settings that it began with; these are for the next one."
            if running
            else "What you see was measured with other settings: press “Measure again” for these."
        )
    return started


def _start(experiment: str, params: ExperimentParams, key: str) -> None:
    st.session_state[_started(key)] = params
    run.ask(experiment, params, key=key)


def _started(key: str) -> str:
    return f"_{key}_params"
