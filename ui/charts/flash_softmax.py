"""The picture of a softmax whose scores arrive in chunks. Legend: T scores, S scores seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ui import theme

_REACH = 1.25  # a limit that is so many times above the largest score is not drawn to scale
_UPPER, _LOWER = (0.56, 1.0), (0.0, 0.42)


@dataclass(frozen=True)
class Chunk:
    """A chunk of the row.

    Args:
        start, stop: its scores are those from `start` up to, not including, `stop`.
        maximum: of all scores up to its end.
    """

    start: int
    stop: int
    maximum: float


def softmax(
    scores: np.ndarray,
    chunks: Sequence[Chunk],
    online: np.ndarray,
    naive: np.ndarray,
    reference: np.ndarray,
    *,
    limit: float,
    overflowed: Sequence[int] = (),
    mode: theme.Mode = "light",
) -> go.Figure:
    """Scores with their running maximum above; below, the weights that each way makes of them.

    Args:
        scores: (T,).
        chunks: those seen so far.
        online: (S,), weights among the scores seen so far.
        naive: (T,), exp(score) / sum, which may not be finite.
        reference: (T,), in float64.
        limit: scores above it overflow.
        overflowed: places whose exponential is infinite.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    seen = chunks[-1].stop if chunks else 0
    places = np.arange(len(scores))
    number = np.full(len(scores), -1)
    for index, chunk in enumerate(chunks):
        number[chunk.start : chunk.stop] = index
    fills = [surface.line if chunk < 0 else colours[0] if chunk % 2 == 0 else colours[5] for chunk in number]
    fig = go.Figure(
        go.Bar(
            x=places,
            y=scores,
            name="score",
            marker={"color": fills},
            showlegend=False,
            customdata=["not seen yet" if chunk < 0 else f"chunk {chunk + 1}" for chunk in number],
            hovertemplate="score %{x}: %{y:.4g}<br>%{customdata}<extra></extra>",
        )
    )
    if chunks:
        fig.add_scatter(
            x=[place for chunk in chunks for place in (chunk.start - 0.5, chunk.stop - 0.5)],
            y=[chunk.maximum for chunk in chunks for _ in range(2)],
            name="running maximum m",
            mode="lines",
            line={"color": colours[1], "width": 3},
            hovertemplate="running maximum %{y:.4g}<extra></extra>",
        )
    low, high = min(0.0, float(scores.min())), max(0.0, float(scores.max()))
    if limit <= _REACH * max(high, 1e-9):
        high = max(high, limit)
        fig.add_shape(
            type="line",
            x0=0,
            x1=1,
            xref="paper",
            y0=limit,
            y1=limit,
            line={"color": surface.ink, "width": 1.5, "dash": "dash"},
        )
        fig.add_annotation(
            text=f"exp overflows above {limit:.3g}",
            x=0,
            xref="paper",
            y=limit,
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            font={"size": 13, "color": surface.ink},
            bgcolor=surface.paper,
        )
    if len(overflowed):
        fig.add_scatter(
            x=list(overflowed),
            y=scores[list(overflowed)],
            name="exp overflows here",
            mode="markers",
            marker={"symbol": "triangle-up", "size": 12, "color": colours[3]},
            hoverinfo="skip",
        )
    _weights(fig, seen, online, naive, reference, mode)
    room = 0.14 * (high - low or 1)
    fig.update_xaxes(
        range=[-0.7, len(scores) - 0.3],
        title={"text": "place in the row", "standoff": 4},
        anchor="y2",
        dtick=max(1, math.ceil(len(scores) / 16)),
        showgrid=False,
        fixedrange=True,
    )
    fig.update_layout(
        yaxis={
            "title": "score",
            "domain": _UPPER,
            "range": [low - (room if low < 0 else 0), high + room],
            "nticks": 6,
            "fixedrange": True,
        },
        yaxis2={"title": "weight", "domain": _LOWER, "range": [-0.06, 1.15 * _highest(reference)], "nticks": 5}
        | {"fixedrange": True, "gridcolor": surface.grid, "anchor": "x"},
        margin={"l": 60, "r": 10, "t": 12, "b": 130},
        legend={"orientation": "h", "x": 0, "y": -0.13, "yanchor": "top"},
        bargap=0.25,
        barmode="overlay",
        dragmode=False,
    )
    return fig


def _weights(
    fig: go.Figure, seen: int, online: np.ndarray, naive: np.ndarray, reference: np.ndarray, mode: theme.Mode
) -> None:
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    places = np.arange(len(reference))
    fig.add_bar(
        x=places,
        y=reference,
        yaxis="y2",
        name="float64, for comparison",
        marker={"color": surface.grid, "line": {"color": surface.muted, "width": 1}},
        hovertemplate="place %{x}: %{y:.4f} in float64<extra></extra>",
    )
    fig.add_scatter(
        x=places[:seen],
        y=online,
        yaxis="y2",
        name="online" if seen == len(places) else "online, among those seen",
        mode="markers",
        marker={"symbol": "diamond", "size": 10, "color": colours[0]},
        hovertemplate="place %{x}: %{y:.4f} online<extra></extra>",
    )
    lost = ~np.isfinite(naive)
    fig.add_scatter(
        x=places[~lost],
        y=naive[~lost],
        yaxis="y2",
        name="naive",
        mode="markers",
        marker={"symbol": "cross-thin-open", "size": 12, "color": colours[1], "line": {"width": 2.5}},
        showlegend=bool((~lost).any()),
        hovertemplate="place %{x}: %{y:.4f} naive<extra></extra>",
    )
    if lost.any():
        fig.add_scatter(
            x=places[lost],
            y=np.zeros(int(lost.sum())),
            yaxis="y2",
            name="naive: not a number",
            mode="markers",
            marker={"symbol": "x", "size": 12, "color": colours[1]},
            hovertemplate="place %{x}: naive gives no number<extra></extra>",
        )


def _highest(reference: np.ndarray) -> float:
    return max(0.05, float(reference.max()))
