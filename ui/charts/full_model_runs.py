"""Pictures of runs of the whole model: numbers in, Plotly figure out.

Legend: N mixtures, E experts, P points of a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ui import theme
from ui.charts.memory import unit_of

_LEFT = 148  # pixels for the rows' names
_ROW = 34  # pixels of a row
_TEXT = {"size": 12}
_ROOM = 1.45  # of the longest bar, so that its label fits behind it
_TICKS = ((0.8, "D1"), (1.6, "D2"), (math.inf, 1))  # of a logarithmic axis: up to so many decades, Plotly's dtick
_MARKERS = (("circle", "●"), ("square", "■"), ("diamond", "◆"))  # of a line, and of its name
_APART = 0.075  # of the axis: labels of lines are at least so far from each other


@dataclass(frozen=True)
class Row:
    """One row of the ablation.

    Args:
        name: of it.
        model_bytes: of the weights as they are stored.
        peak_bytes: of a step, the weights among them; 0 if none was weighed.
        speed, low, high: tokens a second by the median step, by a slow one and by a fast one; NaN if none was timed.
    """

    name: str
    model_bytes: int
    peak_bytes: int
    speed: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """Points of one length.

    Args:
        name: stands at its end.
        batches: (P,).
        values, low, high: (P,), median, 10th and 90th percentile.
    """

    name: str
    batches: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def height(rows: int) -> int:
    """Pixels of `ablation` with so many rows."""
    return 118 + _ROW * rows


def ablation(rows: Sequence[Row], total: int, *, mode: theme.Mode = "light") -> go.Figure:
    """A memory bar and a speed bar for each row, in the same order from top to bottom; "diverged" where one is missing.

    Args:
        rows: that are there.
        total: rows that there will be: places of those to come are left free.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    weighed = [row for row in rows if row.peak_bytes]
    timed = [row for row in rows if not math.isnan(row.speed)]
    places = [*(row.name for row in rows), *(" " * place for place in range(1, total - len(rows) + 1))]
    most = max((row.peak_bytes for row in weighed), default=10**6)
    size, unit = unit_of(most)
    fig = go.Figure()
    for name, values, colour, what in (
        ("weights", [row.model_bytes / size for row in weighed], colours[1], "weights"),
        (
            "the rest of a step",
            [max(0, row.peak_bytes - row.model_bytes) / size for row in weighed],
            colours[0],
            "gradients, AdamW's means, activations",
        ),
    ):
        fig.add_bar(
            y=[row.name for row in weighed],
            x=values,
            name=name,
            orientation="h",
            marker={"color": colour},
            hovertemplate=f"%{{y}}: {what} %{{x:.3g}} {unit}<extra></extra>",
        )
    fig.add_bar(
        y=[row.name for row in timed],
        x=[row.speed for row in timed],
        name="tokens/s",
        orientation="h",
        marker={"color": colours[2]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.high - row.speed for row in timed],
            "arrayminus": [row.speed - row.low for row in timed],
            "color": surface.muted,
            "thickness": 1.5,
            "width": 3,
        },
        customdata=[[row.low, row.high] for row in timed],
        hovertemplate="%{y}: %{x:,.0f} tokens/s (%{customdata[0]:,.0f} to %{customdata[1]:,.0f})<extra></extra>",
        xaxis="x2",
        showlegend=False,
    )
    for row in rows:
        peak, speed = (row.peak_bytes / size, f"{row.peak_bytes / size:.3g}"), (row.high, _short(row.speed))
        for axis, there, (end, text) in (("x", row in weighed, peak), ("x2", row in timed, speed)):
            fig.add_annotation(
                x=end if there else 0, text=text if there else "diverged", xref=axis, **_label(row, surface)
            )
    fastest = max((row.high for row in timed), default=1.0)
    across = {"fixedrange": True, "nticks": 3, "zeroline": False}
    return fig.update_layout(
        barmode="stack",
        bargap=0.35,
        margin={"l": _LEFT, "r": 8, "t": 60, "b": 52},
        dragmode=False,
        legend={"orientation": "h", "x": 0, "xref": "paper", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"domain": [0, 0.48], "range": [0, _ROOM * most / size], "title": f"{unit} a step", **across},
        xaxis2={"domain": [0.52, 1], "range": [0, _ROOM * fastest], "title": "tokens/s", "anchor": "y",
                "tickformat": "~s", **across},
        yaxis={"categoryorder": "array", "categoryarray": places[::-1], "range": [-0.5, total - 0.5],
               "showgrid": False, "fixedrange": True, "ticklabelstandoff": 6},
    )  # fmt: skip


def _label(row: Row, surface: theme.Surface) -> dict[str, object]:
    """A number behind a bar."""
    return {
        "y": row.name,
        "xanchor": "left",
        "xshift": 4,
        "showarrow": False,
        "font": _TEXT | {"color": surface.ink},
    }


def _short(speed: float) -> str:
    """Tokens a second in three digits, e.g. ``"14.9 k"``."""
    return f"{speed / 1000:.3g} k" if speed >= 1000 else f"{speed:.3g}"


