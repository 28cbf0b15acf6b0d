"""Pictures of quantized weights: numbers in, Plotly figure out. Nothing here knows of Streamlit or of a model.

The original is grey, what stands for it blue; errors are orange below zero and blue above.

Legend: K bins, S weights of a block, L levels, G groups of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ui import theme

_NICE = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # shares that an axis is marked with
_ROOM = 1.12  # above the highest bar, for its label
_FEW = 40  # levels that are lines of their own; more of them are a shade
_FRAME = theme.CATEGORIES["light"][1]


def histograms(
    edges: np.ndarray,
    original: np.ndarray,
    dequantized: np.ndarray,
    levels: np.ndarray,
    *,
    whose_levels: str,
    span: tuple[float, float] | None = None,
    top: float | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """The weights above the line and what stands for them below it, on one scale, with the levels as ticks on the line.

    Heights go with the square root of the share, so that few far weights are seen beside many that are near 0.

    Args:
        edges: (K + 1,) of the bins.
        original, dequantized: (K,) counts.
        levels: (L,) that a weight can take.
        whose_levels: the legend's name for them.
        span: ends of what the horizontal axis has room for, so that two pictures can be compared; by default those of
            the bins and of the levels.
        top: share of the weights that the vertical axis shows, likewise.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    total = max(1, int(original.sum()))
    top = math.sqrt(top or max(original.max(initial=0), dequantized.max(initial=0), 1) / total)
    fig = go.Figure()
    for name, counts, sign, colour in (
        ("original", original, 1, surface.muted),
        ("dequantized", dequantized, -1, colours[0]),
    ):
        fig.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=sign * np.sqrt(counts / total),
            width=np.diff(edges),
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            customdata=np.stack([edges[:-1], edges[1:], counts / total], axis=1),
            hovertemplate=f"{name}, %{{customdata[0]:.3g}} to %{{customdata[1]:.3g}}: %{{customdata[2]:.2%}}"
            "<extra></extra>",
        )
    fig.add_scatter(
        x=levels,
        y=np.zeros(len(levels)),
        name=whose_levels,
        mode="markers",
        marker={
            "symbol": "line-ns",
            "size": 14 if len(levels) <= _FEW else 7,
            "color": colours[1],
            "line": {"color": colours[1], "width": 2.5 if len(levels) <= _FEW else 0.5},
        },
        hovertemplate="level %{x:.4g}<extra></extra>",
        cliponaxis=False,
    )
    marks = _marks(top**2)
    heights = [-math.sqrt(mark) for mark in marks[::-1]] + [0] + [math.sqrt(mark) for mark in marks]
    fig.update_layout(
        barmode="overlay",
        bargap=0,
        margin={"l": 64, "r": 14, "t": 44, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
    )
    low, high = span or span_of(edges, levels)
    room = 0.02 * (high - low)
    fig.update_xaxes(title="weight", range=[low - room, high + room], zeroline=False, nticks=8)
    fig.update_yaxes(
        title="share of the weights, square-root scale",
        range=[-_ROOM * top, _ROOM * top],
        tickvals=heights,
        ticktext=[f"{100 * mark:g}%" for mark in [*marks[::-1], 0, *marks]],
        zerolinecolor=surface.ink,
    )
    return fig


def span_of(edges: np.ndarray, levels: np.ndarray) -> tuple[float, float]:
    """Ends of an axis that holds all bins, (K + 1,) edges, and all levels, (L,)."""
    return float(min(edges[0], levels.min(initial=np.inf))), float(max(edges[-1], levels.max(initial=-np.inf)))


def errors(
    edges: np.ndarray,
    counts: np.ndarray,
    rms: float,
    *,
    span: tuple[float, float] | None = None,
    top: float | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """How often a weight is wrong by how much.

    Args:
        edges: (K + 1,) of the bins, of dequantized minus original.
        counts: (K,).
        rms: root mean square of the errors, which is marked on either side.
        span: ends of the horizontal axis, so that two pictures can be compared; by default those of the bins.
        top: share of the weights that the vertical axis shows, likewise.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    middle = (edges[:-1] + edges[1:]) / 2
    shares = counts / max(1, int(counts.sum()))
    fig = go.Figure(
        go.Bar(
            x=middle,
            y=shares,
            width=np.diff(edges),
            marker={"color": _by_sign(middle, mode), "line": {"width": 0}},
            customdata=np.stack([edges[:-1], edges[1:]], axis=1),
            hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:.2%}<extra></extra>",
        )
    )
    for side in (-rms, rms) if rms > 0 else ():
        fig.add_vline(side, line={"color": surface.muted, "width": 1.5, "dash": "dot"})
    if rms > 0:
        fig.add_annotation(
            text=f"typical error ±{rms:.2g}",
            x=rms,
            y=1,
            yref="paper",
            xanchor="center",
            yanchor="bottom",
            showarrow=False,
            font={"size": 12, "color": surface.muted},
        )
    fig.update_layout(margin={"l": 60, "r": 14, "t": 44, "b": 50}, showlegend=False, bargap=0, dragmode=False)
    fig.update_xaxes(title="error: dequantized − original", range=span or [float(edges[0]), float(edges[-1])], nticks=6)
    highest = _ROOM * (top or shares.max(initial=0) or 1)
    fig.update_yaxes(title="share of the weights", tickformat=".2~p", range=[0, highest], nticks=5)
    return fig


def block(
    places: np.ndarray,
    original: np.ndarray,
    dequantized: np.ndarray,
    levels: np.ndarray,
    *,
    reach: float | None = None,
    most: float | None = None,
    noun: str = "block",
    mode: theme.Mode = "light",
) -> go.Figure:
    """The weights along one block on the lines of its levels, and below them by how much each is wrong.

    Args:
        places: (S,) of the weights in the block, in steps of one.
        original, dequantized: (S,).
        levels: (L,) of this block.
        reach: the largest weight or level that the axis has room for, so that two pictures can be compared; by default
            what these need.
        most: likewise the largest error.
        noun: what shares the scale.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    error = dequantized - original
    ends = [float(places[0]) - 1, float(places[-1]) + 1]
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.64, 0.36])
    fig.add_scatter(
        x=np.tile([*ends, np.nan], len(levels)),
        y=np.repeat(levels, 3),
        mode="lines",
        name="levels",
        line={"color": colours[1], "width": 1 if len(levels) <= _FEW else 0.5},
        opacity=0.75 if len(levels) <= _FEW else 0.3,
        hoverinfo="skip",
        row=1,
        col=1,
    )
    size = 7 if len(places) <= 128 else 4
    shared = {"x": places, "mode": "markers", "row": 1, "col": 1}
    fig.add_scatter(
        y=dequantized,
        name="dequantized",
        marker={"size": size, "color": colours[0]},
        customdata=np.stack([original, error], axis=1),
        hovertemplate="weight %{x}: %{customdata[0]:.4g} became %{y:.4g}, error %{customdata[1]:+.3g}<extra></extra>",
        **shared,
    )
    fig.add_scatter(
        y=original,
        name="original",
        marker={"size": size + 2, "symbol": "circle-open", "color": surface.ink, "line": {"width": 1.3}},
        hoverinfo="skip",
        **shared,
    )
    fig.add_bar(
        x=places,
        y=error,
        width=0.7,
        marker={"color": _by_sign(error, mode), "line": {"width": 0}},
        hovertemplate="weight %{x}: error %{y:+.3g}<extra></extra>",
        showlegend=False,
        row=2,
        col=1,
    )
    largest = int(np.abs(original).argmax())
    reach = 1.15 * max(reach or max(np.abs(levels).max(initial=0), np.abs(original).max()), 1e-30)
    right = largest > 0.6 * len(places)
    fig.add_annotation(
        text=f"largest weight, {original[largest]:.3g}".replace("-", "−"),
        x=float(places[largest]),
        y=float(original[largest]),
        xanchor="right" if right else "left",
        xshift=-8 if right else 8,
        yanchor="bottom" if original[largest] > 0 else "top",
        showarrow=False,
        bgcolor=surface.paper,
        opacity=0.9,
        font={"size": 12, "color": surface.ink},
    )
    fig.update_layout(
        margin={"l": 66, "r": 14, "t": 44, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
    )
    fig.update_xaxes(range=ends, showgrid=False, zeroline=False)
    fig.update_xaxes(title=f"place in the {noun}", tickformat=",", nticks=9, row=2)
    fig.update_yaxes(title="weight", range=[-reach, reach], showgrid=False, row=1)
    most = 1.15 * max(most or float(np.abs(error).max()), 1e-30)
    fig.update_yaxes(title="error", range=[-most, most], nticks=6, row=2)
    return fig


def block_errors(
    values: np.ndarray, edges: np.ndarray, chosen: int | None, *, noun: str = "block", mode: theme.Mode = "light"
) -> go.Figure:
    """The error of every block as a strip, or of groups of neighbours where there are too many to see.

    Args:
        values: (G,) root mean square error of each group's worst block.
        edges: (G + 1,): group g holds the blocks from edges[g] up to, not with, edges[g + 1].
        chosen: number of the block that is looked at, whose group is framed; None if there is none.
        noun: what a block is called.
        mode: light or dark.
    """
    groups = len(values)
    step = max(1, round(groups / 8))
    fig = go.Figure(
        go.Heatmap(
            z=values[None],
            zmin=0,
            colorscale=theme.MAGNITUDE,
            showscale=False,
            customdata=[[_span(first, end - 1, noun) for first, end in pairwise(edges.tolist())]],
            hovertemplate="%{customdata}<br>typical error %{z:.3g}<extra></extra>",
        )
    )
    fig.update_layout(margin={"l": 14, "r": 14, "t": 8, "b": 46}, dragmode=False, height=110)
    fig.update_xaxes(
        title={"text": f"{noun} (bright: large error)", "standoff": 4},
        tickvals=list(range(0, groups, step)),
        ticktext=[f"{edges[index]:,}" for index in range(0, groups, step)],
        range=[-0.5, groups - 0.5],
        showgrid=False,
        zeroline=False,
    )
    fig.update_yaxes(visible=False, fixedrange=True)
    if chosen is not None:
        half = max(0.5, groups / 300)
        place = int(np.searchsorted(edges, chosen, side="right")) - 1
        line = {"color": _FRAME, "width": 3}
        fig.add_shape(type="rect", x0=place - half, x1=place + half, y0=-0.5, y1=0.5, line=line)
    return fig


def window(weights: np.ndarray, most: int) -> slice:
    """At most so many neighbours of `weights`, (S,), with the largest of them as near to the middle as it can be."""
    middle = int(np.abs(weights).argmax())
    start = min(max(0, middle - most // 2), max(0, len(weights) - most))
    return slice(start, min(len(weights), start + most))


def _span(first: int, last: int, noun: str) -> str:
    return f"{noun} {first:,}" if last <= first else f"{noun}s {first:,} to {last:,}"


def _by_sign(values: Sequence[float] | np.ndarray, mode: theme.Mode) -> np.ndarray:
    """A colour for each value: orange below 0, blue above, as on the scale of signed values."""
    colours = theme.signed(mode)
    return np.where(np.asarray(values) < 0, colours[1][1], colours[-2][1])


def _marks(top: float) -> list[float]:
    """Two or three shares up to `top` that are far enough apart where heights go with the square root."""
    marks: list[float] = []
    for nice in _NICE:
        if nice <= top and (not marks or nice <= marks[-1] / 4) and nice >= top / 40:
            marks.append(nice)
    return marks[::-1]
