"""The frame of every lab: its question on top, four tabs below it, and in each the controls beside what they change.

A lab's page script is short::

    page.lab(labs.ATTENTION, controls=controls, explore=explore, predict=predict, code=code, tests=tests)

`controls` draws the widgets and returns the validated parameters; each tab is a function that draws itself and
runs only while its tab is open. The controls are drawn in every tab, for a widget that is not drawn loses its value
and its place in the URL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import streamlit as st

from ui import links
from ui.labs import Lab

Settings = TypeVar("Settings")

NOTHING_TO_SHOW = "Nothing to show for these settings: the note beside the controls says what to change."

EXPLORE, PREDICT, CODE, TESTS = "Explore", "Predict", "Code", "Tests"


def lab(
    about: Lab,
    *,
    controls: Callable[[], Settings | None],
    explore: Callable[[Settings], None],
    predict: Callable[[Settings], None] | None = None,
    code: Callable[[], None] | None = None,
    tests: Callable[[Settings], None] | None = None,
) -> None:
    """Draw the lab `about`.

    The open tab is a fragment: a control redraws the tab and leaves the rest of the app alone. What a link sets and no
    choice on the page can be is said above the tab's contents.

    Args:
        about: the lab's entry in `ui.labs`.
        controls: draws the controls and returns the settings, or None where they make no sense
            (it has then said why; tabs that need settings wait).
        explore: draws the Explore tab from the settings.
        predict: draws the Predict tab; no such tab if None, and likewise for the next two.
        code: draws the Code tab, which needs no settings.
        tests: draws the Tests tab.
    """
    prefix = about.url_path
    drawn = {EXPLORE: explore, PREDICT: predict, CODE: code and (lambda _: code()), TESTS: tests}
    contents = {name: draw for name, draw in drawn.items() if draw is not None}

    @st.fragment
    def body(name: str) -> None:
        left, right = st.columns([1, 3], gap="medium")
        with links.noting(right.container(), memory=f"_links_{prefix}", prefix=prefix):
            with left:
                settings = controls()
            with right:
                if settings is None and name != CODE:
                    st.caption(NOTHING_TO_SHOW)
                else:
                    contents[name](settings)

    st.title(about.question, anchor=False)
    with links.noting(st.container(), memory=f"_links_{prefix}_tab", prefix=prefix):
        tabs = st.tabs(list(contents), key=f"{prefix}_tab", on_change="rerun", bind="query-params")
    for name, tab in zip(contents, tabs, strict=True):
        if tab.open:
            with tab:
                body(name)
