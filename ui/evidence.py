"""Where and how something was measured, and how much it varied: a card for one time, a line for a whole result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import streamlit as st

from ui.prose import plain


def evidence(measured: Mapping[str, Any] | Any) -> None:
    """Draw the evidence of a measured time: one line, and everything that is known behind it.

    Args:
        measured: an `engine.measure.Evidence`, or a mapping with its fields: ``median_ms``, ``low_ms``, ``high_ms``,
            ``runs``, ``warmup``, ``device``, ``dtype``, ``shape``, ``versions``.
    """
    facts = dataclasses.asdict(measured) if dataclasses.is_dataclass(measured) else measured
    with st.expander(plain(line(facts)), icon=":material/speed:"):
        st.table(rows(facts), border="horizontal", hide_header=True)


def line(facts: Mapping[str, Any]) -> str:
    """The evidence in a line, e.g. ``"median 1.24 ms (1.20 to 1.31) · 10 runs · Xeon Gold · float32"``."""
    low, median, high = (written(facts[name]) for name in ("low_ms", "median_ms", "high_ms"))
    return f"median {median} ms ({low} to {high}) · {facts['runs']} runs · {facts['device']} · {facts['dtype']}"


def rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """Everything known about the measurement, by name in words."""
    low, median, high = (written(facts[name], 4) for name in ("low_ms", "median_ms", "high_ms"))
    return {
        "median": f"{median} ms",
        "10th to 90th percentile": f"{low} to {high} ms",
        "timed runs": str(facts["runs"]),
        "warm-up": facts["warmup"],
        "device": facts["device"],
        "data type": facts["dtype"],
        "what was computed": facts["shape"],
        **{f"{name} version": version for name, version in facts["versions"].items()},
    }


class Timed(Protocol):
    """A time and its spread, in milliseconds."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def timing(point: Timed) -> str:
    """What a hover says of a point, e.g. ``"1.24 ms, 1.2 to 1.31 in 10 runs"``."""
    median, low, high = (written(number) for number in (point.median_ms, point.low_ms, point.high_ms))
    return f"{median} ms, {low} to {high} in {point.runs} runs"


def written(number: float, digits: int = 3) -> str:
    """That many digits, 3 or 4; all that stand before the point from a thousand on."""
    text = f"{number:.{digits}g}"
    return text if float(text) < 1000 else f"{number:,.0f}"


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


def provenance(found: Measured) -> None:
    """Device and versions, and behind them how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    with st.expander(plain(f"Measured on {found.device}; {versions}"), icon=":material/speed:"):
        for line in found.evidence:
            st.markdown(plain(f"{line[0].upper()}{line[1:]}."))
