"""What a measurement left out and why: below every measured picture of the lab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from engine.experiments._flash import Stop
from ui.prose import plain


def missing(absent: Mapping[str, str], stops: Sequence[Stop] = ()) -> None:
    """Backends that do not exist here, and those that ended before the longest sequence."""
    for stop in stops:
        if stop.kind == "failed":
            st.warning(
                plain(f"{stop.label} is left out from T = {stop.length:,} on. {stop.reason}"), icon=":material/warning:"
            )
    others = [stop for stop in stops if stop.kind != "failed"]
    if not absent and not others:
        return
    with st.expander(f"Not measured, and why: {len(absent) + len(others)}", icon=":material/block:"):
        for label, reason in absent.items():
            st.markdown(f"**{plain(label)}**: {plain(reason)}")
        for stop in others:
            st.markdown(f"**{plain(stop.label)}** at T = {stop.length:,}: {plain(stop.reason)}")
