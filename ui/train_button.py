"""The button of a lab that trains: one training at a time, and none is thrown away unasked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import streamlit as st

from engine.experiments import ExperimentParams

Params = TypeVar("Params", bound=ExperimentParams)


def train_button(
    params: Params | None,
    started: Params | None,
    start: Callable[[Params], None],
    *,
    running: bool,
    waiting: bool,
    prefix: str,
) -> None:
    """Draw the button, and below it what the settings have to do with what is seen.

    Args:
        params: the settings now; None if they make no sense.
        started: those that were last trained with; None before the first training.
        start: is called with `params` when the button is pressed.
        running: whether a training is under way.
        waiting: whether it has not begun, as others hold the device.
        prefix: the lab's.
    """
    label, icon = ("Train", "play_arrow") if started is None else ("Train again", "replay")
    st.button(
        ("Waiting…" if waiting else "Training…") if running else label,
        key=f"_{prefix}_train",
        type="primary",
        icon=f":material/{'hourglass_top' if running else icon}:",
        width="stretch",
        disabled=running or params is None,
        help="One training at a time: let it end, or cancel it, which keeps what it has learned." if running else None,
        on_click=start,
        args=(params,),
    )
    if started is not None and params is not None and started != params:
        st.caption(
            "The training goes on with the settings that it began with; these are for the next one."
            if running
            else "What was trained last had other settings: press “Train again” for these."
        )
