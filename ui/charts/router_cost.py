"""What a mixture of experts costs beside dense layers, over tokens or experts: panels that share one axis."""

from __future__ import annotations

import html
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


@dataclass(frozen=True)
class Bar:
    """One recorded way to compute the layer.

    Args:
        label: above its bars.
        series: 0, 1, …: which of `speeds`' names it belongs to.
        value: its length.
        low, high: ends of the spread.
        hover: what is said of it.
    """

    label: str
    series: int
    value: float
    low: float
    high: float
    hover: str


def speeds(
    bars: Sequence[Bar],
    names: Sequence[str],
    across: str,
    *,
    roof: float,
    roof_words: str,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Bars with whiskers from left to right, those of one label together, up to the line that is the most there can be.

    Args:
        bars: in the order in which they stand, from the top.
        names: of the series, in the legend.
        across: title of the axis.
        roof: the most there can be.
        roof_words: what that is.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    labels = list(dict.fromkeys(bar.label for bar in bars))
    thick = 0.6 / len(names)
    fig = go.Figure()
    for series, name in enumerate(names):
        own = [bar for bar in bars if bar.series == series]
        fig.add_bar(
            x=[bar.value for bar in own],
            y=[labels.index(bar.label) + (series - (len(names) - 1) / 2) * thick for bar in own],
            orientation="h",
            width=thick,
            name=name,
            marker={"color": colours[series], "line": {"width": 0}},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [bar.high - bar.value for bar in own],
                "arrayminus": [bar.value - bar.low for bar in own],
                "color": surface.ink,
                "thickness": 1.2,
                "width": 3,
            },
            text=[f"{bar.value:.0f}" for bar in own],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            customdata=[bar.hover for bar in own],
            hovertemplate="%{customdata}<extra></extra>",
        )
    fig.add_vline(roof, line={"color": surface.ink, "width": 1.5, "dash": "dash"})
    notes = [
        {"text": html.escape(label), "x": 0, "xanchor": "left", "y": place - 0.36, "yanchor": "bottom"}
        for place, label in enumerate(labels)
    ]
    notes.append({"text": html.escape(roof_words), "x": roof, "xanchor": "right", "y": 1, "yref": "paper"})
    notes[-1] |= {"yanchor": "bottom"}
    fig.update_layout(
        annotations=[{"showarrow": False, "font": {"size": 13, "color": surface.ink}} | note for note in notes],
        margin={"l": 14, "r": 14, "t": 66, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.04, "yanchor": "bottom", "traceorder": "normal"},
        dragmode=False,
    )
    fig.update_xaxes(title=across, range=[0, 1.04 * roof], fixedrange=True)
    fig.update_yaxes(visible=False, range=[len(labels) - 0.5, -0.75], fixedrange=True)
    return fig
