"""Pictures of what backends of attention cost, over the sequence length; and how a backend looks in every picture.

Legend: P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ui import theme

MIB = 2**20
_LOOKS = {
    "standard": (1, "circle"),
    "torch-math": (1, "circle-open"),
    "torch-flash": (0, "diamond"),
    "flash-attn-2": (0, "diamond-open"),
    "torch-efficient": (5, "square"),
    "torch-cudnn": (2, "cross"),
    "flex": (6, "star"),
    "flash-attn-3": (3, "hexagon-open"),
    "flash-attn-4": (3, "hexagon"),
    "triton": (4, "triangle-up"),
    "whole": (2, "triangle-down-open"),
    "split": (2, "pentagon"),
}
"""Colour and marker of every backend; those that compute alike share a colour."""
_OTHER = (6, "pentagon-open")
_LINE = 18  # pixels of a line of text
_GAP = 0.09  # share of the height between two panels
TEXT = {"showarrow": False, "font": {"size": 13}, "borderpad": 1}


@dataclass(frozen=True)
class Line:
    """Measured points of one backend, shortest sequence first.

    Args:
        backend, label: its name in the registry, and in words.
        lengths: (P,) tokens.
        values: (P,) of the panel.
        hover: (P,) what is said of a point.
        low, high: (P,) ends of the spread; those that equal the values are not drawn; None for none.
        recorded: whether it was measured elsewhere and before, which is drawn dashed.
    """

    backend: str
    label: str
    lengths: Sequence[int]
    values: Sequence[float]
    hover: Sequence[str]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    recorded: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a model predicts for a backend; drawn dashed.

    Args:
        backend, label: its name in the registry, and in words.
        lengths: (P,) tokens.
        values: (P,) of the panel.
    """

    backend: str
    label: str
    lengths: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class End:
    """Where a backend stops.

    Args:
        backend, label: its name in the registry, and in words.
        length: tokens of the first run that was not made.
        words: why, a few words.
        value: of the panel, as it would have been; None where that is not known.
    """

    backend: str
    label: str
    length: int
    words: str
    value: float | None = None


@dataclass(frozen=True)
class Panel:
    """One of the pictures above each other.

    Args:
        title: of its y axis, with the unit.
        lines, forecasts, ends: what is drawn in it.
        logarithmic: the axis; one that is not begins at 0.
        most: the axis reaches up to here at least.
        limit: a horizontal line at this value; None for none.
        limit_words: what stands on it.
    """

    title: str
    lines: Sequence[Line] = ()
    forecasts: Sequence[Forecast] = ()
    ends: Sequence[End] = ()
    logarithmic: bool = True
    most: float | None = None
    limit: float | None = None
    limit_words: str = ""


def look(backend: str, mode: theme.Mode) -> tuple[str, str]:
    """Colour and marker of a backend, the same in every picture."""
    colour, symbol = _LOOKS.get(backend, _OTHER)
    return theme.CATEGORIES[mode][colour], symbol


def short(length: float) -> str:
    """A number of tokens on an axis, e.g. ``"512"``, ``"16k"``."""
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"


