"""The errors of every backend, as the outlines of their histograms. Legend: E edges of bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import plotly.graph_objects as go

from ui import theme
from ui.charts.flash import TEXT, decades, legend_entry, look

_SEEN = 0.002  # of the outputs: smaller shares do not widen the axis


@dataclass(frozen=True)
class Errors:
    """How far the outputs of a backend are from the true ones.

    Args:
        backend, label: its name in the registry, and in words.
        shares: (E - 1,) share of the outputs in each bin.
        rms: root of the mean squared error, relative to the outputs' own.
    """

    backend: str
    label: str
    shares: Sequence[float]
    rms: float


def errors(
    edges: Sequence[float], backends: Sequence[Errors], bound: float | None = None, *, mode: theme.Mode = "light"
) -> go.Figure:
    """The outputs of every backend sorted by their error, as outlines, and the rms error of each on top.

    Args:
        edges: (E,) log10 of the error relative to the outputs' rms.
        backends: one outline each.
        bound: the largest rms error that counts as correct; None for none.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    fig = go.Figure()
    middles = [10 ** ((low + high) / 2) for low, high in pairwise(edges)]
    top = max([0.01, *(share for one in backends for share in one.shares)])
    for place, one in enumerate(backends):
        colour, symbol = look(one.backend, mode)
        fig.add_scatter(
            x=middles,
            y=[100 * share for share in one.shares],
            name=one.label,
            mode="lines",
            line={"color": colour, "width": 2, "shape": "hvh", "dash": ("solid", "dot", "dash")[place % 3]},
            legendgroup=one.backend,
            showlegend=False,
            hovertemplate=one.label + "<br>%{y:.1f}% of the outputs err by about %{x:.1e}<extra></extra>",
        )
        if one.rms > 0:
            fig.add_scatter(
                x=[one.rms],
                y=[100 * top * (1.12 + 0.07 * place)],
                name=one.label,
                mode="markers",
                marker={"symbol": symbol, "size": 12, "color": colour, "line": {"width": 2 * symbol.endswith("-open")}},
                legendgroup=one.backend,
                hovertemplate=f"{one.label}<br>rms error {one.rms:.2e} of the outputs' rms<extra></extra>",
            )
        else:
            fig.add_trace(
                legend_entry(f"{one.label}: no error at all", {"marker": {"color": colour, "symbol": symbol}})
            )
    if bound:
        fig.add_vline(bound, line={"color": surface.ink, "width": 1.5, "dash": "dash"})
        fig.add_annotation(
            text="twice standard's",
            x=math.log10(bound),
            y=1,
            yref="paper",
            xanchor="left",
            yanchor="top",
            xshift=5,
            bgcolor=surface.paper,
            **TEXT,
        )
    seen = [x for one in backends for x, share in zip(middles, one.shares, strict=True) if share >= _SEEN]
    low, high = min([*seen, *([bound] if bound else [])], default=1e-8), max([*seen, bound or 0], default=1.0) or 1.0
    fig.update_xaxes(
        type="log",
        title={"text": "error of an output, relative to the outputs' rms", "standoff": 4},
        range=[math.log10(low / 1.6), math.log10(max(high, low) * 8)],
        **decades(low / 1.6, high * 8),
        fixedrange=True,
    )
    fig.update_yaxes(title="% of all outputs", range=[0, 100 * top * (1.2 + 0.07 * len(backends))], fixedrange=True)
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        margin={"l": 60, "r": 14, "t": 12, "b": 130},
        hovermode="closest",
        dragmode=False,
        showlegend=True,
    )
    return fig
