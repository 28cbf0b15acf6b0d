"""The roofline of a device, with the measured runs of every backend below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ui import theme
from ui.charts.flash import TEXT, decades, look, short

_PLACES = ("bottom center", "top center", "middle right", "middle left")


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
    for place, backend in enumerate(dict.fromkeys(spot.backend for spot in spots)):
        members = [spot for spot in spots if spot.backend == backend]
        colour, symbol = look(backend, mode)
        ends = {0, len(members) - 1}
        fig.add_scatter(
            x=[spot.intensity for spot in members],
            y=[spot.flops / size for spot in members],
            name=members[0].label,
            mode="lines+markers+text",
            line={"color": colour, "width": 1.5},
            marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2 * symbol.endswith("-open")}},
            text=[f"T={short(spot.length)}" if number in ends else "" for number, spot in enumerate(members)],
            textposition=_PLACES[place % len(_PLACES)],
            textfont={"size": 12, "color": colour},
            customdata=[spot.hover for spot in members],
            hovertemplate="%{customdata}<extra></extra>",
        )
    lowest = min([*(spot.flops / size for spot in spots), float(roof.min())])
    fig.add_shape(
        type="line", x0=ridge, x1=ridge, y0=0, y1=1, yref="paper", line={"color": surface.muted, "dash": "dot"}
    )
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
        range=[math.log10(lowest / 3), math.log10(2 * flops / size)],
        **decades(lowest / 3, 2 * flops / size),
        fixedrange=True,
    )
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        margin={"l": 66, "r": 14, "t": 14, "b": 130},
        hovermode="closest",
        dragmode=False,
    )
    return fig


def _rate(flops: float) -> tuple[float, str]:
    """FLOP/s of the unit that a rate is told in, and the unit's name."""
    return (1e12, "TFLOP/s") if flops >= 1e12 else (1e9, "GFLOP/s")