def throughput(
    latency: Sequence[Line], speed: Sequence[Line], batches: Sequence[int], waits: str, *, mode: theme.Mode = "light"
) -> go.Figure:
    """Latency above, tokens a second below, over the batch; a line for every length, named at its end.

    Args:
        latency: in milliseconds.
        speed: in tokens a second of the whole batch.
        batches: those that there are to be, for the axis.
        waits: for what one waits, in words.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure()
    for axis, lines, unit in (("y", latency, "ms"), ("y2", speed, "tokens/s")):
        for index, line in enumerate(lines):
            colour, symbol = colours[index % len(colours)], _MARKERS[index % len(_MARKERS)][0]
            fig.add_scatter(
                x=list(line.batches),
                y=list(line.values),
                yaxis=axis,
                name=line.name,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 8, "symbol": symbol},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - value for high, value in zip(line.high, line.values, strict=True)],
                    "arrayminus": [value - low for low, value in zip(line.low, line.values, strict=True)],
                    "color": colour,
                    "thickness": 1,
                    "width": 3,
                },
                hovertemplate=f"{line.name}, batch %{{x}}: %{{y:.3g}} {unit}<extra></extra>",
            )
        low, high = _reach(lines)
        for index, (line, place) in enumerate(zip(lines, _spread(lines, low, high), strict=True)):
            colour, glyph = colours[index % len(colours)], _MARKERS[index % len(_MARKERS)][1]
            fig.add_annotation(
                x=math.log10(line.batches[-1]),
                y=place,
                yref=axis,
                text=f'<span style="color:{colour}">{glyph}</span> {line.name}',
                xanchor="left",
                xshift=10,
                showarrow=False,
                font=_TEXT | {"color": surface.ink},
            )
        top = axis == "y"
        fig.update_layout(
            {
                f"yaxis{axis[1:]}": {
                    "type": "log",
                    "range": [low, high],
                    "domain": [0.56, 1] if top else [0, 0.44],
                    "title": f"{waits}, ms" if top else "all texts, tokens/s",
                    "dtick": next(step for reach, step in _TICKS if high - low < reach),
                    "tickformat": "~s" if not top else "~g",
                    "fixedrange": True,
                }
            }
        )
    reach = math.log10(max(batches)) + 0.02
    return fig.update_layout(
        margin={"l": 66, "r": 92, "t": 16, "b": 48},
        showlegend=False,
        dragmode=False,
        xaxis={
            "type": "log",
            "title": "batch: texts at once",
            "range": [-0.06, reach + 0.04],
            "tickvals": list(batches),
            "ticktext": [str(batch) for batch in batches],
            "anchor": "y2",
            "fixedrange": True,
        },
    )


def _reach(lines: Sequence[Line]) -> tuple[float, float]:
    """Ends of a logarithmic axis, with some room."""
    lowest = min((min(line.low) for line in lines), default=1.0)
    highest = max((max(line.high) for line in lines), default=10.0)
    low, high = math.log10(max(lowest, 1e-9)), math.log10(max(highest, 1e-9))
    room = max(0.08, 0.06 * (high - low))
    return low - room, high + room


def _spread(lines: Sequence[Line], low: float, high: float) -> list[float]:
    """Where the lines' names stand: at their last points, but not on top of each other."""
    gap, last = _APART * (high - low) * 2, -math.inf
    places = [math.log10(line.values[-1]) for line in lines]
    order = sorted(range(len(lines)), key=places.__getitem__)
    for index in order:
        places[index] = last = max(places[index], last + gap)
    over = max([0.0, *(place - (high - gap / 2) for place in places)])
    return [place - over for place in places]


def loads(load: np.ndarray, mixtures: Sequence[str], *, mode: theme.Mode = "light") -> go.Figure:
    """How many times its fair share each expert of each mixture gets: 1 is the page itself, what has too few tokens
    is orange, what has too many blue.

    Args:
        load: (N, E), rows have the mean 1.
        mixtures: N names.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    most = max(0.1, float(np.abs(load - 1).max(initial=0.0)))
    few = load.shape[0] <= 12 and load.shape[1] <= 8
    fig = go.Figure(
        go.Heatmap(
            z=load,
            x=[str(expert) for expert in range(load.shape[1])],
            y=list(mixtures),
            zmid=1,
            zmin=1 - most,
            zmax=1 + most,
            colorscale=theme.signed(mode),
            colorbar={"title": {"text": "× fair share", "side": "top"}, "orientation": "h", "y": 1.02,
                      "yanchor": "bottom", "thickness": 12, "len": 0.9, "x": 0.5, "outlinewidth": 0, "nticks": 5},
            xgap=2,
            ygap=2,
            hovertemplate="%{y}, expert %{x}: %{z:.2f} times its fair share<extra></extra>",
        )
    )  # fmt: skip
    if few:
        strong = 0.62 * most
        for row, values in enumerate(load):
            for column, value in enumerate(values):
                dark = (abs(value - 1) > strong) == (mode == "light")
                fig.add_annotation(
                    x=column,
                    y=row,
                    text=f"{value:.2f}",
                    showarrow=False,
                    font=_TEXT | {"color": "#FFFFFF" if dark else "#10191F" if mode == "light" else surface.paper},
                )
    fig.add_annotation(  # Plotly puts an axis' own title onto its ticks here
        x=0.5, xref="paper", y=0, yref="paper", yanchor="top", yshift=-26, text="expert", showarrow=False
    )
    fig.update_xaxes(type="category", showgrid=False, zeroline=False, fixedrange=True)
    fig.update_yaxes(
        type="category", autorange="reversed", showgrid=False, zeroline=False, fixedrange=True, ticklabelstandoff=4
    )
    return fig.update_layout(margin={"l": 104, "r": 10, "t": 70, "b": 56}, dragmode=False)
