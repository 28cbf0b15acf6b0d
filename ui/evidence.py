"""The evidence card of a measured time: where and how it was measured, and how much it varied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
    spread = f"({facts['low_ms']:.3g} to {facts['high_ms']:.3g})"
    return f"median {facts['median_ms']:.3g} ms {spread} · {facts['runs']} runs · {facts['device']} · {facts['dtype']}"


def rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """Everything known about the measurement, by name in words."""
    return {
        "median": f"{facts['median_ms']:.4g} ms",
        "10th to 90th percentile": f"{facts['low_ms']:.4g} to {facts['high_ms']:.4g} ms",
        "timed runs": str(facts["runs"]),
        "warm-up": facts["warmup"],
        "device": facts["device"],
        "data type": facts["dtype"],
        "what was computed": facts["shape"],
        **{f"{name} version": version for name, version in facts["versions"].items()},
    }
