"""Draws a Plotly figure on a page: in the workbench's template, with a sentence that says what it shows."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
import streamlit as st
from plotly.basedatatypes import BaseFigure

from ui import theme
from ui.prose import plain

# Of Plotly's toolbar `ui.export` needs the camera; nobody is to see it, for it lies over the legend.
_CONFIG = {"displayModeBar": True, "modeBarButtons": [["toImage"]], "displaylogo": False}

_TEMPLATES = {name: pio.templates[name].to_plotly_json() for name in ("workbench_light", "workbench_dark")}


def hide_toolbars() -> None:
    """Keep Plotly's toolbars out of sight on the whole page."""
    st.html("<style>.modebar-container { display: none; }</style>")


def figure(fig: go.Figure, *, key: str, sentence: str, width: int | None = None, height: int | None = None) -> None:
    """Draw `fig` with `sentence` under it, which is also what a screen reader says in its place.

    Args:
        fig: as a function of `ui.charts` returns it; its template is replaced by the page's.
        key: of the element on the page; `ui.export` finds the figure by it.
        sentence: what the figure shows, made from the data.
        width: pixels at most, instead of all that there are.
        height: pixels, instead of the figure's own.
    """
    st.plotly_chart(
        _Themed(fig, height),
        theme=None,
        width=width or "stretch",
        key=key,
        config=_CONFIG,
        alt=sentence,
    )
    st.caption(plain(sentence))


class _Themed(BaseFigure):
    """A figure with the page's template, as it goes to the browser.

    The template is put beside what `fig` has validated already: set on the figure itself, Plotly would validate it anew
    for every drawing, which takes 2 ms and so more than all the rest of the work here.
    """

    def __init__(self, fig: go.Figure, height: int | None) -> None:
        self._spec = fig.to_dict()
        self._spec["layout"]["template"] = _TEMPLATES[theme.template()]
        if height is not None:
            self._spec["layout"]["height"] = height

    def to_dict(self) -> dict[str, Any]:
        return self._spec
