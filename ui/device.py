"""The device badge: on what the learner's experiments run, without making anybody wait for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from ui import run
from ui.prose import plain

if TYPE_CHECKING:
    from engine.runtime import DeviceInfo

_POLL = 1.0


def badge() -> None:
    """Draw the device badge; it says ``starting…`` and looks again until the worker is up."""
    known = _known()
    if known is None:
        _starting()
    else:
        _draw(known)


@st.fragment(run_every=_POLL)
def _starting() -> None:
    if _known() is not None:
        st.rerun()
    st.badge(run.STARTING, icon=":material/hourglass_top:", color="gray")


def _known() -> Sequence[DeviceInfo] | None:
    """The devices, empty if there is nothing to run on, None as long as that is not known."""
    future = run.starting()
    if not future.done():
        return None
    if future.exception() is not None:
        return ()
    return future.result().devices() or None


def _draw(devices: Sequence[DeviceInfo]) -> None:
    if not devices:
        st.badge("no worker", icon=":material/power_off:", color="red")
    for device in devices:
        if device.kind == "cuda":
            st.badge("GPU", icon=":material/developer_board:", color="green")
        else:
            st.badge("CPU", icon=":material/memory:", color="blue")
        st.caption(plain(facts(device)))


def facts(device: DeviceInfo) -> str:
    """A device in a line: its name, its memory, and the torch that computes on it."""
    parts = [device.name, f"{device.total_bytes / 1e9:.0f} GB"]
    if device.kind == "cpu":
        parts.append(f"{device.cores} cores")
    if "torch" in device.libraries:
        parts.append(f"torch {device.libraries['torch']}")
    return " · ".join(parts)
