"""One memory bar and one speed bar of a training step, and thin ones of what every switch makes of them.

Numbers in, Plotly figure out. Both figures have the same rows, so that they can stand side by side. Nothing here knows
of Streamlit or of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ui import theme
from ui.charts.memory import amount, unit_of

_THICK, _THIN, _GHOST = 0.5, 0.26, 0.8  # widths of bars, where rows are 1 apart; opacity of a ghost
_SECOND = 1.35  # where the first ghost is, below the thick bar at 0
_ROW_PIXELS, _ABOVE_PIXELS, _BELOW_PIXELS = 50, 8, 150  # below is room for an axis and five rows of a legend
_LOOKS: dict[str, tuple[int, str]] = {
    "weights": (0, ""),
    "scales": (0, "/"),
    "adapters": (2, ""),
    "routers": (2, "/"),
    "optimizer state": (1, ""),
    "gradients": (4, ""),
    "activations": (5, ""),
    "logits and loss": (3, ""),
    "temporary tensors": (5, "/"),
}
"""Category and pattern of every part, in the order in which they are stacked."""


@dataclass(frozen=True)
class Memory:
    """The memory of one combination of switches.

    Args:
        label: what stands above the bar.
        parts: bytes by part, as predicted.
        measured: bytes; None where nothing was measured.
    """

    label: str
    parts: Mapping[str, int]
    measured: int | None = None

    @property
    def total(self) -> int:
        """Bytes together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Speed:
    """The time of one combination of switches.

    Args:
        label: what stands above the bar.
        median: milliseconds of a step; None where nothing was measured.
        low, high: where its times begin and end.
        ends: what these two are, in words.
    """

    label: str
    median: float | None = None
    low: float = 0.0
    high: float = 0.0
    ends: str = ""


def height(rows: int) -> int:
    """Pixels that a figure of so many rows needs."""
    return _ABOVE_PIXELS + _BELOW_PIXELS + _ROW_PIXELS * (rows + 1)


def memory(rows: Sequence[Memory], *, mode: theme.Mode = "light") -> go.Figure:
    """Stacks of parts, the first thick and the others ghosts, and where the measured peaks are.

    Args:
        rows: the settings first.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    most = max(max(row.total, row.measured or 0) for row in rows)
    size, unit = unit_of(most)
    places, widths = _places(len(rows)), _widths(len(rows))
    fig = go.Figure()
    for part, (colour, pattern) in _LOOKS.items():
        if not any(row.parts.get(part) for row in rows):
            continue
        fig.add_bar(
            name=part,
            orientation="h",
            x=[row.parts.get(part, 0) / size for row in rows],
            y=places,
            width=widths,
            marker={
                "color": colours[colour],
                "opacity": _opacities(len(rows)),
                "line": {"width": 0},
                "pattern": {
                    "shape": pattern,
                    "bgcolor": colours[colour],
                    "fgcolor": surface.paper,
                    "size": 6,
                    "solidity": 0.35,
                },
            },
            customdata=[[row.label, amount(row.parts.get(part, 0))] for row in rows],
            hovertemplate="%{customdata[0]}<br>" + part + ": %{customdata[1]}<extra></extra>",
        )
    weighed = [(place, row) for place, row in zip(places, rows, strict=True) if row.measured is not None]
    if weighed:
        fig.add_scatter(
            name="measured",
            x=[row.measured / size for _, row in weighed],
            y=[place for place, _ in weighed],
            mode="markers",
            marker={"symbol": "line-ns", "size": 18, "line": {"width": 3, "color": surface.ink}},
            customdata=[[row.label, amount(row.measured)] for _, row in weighed],
            hovertemplate="%{customdata[0]}<br>measured: %{customdata[1]}<extra></extra>",
        )
    ends = [(max(row.total, row.measured or 0) / size, amount(row.total)) for row in rows]
    _lay_out(fig, [row.label for row in rows], ends, surface, title=f"{unit} at the fullest moment of a step")
    _mark(fig, rows[0].total / size, surface)
    return fig


def speed(rows: Sequence[Speed], *, mode: theme.Mode = "light") -> go.Figure:
    """Milliseconds of a step with their spread, the first thick and the others ghosts; none where nothing is known.

    Args:
        rows: the settings first, as in `memory`.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    places, widths, opacities = _places(len(rows)), _widths(len(rows)), _opacities(len(rows))
    known = [index for index, row in enumerate(rows) if row.median is not None]
    fig = go.Figure()
    fig.add_bar(
        name="median and spread",
        orientation="h",
        x=[rows[index].median for index in known],
        y=[places[index] for index in known],
        width=[widths[index] for index in known],
        marker={"color": colours[0], "opacity": [opacities[index] for index in known]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [rows[index].high - rows[index].median for index in known],
            "arrayminus": [rows[index].median - rows[index].low for index in known],
            "color": surface.ink,
            "thickness": 1.5,
            "width": 4,
        },
        customdata=[[rows[index].label, _span(rows[index])] for index in known],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        showlegend=bool(known),
    )
    ends = [
        (0.0, "not measured") if row.median is None else (row.high, f"{digits(row.median)}\u00a0ms") for row in rows
    ]
    _lay_out(fig, [row.label for row in rows], ends, surface, title="ms a step")
    if rows[0].median is not None:
        _mark(fig, rows[0].median, surface)
    fig.update_xaxes(visible=bool(known))
    return fig


