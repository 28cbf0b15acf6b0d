"""A guess on a lab's Predict tab: it counts for a run only if it was made before that run began.

What the learner sets is kept under the widget's key, which is lost while another tab is open, and under one of our own;
`settle` freezes it when the run is started.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.experiments._ending import Ending


def keep(key: str) -> None:
    """Remember that the widget `key` was moved, for a run that is started from another tab: its `on_change`."""
    st.session_state[_moved(key)] = st.session_state[key]


def settle(key: str) -> None:
    """Let the guess count for the run that is started now: what stands on the open tab, or was moved to before."""
    moved = st.session_state.pop(_moved(key), None)
    st.session_state[_settled(key)] = st.session_state.get(key, moved)


def settled(key: str) -> Any | None:
    """The guess that was made before the last run was started; None if there was none."""
    return st.session_state.get(_settled(key))


def unjudged(ended: Ending, steps: int) -> str:
    """Why a run that was not finished says nothing about a guess of how it ends."""
    why = {"diverged": "diverged", "cancelled": "was cancelled", "timed out": "ran out of time"}[ended]
    return f"You guessed for {steps} steps, but the run {why} before: your guess is neither right nor wrong."


def _moved(key: str) -> str:
    return f"_{key}_set"


def _settled(key: str) -> str:
    return f"_{key}_made"
