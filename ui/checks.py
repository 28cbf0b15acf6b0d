"""The Tests tab: properties that must hold, checked live on the current settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import streamlit as st

from ui.prose import plain


class Check(Protocol):
    """One property, as an experiment's result states it.

    Attributes:
        name: of the property, a few words.
        must: what must hold, a sentence.
        measured: what was measured.
        bound: what it is compared with.
        passed: whether it holds.
    """

    name: str
    must: str
    measured: float
    bound: float
    passed: bool


def checks(results: Sequence[Check]) -> None:
    """Draw `results`, the failed ones first, under a line that says how many hold."""
    held = sum(check.passed for check in results)
    summary = f"{held} of {len(results)} properties hold on these settings."
    if held == len(results):
        st.success(summary, icon=":material/check_circle:")
    else:
        st.error(summary, icon=":material/error:")
    for check in sorted(results, key=lambda check: check.passed):
        with st.container(border=True, gap="xsmall"):
            sign = ":green-badge[:material/check: holds]" if check.passed else ":red-badge[:material/close: fails]"
            st.markdown(f"{sign} **{plain(check.name)}**")
            st.markdown(plain(check.must))
            st.caption(f"measured {check.measured:.4g} · bound {check.bound:.4g}")
