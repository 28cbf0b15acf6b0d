"""What a mixture of experts costs beside dense layers, over tokens or experts: panels that share one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ui import theme
from ui.charts.flash import decades, short

_GAP = 0.075
_MARKERS = (("circle-open", 14), ("square", 9), ("diamond", 8))  # rings are seen around what lies on them


@dataclass(frozen=True)
class Line:
    """One layer in one panel.

    Args:
        name: of the layer.
        which: 0, 1, 2: its colour and its marker.
        x, y: its points.
        dashed: whether it is predicted, not measured.
        low, high: ends of the spread, or None.
        hover: what is said of each point, or None for its numbers alone.
    """

    name: str
    which: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    hover: Sequence[str] | None = None


def panels(
    drawn: Sequence[tuple[str, Sequence[Line]]], across: str, *, span: tuple[float, float], mode: theme.Mode = "light"
) -> go.Figure:
    """Panels above each other, both axes logarithmic; what is predicted is dashed.

    Args:
        drawn: title with unit, and lines, of each panel from top to bottom.
        across: title of the shared axis.
        span: the least and the most on it: it stays as it is while points come.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig, named = go.Figure(), set()
    tall = (1 - _GAP * (len(drawn) - 1)) / len(drawn)
    for number, (title, lines) in enumerate(drawn):
        axis = "y" if number == 0 else f"y{number + 1}"
        top = 1 - number * (tall + _GAP)
        for line in lines:
            spread, (symbol, size) = None, _MARKERS[line.which]
            if line.low is not None and line.high is not None:
                spread = {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - y for high, y in zip(line.high, line.y, strict=True)],
                    "arrayminus": [y - low for low, y in zip(line.low, line.y, strict=True)],
                    "thickness": 1.2,
                    "width": 3,
                }
            fig.add_scatter(
                x=list(line.x),
                y=list(line.y),
                yaxis=axis,
                name=line.name,
                legendgroup=line.name,
                showlegend=line.name not in named and not line.dashed,
                mode="lines" if line.dashed else "lines+markers",
                line={"color": colours[line.which], "width": 2, "dash": "dash" if line.dashed else "solid"},
                marker={"symbol": symbol, "size": size, "line": {"width": 2.5 if size > 10 else 0}},
                error_y=spread,
                customdata=line.hover,
                hovertemplate="%{customdata}<extra></extra>"
                if line.hover
                else f"{line.name}, {'predicted' if line.dashed else across} %{{x:,}}: %{{y:.3g}}<extra></extra>",
            )
            if not line.dashed:
                named.add(line.name)
        values = [value for line in lines for value in (*line.y, *(line.low or ()), *(line.high or ()))]
        low, high = min(values, default=1.0) / 1.4, max(values, default=10.0) * 1.4
        fig.update_layout(
            {
                f"yaxis{axis[1:]}": {
                    "title": title,
                    "type": "log",
                    "domain": [max(0.0, top - tall), min(1.0, top)],
                    "range": [math.log10(low), math.log10(high)],
                    "gridcolor": surface.grid,
                    "fixedrange": True,
                }
                | decades(low, high)
            }
        )
    if any(line.dashed for _, lines in drawn for line in lines):
        line = {"color": surface.muted, "dash": "dash", "width": 2}
        fig.add_trace(go.Scatter(x=[None], y=[None], name="predicted", mode="lines", line=line, hoverinfo="skip"))
    first, last = span
    marks = [2**power for power in range(round(math.log2(first)), math.ceil(math.log2(last)) + 1)]
    fig.update_xaxes(
        type="log",
        title={"text": across, "standoff": 4},
        range=[math.log10(0.88 * first), math.log10(1.14 * last)],
        tickvals=marks,
        ticktext=[short(mark) for mark in marks],
        tickangle=0,
        anchor=f"y{len(drawn)}" if len(drawn) > 1 else "y",
        fixedrange=True,
    )
    return fig.update_layout(
        margin={"l": 70, "r": 14, "t": 62, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        dragmode=False,
    )
