"""Pictures of what bits buy: signal to noise of every data type, and the perplexity of a model, over bits per weight.

Legend: P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ui import theme

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")
_DASHES = ("solid", "dash")
_STEPS = ((1,), (1, 3), (1, 2, 5), range(1, 10), np.arange(1, 10, 0.5), np.arange(1, 10, 0.25))
_LETTER = 7  # pixels of a label's letter, about
_RIGHT = 6.5  # bits: from there on the right end of the axis is near
_FLAT = 1.6  # times the lowest perplexity: an axis that shows less than this would make noise look like a cliff


@dataclass(frozen=True)
class RatePoint:
    """What one data type makes of the weights.

    Args:
        name: of the data type, in words.
        family: points of one family are joined by a line.
        bits_per_weight: scales included.
        sqnr_db: signal to noise, in dB.
        label: is written beside the point; empty for none.
    """

    name: str
    family: str
    bits_per_weight: float
    sqnr_db: float
    label: str = ""


@dataclass(frozen=True)
class PerplexityPoint:
    """What a model is worth after quantization.

    Args:
        method: e.g. ``"GPTQ"``; has a colour.
        data_type: e.g. ``"Integer"``; has a line's dashes.
        bits: of a code.
        bits_per_weight: scales included.
        perplexity: e to the mean loss in nats a token.
    """

    method: str
    data_type: str
    bits: int
    bits_per_weight: float
    perplexity: float


def rates(
    points: Sequence[RatePoint],
    current: RatePoint | None,
    bound: tuple[Sequence[float], Sequence[float]],
    *,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Bits per weight against signal to noise: a line for each family, below the bound for Gaussian weights.

    Args:
        points: those of one family together, in the order of their bits.
        current: the one that the controls have chosen, to be ringed.
        bound: bits per weight and dB of the best that any code can do on Gaussian weights.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    across, up = bound
    fig = go.Figure(
        go.Scatter(
            x=across,
            y=up,
            mode="lines",
            name="bound for Gaussian weights",
            line={"color": surface.muted, "width": 2, "dash": "dash"},
            hovertemplate="at most %{y:.1f} dB in %{x:.2f} bits<extra></extra>",
        )
    )
    for index, (family, grouped) in enumerate(groupby(points, key=lambda point: point.family)):
        members = list(grouped)
        labelled = any(point.label for point in members)
        fig.add_scatter(
            x=[point.bits_per_weight for point in members],
            y=[point.sqnr_db for point in members],
            name=family,
            mode="markers+text" if labelled else "lines+markers",
            line={"color": colours[index], "width": 2},
            marker={
                "size": 14 if labelled else 9,
                "color": colours[index],
                "symbol": _SYMBOLS[index % len(_SYMBOLS)] + ("-open" if labelled else ""),
                "line": {"width": 2.5 if labelled else 0},
            },
            zorder=int(labelled),  # hollow and in front, so that it and a point of a line at its place are both seen
            text=[f"\u00a0\u00a0{point.label}" for point in members] if labelled else None,
            textposition=_beside([point.bits_per_weight for point in members], [point.sqnr_db for point in members]),
            textfont={"size": 12, "color": surface.ink},
            cliponaxis=False,
            customdata=[point.name for point in members],
            hovertemplate="%{customdata}<br>%{x:.3g} bits per weight<br>%{y:.1f} dB<extra></extra>",
        )
    if current is not None:
        fig.add_trace(_ring(current.bits_per_weight, current.sqnr_db, f"yours: {current.name}", mode))
    widths = [point.bits_per_weight for point in points]
    heights = [point.sqnr_db for point in points if np.isfinite(point.sqnr_db)]
    fig.update_layout(**_layout())
    fig.update_xaxes(
        title="bits per weight, scales included", range=[min([*widths, 2]) - 0.4, max([*widths, 8]) + 0.6], dtick=1
    )
    fig.update_yaxes(
        title="signal to noise (SQNR), dB", range=[min([0, *heights]) - 2, max([48, *heights]) + 4], nticks=8
    )
    return fig


def perplexities(
    points: Sequence[PerplexityPoint],
    original: float | None,
    widths: tuple[float, float],
    *,
    ceiling: float | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """What fewer bits make of a model: its perplexity, a line for each method and data type.

    Args:
        points: in any order.
        original: perplexity in full precision; None until it is known. One that is not finite has no line.
        widths: smallest and largest number of bits per weight that the axis shows, the same from the first point on.
        ceiling: the highest perplexity that the axis shows; by default the highest that there is.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure()
    methods = list(dict.fromkeys(point.method for point in points))
    types = list(dict.fromkeys(point.data_type for point in points))
    for data_type in types:
        for method in methods:
            members = sorted(
                (point for point in points if (point.method, point.data_type) == (method, data_type)),
                key=lambda point: point.bits_per_weight,
            )
            if not members:
                continue
            index, dash = methods.index(method), types.index(data_type)
            fig.add_scatter(
                x=[point.bits_per_weight for point in members],
                y=[point.perplexity for point in members],
                name=f"{method}, {data_type}" if len(types) > 1 else method,
                mode="lines+markers",
                line={"color": colours[index], "width": 2, "dash": _DASHES[dash % len(_DASHES)]},
                marker={"size": 9, "symbol": _SYMBOLS[index] + ("-open" if dash else ""), "color": colours[index]},
                customdata=[[point.bits, point.bits_per_weight, _digits(point.perplexity)] for point in members],
                hovertemplate=f"{method}, {data_type}, %{{customdata[0]}} bits<br>%{{customdata[1]:.2f}} bits per "
                "weight<br>perplexity %{customdata[2]}<extra></extra>",
            )
    known = [point.perplexity for point in points if math.isfinite(point.perplexity)]
    if original is not None and not math.isfinite(original):
        original = None
    known += [] if original is None else [original]
    low = min(known, default=1.0)
    high = ceiling or (max(_FLAT * low, *known) if known else 10.0)
    if original is not None:
        fig.add_hline(original, line={"color": surface.ink, "width": 1.5, "dash": "dot"})
        fig.add_annotation(
            text=f"original, {original:.3g}",
            xref="paper",
            x=1,
            xanchor="right",
            y=float(np.log10(original)),
            yanchor="top",
            showarrow=False,
            font={"size": 12, "color": surface.ink},
        )
    room = 0.08 * (np.log10(high) - np.log10(low))
    marks = _logarithmic_marks(low, high)
    fig.update_layout(**_layout())
    fig.update_xaxes(title="bits per weight, scales included", range=[widths[0] - 0.4, widths[1] + 0.4], dtick=1)
    fig.update_yaxes(
        title="perplexity (lower is better)",
        type="log",
        range=[np.log10(low) - 2 * room, np.log10(high) + room],
        tickvals=marks,
        ticktext=[f"{mark:,g}" if mark < 1e6 else f"{mark:.0e}" for mark in marks],
    )
    return fig