def _span(row: Speed) -> str:
    return f"{digits(row.median)} ms; {row.ends} {digits(row.low)} to {digits(row.high)}"


def digits(milliseconds: float) -> str:
    """A time to three digits, e.g. ``"1,366"``."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _places(count: int) -> list[float]:
    return [0.0, *(_SECOND + index for index in range(count - 1))]


def _widths(count: int) -> list[float]:
    return [_THICK, *[_THIN] * (count - 1)]


def _opacities(count: int) -> list[float]:
    return [1.0, *[_GHOST] * (count - 1)]


def _mark(fig: go.Figure, x: float, surface: theme.Surface) -> None:
    """A dotted line down from the end of the thick bar."""
    fig.add_shape(
        type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line={"color": surface.muted, "width": 1, "dash": "dot"}
    )


def _lay_out(
    fig: go.Figure, labels: Sequence[str], ends: Sequence[tuple[float, str]], surface: theme.Surface, *, title: str
) -> None:
    places, widths = _places(len(labels)), _widths(len(labels))
    text: dict[str, Any] = {"showarrow": False, "font": {"size": 13, "color": surface.ink}, "bgcolor": surface.paper}
    text |= {"xanchor": "left", "borderpad": 0}
    names = [
        {
            "text": label if number else f"<b>{label}</b>",
            "x": 0,
            "y": place - width / 2,
            "yanchor": "bottom",
            "xshift": -3,
            **text,
        }
        for number, (label, place, width) in enumerate(zip(labels, places, widths, strict=True))
    ]
    amounts = [
        {"text": said, "x": end, "y": place, "xshift": 6, **text}
        for (end, said), place in zip(ends, places, strict=True)
    ]
    most = max((end for end, _ in ends), default=0.0) or 1.0
    fig.update_layout(
        barmode="stack",
        annotations=names + amounts,
        height=height(len(labels)),
        legend={
            "orientation": "h",
            "x": 0,
            "y": -48 / (_ROW_PIXELS * (len(labels) + 1)),
            "yanchor": "top",
            "traceorder": "normal",
        },
        margin={"l": 10, "r": 16, "t": _ABOVE_PIXELS, "b": _BELOW_PIXELS},
        dragmode=False,
    )
    fig.update_xaxes(range=[0, 1.3 * most], title={"text": title, "standoff": 4}, nticks=6, fixedrange=True)
    fig.update_yaxes(visible=False, range=[places[-1] + 0.4, -0.85], fixedrange=True)
