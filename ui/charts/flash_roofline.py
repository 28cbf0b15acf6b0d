"""The roofline of a device, with the measured runs of every backend below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ui import theme
from ui.charts.flash import TEXT, decades, look, short

_REACH = (0.5, 300.0)
"""FLOP a byte that the axis of `intensity` shows at least, so that one sees a path move and not the axis."""


@dataclass(frozen=True)
class Spot:
    """A measured run in the roofline.

    Args:
        backend, label: its name in the registry, and in words.
        length: tokens.
        intensity: FLOP a byte that comes from or goes to memory.
        flops: FLOP a second.
        hover: what is said of it.
    """

    backend: str
    label: str
    length: int
    intensity: float
    flops: float
    hover: str


@dataclass(frozen=True)
class Track:
    """How the computed intensity of an algorithm moves with the length.

    Args:
        backend, label: whose look it has, and what it is called.
        lengths: tokens, the shortest first.
        intensity: FLOP a byte at each of them.
    """

    backend: str
    label: str
    lengths: Sequence[int]
    intensity: Sequence[float]


def roofline(spots: Sequence[Spot], flops: float, bandwidth: float, *, mode: theme.Mode = "light") -> go.Figure:
    """What a device can do at most at every arithmetic intensity, and what was measured below it.

    Args:
        spots: those of a backend together, shortest sequence first.
        flops: FLOP/s of a large product, measured.
        bandwidth: bytes/s of a large copy, measured.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    ridge = flops / bandwidth
    at = [spot.intensity for spot in spots]
    left, right = min([*at, ridge]) / 5, max([*at, ridge]) * 4
    size, unit = _rate(flops)
    across = np.geomspace(left, right, 200)
    across = np.unique(np.append(across, ridge))
    roof = np.minimum(across * bandwidth, flops) / size
    fig = go.Figure(
        go.Scatter(
            x=across,
            y=roof,
            mode="lines",
            name="roof: all that this device can do",
            line={"color": surface.ink, "width": 2.5},
            hovertemplate="at most %{y:.3g} " + unit + " at %{x:.3g} FLOP a byte<extra></extra>",
        )
    )
    named = _named(spots)
    for backend in dict.fromkeys(spot.backend for spot in spots):
        members = [spot for spot in spots if spot.backend == backend]
        colour, symbol = look(backend, mode)
        fig.add_scatter(
            x=[spot.intensity for spot in members],
            y=[spot.flops / size for spot in members],
            name=members[0].label,
            mode="lines+markers+text",
            line={"color": colour, "width": 1.5},
            marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2 * symbol.endswith("-open")}},
            text=[f"T={short(spot.length)}" if spot in named else "" for spot in members],
            textposition="top center",
            textfont={"size": 12, "color": colour},
            customdata=[spot.hover for spot in members],
            hovertemplate="%{customdata}<extra></extra>",
        )
    lowest = min([*(spot.flops / size for spot in spots), float(roof.min())])
    highest = max([flops / size, *(spot.flops / size for spot in spots)])
    fig.add_vline(ridge, line={"color": surface.muted, "dash": "dot"})
    for text, x, anchor, shift in (
        ("memory is the limit", ridge, "right", -8),
        ("arithmetic is the limit", ridge, "left", 8),
    ):
        fig.add_annotation(
            text=text,
            x=math.log10(x),
            y=0,
            yref="paper",
            xanchor=anchor,
            yanchor="bottom",
            xshift=shift,
            **TEXT,
            bgcolor=surface.paper,
        )
    fig.update_xaxes(
        type="log",
        title={"text": "intensity, FLOP for each byte moved", "standoff": 4},
        range=[math.log10(left), math.log10(right)],
        **decades(left, right),
        fixedrange=True,
    )
    fig.update_yaxes(
        type="log",
        title=unit,
        range=[math.log10(lowest / 3), math.log10(2 * highest)],
        **decades(lowest / 3, 2 * highest),
        fixedrange=True,
    )
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        margin={"l": 66, "r": 14, "t": 14, "b": 54},
        hovermode="closest",
        dragmode=False,
    )
    return fig


def intensity(tracks: Sequence[Track], *, mode: theme.Mode = "light") -> go.Figure:
    """Where arithmetic alone puts each algorithm on the roofline's axis, length by length, one row each.

    Args:
        tracks: from top to bottom.
        mode: light or dark.
    """
    fig = go.Figure()
    for row, track in enumerate(tracks):
        colour, symbol = look(track.backend, mode)
        names = [f"T={short(length)}" for length in track.lengths]
        fig.add_scatter(
            x=list(track.intensity),
            y=[row] * len(names),
            name=track.label,
            mode="lines+markers+text",
            line={"color": colour, "width": 1.5, "dash": "dash"},
            marker={"symbol": symbol, "size": 11, "color": colour},
            text=[names[0], *[""] * (len(names) - 2), names[-1]],
            textposition=["middle left", *["middle center"] * (len(names) - 2), "middle right"],
            textfont={"size": 12, "color": colour},
            customdata=names,
            hovertemplate=track.label + ", %{customdata}: %{x:.3g} FLOP a byte<extra></extra>",
        )
    drawn = [value for track in tracks for value in track.intensity]
    low, high = min(_REACH[0], min(drawn) / 3), max(_REACH[1], max(drawn) * 3)
    fig.update_xaxes(
        type="log",
        title={"text": "intensity, FLOP for each byte moved", "standoff": 4},
        range=[math.log10(low), math.log10(high)],
        **decades(low, high),
        fixedrange=True,
    )
    fig.update_yaxes(visible=False, range=[len(tracks) - 0.4, -0.6], fixedrange=True)
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        margin={"l": 66, "r": 14, "t": 10, "b": 50},
        hovermode="closest",
        dragmode=False,
        showlegend=True,
    )
    return fig


def _named(spots: Sequence[Spot]) -> list[Spot]:
    """Of the first and the last length of every backend the highest spot: those of one model stand above each other."""
    ends = [spot for spot in spots if spot.length in _ends(spots, spot.backend)]
    highest: dict[tuple[int, float], Spot] = {}
    for spot in sorted(ends, key=lambda spot: spot.flops):
        highest[spot.length, spot.intensity] = spot
    return list(highest.values())


def _ends(spots: Sequence[Spot], backend: str) -> set[int]:
    lengths = [spot.length for spot in spots if spot.backend == backend]
    return {min(lengths), max(lengths)}


def _rate(flops: float) -> tuple[float, str]:
    """FLOP/s of the unit that a rate is told in, and the unit's name."""
    return (1e12, "TFLOP/s") if flops >= 1e12 else (1e9, "GFLOP/s")