def ranking(names: Sequence[str], values: Sequence[float], *, unit: str, mode: theme.Mode = "light") -> go.Figure:
    """The layers that something happens to most, longest bar on top.

    Args:
        names: of the layers, the first on top.
        values: of each.
        unit: title of the axis.
        mode: light or dark.
    """
    signed = theme.signed(mode)
    colours = [signed[-2][1] if value >= 0 else signed[1][1] for value in values]
    fig = go.Figure(
        go.Bar(
            x=list(values),
            y=list(range(len(values))),
            orientation="h",
            width=0.72,
            marker={"color": colours},
            customdata=list(names),
            hovertemplate="%{customdata}: %{x:+.3g}<extra></extra>",
        )
    )
    left = max(112, 20 + _LETTER * max(map(len, names), default=0))
    fig.update_layout(margin={"l": left, "r": 18, "t": 14, "b": 50}, showlegend=False, dragmode=False)
    fig.update_xaxes(title=unit, rangemode="tozero", nticks=5)
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=list(names),
        ticklabelstandoff=5,
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return fig


def _logarithmic_marks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, the fewest kinds of them that make four marks."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    marks: list[float] = []
    for steps in _STEPS:
        marks = [float(power * step) for power in powers for step in steps if low <= power * step <= high]
        if len(marks) >= 4:
            break
    return marks


def _digits(perplexity: float) -> str:
    """Four digits of it and no power of ten."""
    return f"{perplexity:.4g}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _beside(across: Sequence[float], up: Sequence[float]) -> list[str]:
    """Where each label stands: below its point near the right end; elsewhere beside it, lower ones a little below."""
    highest: dict[float, float] = {}
    for x, y in zip(across, up, strict=True):
        highest[x] = max(y, highest.get(x, y))
    places = []
    for x, y in zip(across, up, strict=True):
        beside = "middle right" if y == highest[x] else "bottom right"
        places.append("bottom center" if x > _RIGHT else beside)
    return places


def _ring(x: float, y: float, name: str, mode: theme.Mode) -> go.Scatter:
    return go.Scatter(
        x=[x],
        y=[y],
        name=name,
        mode="markers",
        marker={
            "size": 17,
            "symbol": "circle-open",
            "color": theme.SURFACES[mode].ink,
            "line": {"width": 2.5},
        },
        hoverinfo="skip",
    )


def _layout() -> dict[str, Any]:
    return {
        "margin": {"l": 64, "r": 18, "t": 64, "b": 50},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "dragmode": False,
        "showlegend": True,
    }
