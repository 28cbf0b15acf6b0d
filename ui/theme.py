"""The workbench's colours and its two Plotly templates.

Magnitudes are drawn in cividis, signed values on a scale that is centred on 0, categories in Okabe and Ito's
palette: all three survive the common colour-vision deficiencies. Surfaces equal those of `.streamlit/config.toml`,
so that a chart lies on its page without a seam and an exported figure keeps the page's look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go
import plotly.io as pio
import streamlit as st

Mode = Literal["light", "dark"]
ColorScale = list[tuple[float, str]]

MAGNITUDE = "Cividis"

# Okabe & Ito, "Color Universal Design" (2008), ordered by contrast on each surface; black became grey.
CATEGORIES: dict[Mode, tuple[str, ...]] = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#55636D"),
    "dark": ("#56B4E9", "#E69F00", "#2DBE93", "#CC79A7", "#F0E442", "#E8763A", "#9AA8B0"),
}

# Negative is orange, positive blue, and 0 is the page itself.
_SIGNED: dict[Mode, tuple[str, ...]] = {
    "light": ("#8A3D00", "#DD7C35", "#F8DFCB", "#FFFFFF", "#D3E6F3", "#4698CB", "#004C7F"),
    "dark": ("#FFB37A", "#C4621B", "#4A3326", "#0F1519", "#22384A", "#2D7FB8", "#96D0F5"),
}

FONT = "Source Sans, Helvetica Neue, Arial, sans-serif"


@dataclass(frozen=True)
class Surface:
    """What a chart is drawn on: `paper` below, `ink` for text, `line` for axes, `grid` for grid lines."""

    paper: str
    ink: str
    muted: str
    line: str
    grid: str
    accent: str


SURFACES: dict[Mode, Surface] = {
    "light": Surface("#FFFFFF", "#10191F", "#44545F", "#B9C6CC", "#E6ECEE", "#0B6B7E"),
    "dark": Surface("#0F1519", "#E4EBEE", "#B4C1C8", "#4A5A64", "#253037", "#4FB3C6"),
}


def signed(mode: Mode) -> ColorScale:
    """The diverging scale of `mode`; draw with `zmid=0`, so that no sign is favoured."""
    colours = _SIGNED[mode]
    return [(step / (len(colours) - 1), colour) for step, colour in enumerate(colours)]


def _template(mode: Mode) -> go.layout.Template:
    # Margins are fixed: with `automargin` Plotly lays a figure out several times, which takes as long as all the rest.
    surface = SURFACES[mode]
    axis = {
        "gridcolor": surface.grid,
        "linecolor": surface.line,
        "tickcolor": surface.line,
        "zerolinecolor": surface.line,
        "ticks": "",
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": surface.ink},
            "title": {"font": {"size": 15}, "x": 0, "xanchor": "left"},
            "paper_bgcolor": surface.paper,
            "plot_bgcolor": surface.paper,
            "colorway": list(CATEGORIES[mode]),
            "colorscale": {"sequential": MAGNITUDE, "sequentialminus": MAGNITUDE, "diverging": signed(mode)},
            "coloraxis": {"colorbar": {"outlinewidth": 0, "thickness": 12}},
            "margin": {"l": 56, "r": 16, "t": 36, "b": 44},
            "hoverlabel": {"font": {"family": FONT, "size": 13}},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": axis,
            "yaxis": axis,
        },
        data={"heatmap": [{"colorbar": {"outlinewidth": 0, "thickness": 12}}]},
    )


for _mode in SURFACES:
    pio.templates[f"workbench_{_mode}"] = _template(_mode)


def mode() -> Mode:
    """``"light"`` or ``"dark"``, as the page is shown now."""
    return "dark" if st.context.theme.type == "dark" else "light"


def template() -> str:
    """Name of the Plotly template that goes with the page as it is shown now."""
    return f"workbench_{mode()}"


# Runs again when the appearance changes. Where the page's background is no longer the one that the server drew for,
# it asks for a new drawing; Streamlit itself would wait for the learner's next move.
_FOLLOW = """
export default function ({ data, parentElement, setTriggerValue }) {
  const probe = parentElement.querySelector("span")
  const background = getComputedStyle(probe).getPropertyValue("--st-background-color").trim()
  if (background.toLowerCase() !== data.paper.toLowerCase()) setTriggerValue("changed", background)
}
"""

_follower = st.components.v2.component("workbench_theme", html="<span hidden></span>", js=_FOLLOW)


def follow() -> None:
    """Have the page drawn again as soon as the learner switches between light and dark."""
    _follower(key="_theme", data={"paper": SURFACES[mode()].paper}, on_changed_change=lambda: None, height=1)
