"""What a measurement left out and why, and how it was made: below every measured picture of the lab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import streamlit as st

from engine.experiments._flash import Stop
from ui.prose import plain


class Measured(Protocol):
    """What a result says about its own making.

    Attributes:
        device: its name.
        versions: of what took part, by name.
        evidence: how it was measured, a line each.
    """

    device: str
    versions: dict[str, str]
    evidence: tuple[str, ...]


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


def provenance(found: Measured) -> None:
    """Device and versions, and behind them how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    with st.expander(plain(f"Measured on {found.device}; {versions}"), icon=":material/speed:"):
        for line in found.evidence:
            st.markdown(plain(f"{line[0].upper()}{line[1:]}."))