def over_length(panels: Sequence[Panel], *, mode: theme.Mode = "light", across: str = "tokens, T") -> go.Figure:
    """Panels above each other on one logarithmic axis of lengths, each with a line for every backend.

    Args:
        panels: from top to bottom, one or two.
        mode: light or dark.
        across: title of the shared axis.
    """
    surface = theme.SURFACES[mode]
    fig = go.Figure()
    named: set[str] = set()
    height = (1 - _GAP * (len(panels) - 1)) / len(panels)
    lengths = sorted({length for panel in panels for length in _lengths(panel)})
    for number, panel in enumerate(panels):
        axis = "y" if number == 0 else f"y{number + 1}"
        top = 1 - number * (height + _GAP)
        _draw(fig, panel, axis, named, mode)
        fig.update_layout({f"yaxis{axis[1:]}": _y_axis(panel, top - height, top, mode)})
    low, high = (lengths[0], lengths[-1]) if lengths else (128, 1024)
    marks = [2**power for power in range(round(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    if len(marks) > 9:
        marks = marks[len(marks) % 2 == 0 :: 2]
    fig.update_xaxes(
        type="log",
        title={"text": across, "standoff": 4},
        range=[math.log10(0.86 * low), math.log10(1.22 * high)],
        tickvals=marks,
        ticktext=[short(mark) for mark in marks],
        tickangle=0,
        anchor="y" if len(panels) == 1 else f"y{len(panels)}",
        fixedrange=True,
    )
    if any(panel.forecasts for panel in panels) and any(panel.lines for panel in panels):
        fig.add_trace(
            legend_entry("predicted", {"mode": "lines", "line": {"color": surface.muted, "dash": "dash", "width": 2}})
        )
    if any(end.value is not None for panel in panels for end in panel.ends):
        marker = {"symbol": "x", "size": 10, "color": surface.ink}
        fig.add_trace(legend_entry("not run, as it would not fit", {"mode": "markers", "marker": marker}))
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        margin={"l": 66, "r": 14, "t": 12, "b": 54},
        hovermode="closest",
        dragmode=False,
        showlegend=True,
    )
    return fig


def _lengths(panel: Panel) -> list[int]:
    drawn = [length for line in (*panel.lines, *panel.forecasts) for length in line.lengths]
    return drawn + [end.length for end in panel.ends]


def _draw(fig: go.Figure, panel: Panel, axis: str, named: set[str], mode: theme.Mode) -> None:
    surface = theme.SURFACES[mode]
    for forecast in panel.forecasts:
        colour, _ = look(forecast.backend, mode)
        fresh = not panel.lines and forecast.backend not in named
        fig.add_scatter(
            x=list(forecast.lengths),
            y=list(forecast.values),
            yaxis=axis,
            name=forecast.label,
            mode="lines",
            line={"color": colour, "width": 2, "dash": "dash"},
            showlegend=fresh,
            hovertemplate=f"{forecast.label}<br>T = %{{x:,}}: %{{y:.3g}}<extra></extra>",
        )
        if fresh:
            named.add(forecast.backend)
    for line in panel.lines:
        colour, symbol = look(line.backend, mode)
        spread = None
        if line.low is not None and line.high is not None and list(line.low) != list(line.high):
            spread = {
                "type": "data",
                "symmetric": False,
                "array": [high - value for high, value in zip(line.high, line.values, strict=True)],
                "arrayminus": [value - low for low, value in zip(line.low, line.values, strict=True)],
                "thickness": 1.2,
                "width": 3,
                "color": colour,
            }
        fig.add_scatter(
            x=list(line.lengths),
            y=list(line.values),
            yaxis=axis,
            name=line.label,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dash" if line.recorded else "solid"},
            marker={"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2 * symbol.endswith("-open")}},
            error_y=spread,
            legendgroup=line.backend,
            showlegend=line.backend not in named,
            customdata=list(line.hover),
            hovertemplate="%{customdata}<extra></extra>",
        )
        named.add(line.backend)
    for end in panel.ends:
        colour, _ = look(end.backend, mode)
        if end.value is not None:
            fig.add_scatter(
                x=[end.length],
                y=[end.value],
                yaxis=axis,
                name=end.label,
                mode="markers",
                marker={"symbol": "x", "size": 12, "color": colour},
                showlegend=False,
                customdata=[end.words],
                hovertemplate=f"{end.label}, T = {end.length:,}<br>%{{customdata}}<extra></extra>",
            )
    for place, end in enumerate(_first(panel.ends)):
        colour, _ = look(end.backend, mode)
        line = {"color": colour, "width": 1.5, "dash": "dot"}
        fig.add_shape(type="line", x0=end.length, x1=end.length, y0=0, y1=1, yref=f"{axis} domain", line=line)
        fig.add_annotation(
            text=f"{end.label}: {end.words}",
            x=math.log10(end.length),
            y=1,
            yref=f"{axis} domain",
            xanchor="right",
            yanchor="top",
            xshift=-4,
            yshift=-_LINE * place,
            bgcolor=surface.paper,
            **TEXT | {"font": {"size": 13, "color": colour}},
        )
    if panel.limit is not None:
        fig.add_shape(
            type="line",
            x0=0,
            x1=1,
            xref="paper",
            y0=panel.limit,
            y1=panel.limit,
            yref=axis,
            line={"color": surface.ink, "width": 1.5, "dash": "dot"},
        )
        fig.add_annotation(
            text=panel.limit_words,
            x=0,
            xref="paper",
            y=math.log10(panel.limit) if panel.logarithmic else panel.limit,
            yref=axis,
            xanchor="left",
            yanchor="top",
            xshift=4,
            **TEXT,
        )


def _first(ends: Sequence[End]) -> list[End]:
    """Of every backend the first place at which it stops."""
    first: dict[str, End] = {}
    for end in sorted(ends, key=lambda end: end.length):
        first.setdefault(end.backend, end)
    return list(first.values())


def _y_axis(panel: Panel, bottom: float, top: float, mode: theme.Mode) -> dict[str, Any]:
    values = [value for line in (*panel.lines, *panel.forecasts) for value in line.values]
    values += [value for line in panel.lines for value in line.high or ()]
    values += [end.value for end in panel.ends if end.value is not None]
    values += [panel.limit] * (panel.limit is not None)
    axis: dict[str, Any] = {"title": panel.title, "domain": [max(0.0, bottom), min(1.0, top)], "fixedrange": True}
    axis["gridcolor"] = theme.SURFACES[mode].grid
    if not panel.logarithmic:
        return axis | {"range": [0, max(1.08 * max(values, default=1.0), panel.most or 0)]}
    known = [value for value in values if value > 0]
    low, high = min(known, default=1.0) / 1.7, max(known, default=10.0) * 2.6
    return axis | {"type": "log", "range": [math.log10(low), math.log10(high)]} | decades(low, high)


def decades(low: float, high: float) -> dict[str, Any]:
    """Powers of ten between two positive numbers, with 2 and 5 times them if they are few, as numbers in words."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    marks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    marks = [mark for mark in marks if low <= mark <= high]
    every = math.ceil(len(marks) / 9)
    return {"tickvals": marks[::every], "ticktext": [_mark(mark) for mark in marks[::every]]}


def _mark(value: float) -> str:
    if 1e-3 < value < 1e6:
        return f"{value:,.10g}"
    power = round(math.log10(value))
    return f"10<sup>{power}</sup>" if math.isclose(value, 10.0**power) else f"{value:.0e}"


def legend_entry(name: str, looks: dict[str, Any]) -> go.Scatter:
    """An entry of the legend that stands for no line."""
    return go.Scatter(x=[None], y=[None], name=name, hoverinfo="skip", **looks)
