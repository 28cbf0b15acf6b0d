"""Pictures of how a router's experts fare in training: who gets how much, how even that is, and who gets what.

Legend: M checkups, E experts, J sources.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ui import theme
from ui.charts.attention import SQUARE_ROOT

_FACTOR = 10  # the scale ends at a fair share times and divided by this: below a tenth an expert goes short
_TICKS = ((1 / 10, "≤ 0.1"), (1 / 4, "¼"), (1 / 2, "½"), (1, "1"), (2, "2"), (4, "4"), (10, "≥ 10"))
_BAR = {"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0, "xanchor": "left", "len": 1, "thickness": 10}
"""A scale above its map, which leaves a phone's width to the map."""
_DOMAINS = (0.72, 1.0), (0.36, 0.64), (0.0, 0.28)  # of three panels, from top to bottom
BALANCED = 0.1
"""MaxVio below this counts as balanced."""
_BELOW = 54  # pixels below an axis with its title
_WRITTEN = 10  # experts; of more the shares on the cells would overlap
_NAME_WIDTH = 15  # letters of a line of a source's name
_LEAST = 0.02  # of MaxVio, on an axis that is logarithmic and has no 0


@dataclass(frozen=True)
class Course:
    """How even one run was.

    Args:
        name: in the legend.
        checked: (M,) steps.
        entropy: (M,) nats.
        most: ln E, the entropy of a fair load.
        max_violation: (M,), of the held-out tokens.
        trained_violation: (M,), of the tokens trained on since the checkup before.
        directions: (M,), that the tokens at the router spread over.
        colour: index into `theme.CATEGORIES`.
    """

    name: str
    checked: np.ndarray
    entropy: np.ndarray
    most: float
    max_violation: np.ndarray
    trained_violation: np.ndarray
    directions: np.ndarray
    colour: int = 0


def load_map(
    checked: np.ndarray, relative: np.ndarray, steps: int, *, mode: theme.Mode = "light", bar: bool = True
) -> go.Figure:
    """Experts from top to bottom, steps from left to right, coloured by load ÷ fair share; the dead are crossed.

    The colours are those of the logarithm, so that half and twice the fair share are equally far from the middle.

    Args:
        checked: (M,) steps.
        relative: (M, E).
        steps: of the whole run: the axis stays as it is while it grows.
        mode: light or dark.
        bar: whether the scale stands beside it.
    """
    surface = theme.SURFACES[mode]
    experts = relative.shape[1]
    with np.errstate(divide="ignore"):
        level = np.log2(np.clip(relative, 1 / _FACTOR, _FACTOR))  # (M, E)
    fig = go.Figure(
        go.Heatmap(
            x=checked,
            y=np.arange(experts),
            z=level.T,
            zmin=-np.log2(_FACTOR),
            zmid=0,
            zmax=np.log2(_FACTOR),
            colorscale=theme.signed(mode),
            customdata=relative.T,
            hovertemplate="expert %{y} after step %{x}<br>%{customdata:.2f} times the fair share<extra></extra>",
            showscale=bar,
            colorbar=_BAR
            | {
                "title": {"text": "load ÷ fair share; 1 is fair", "side": "top"},
                "tickvals": [float(np.log2(value)) for value, _ in _TICKS],
                "ticktext": [words for _, words in _TICKS],
            },
        )
    )
    places, dead = np.nonzero(relative == 0)
    if len(places):
        fig.add_scatter(
            x=checked[places],
            y=dead,
            mode="markers",
            name="dead: no token at all",
            marker={"symbol": "x-thin-open", "size": 6, "color": surface.paper, "line": {"width": 1.4}},
            hoverinfo="skip",
        )
    width = (checked[1] - checked[0]) / 2 if len(checked) > 1 else steps / 50
    fig.update_xaxes(range=[-width, steps + width], showgrid=False, zeroline=False)
    _write_below(fig, "step")
    fig.update_yaxes(
        title={"text": "expert", "standoff": 4},
        range=[experts - 0.5, -0.5],
        tickvals=list(range(0, experts, max(1, -(-experts // 16)))),
        showgrid=False,
        zeroline=False,
    )
    frame = {"showline": True, "mirror": True}  # the fair share has the page's own colour
    fig.update_xaxes(fixedrange=True, **frame).update_yaxes(fixedrange=True, **frame)
    return fig.update_layout(
        margin={"l": 46, "r": 8, "t": 66, "b": _BELOW},
        showlegend=False,
        dragmode=False,
    )


def balance(courses: Sequence[Course], steps: int, *, mode: theme.Mode = "light") -> go.Figure:
    """Entropy of the load, MaxVio, and how many directions the tokens have, below each other.

    Each is drawn against what is fair; a dotted MaxVio is that of the tokens learned from.

    Args:
        courses: the runs.
        steps: of the longest: the axis stays as it is while a run grows.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure()
    for course in courses:
        name = html.escape(course.name)
        for values, axis, what in (
            (course.entropy, "y", "%{customdata:.3g} nats"),
            (course.max_violation, "y2", "MaxVio %{customdata:.3g} on held-out tokens"),
            (course.trained_violation, "y2", "MaxVio %{customdata:.3g} on tokens trained on"),
            (course.directions, "y3", "%{customdata:.3g} directions"),
        ):
            trained = values is course.trained_violation
            fig.add_scatter(
                x=course.checked,
                y=np.maximum(values, _LEAST) if axis == "y2" else values,
                yaxis=axis,
                name=name,
                mode="lines" if trained else "lines+markers",
                marker={"size": 5},
                line={"color": colours[course.colour], "width": 2, "dash": "dot" if trained else "solid"},
                legendgroup=name,
                showlegend=axis == "y" and len(courses) > 1,
                customdata=values,
                hovertemplate=f"{name}, step %{{x}}: {what}<extra></extra>",
            )
    highest = max(course.most for course in courses)
    worst = max(float(np.nanmax(course.max_violation, initial=0)) for course in courses)
    top = math.log10(1.6 * max(worst, 4 * BALANCED))
    for height, place, axis, words, side in (
        (highest, highest, "y", f"fair: ln E = {highest:.2f}", "right"),
        (BALANCED, math.log10(BALANCED), "y2", "balanced: below 0.1", "left"),
    ):
        fig.add_shape(
            type="line",
            xref="paper",
            x0=0,
            x1=1,
            y0=height,
            y1=height,
            yref=axis,
            line={"color": surface.muted, "width": 1, "dash": "dot"},
        )
        fig.add_annotation(
            text=words,
            xref="paper",
            x=float(side == "right"),
            xanchor=side,
            xshift=4 if side == "left" else 0,
            y=place,
            yref=axis,
            yanchor="bottom" if side == "right" else "top",
            showarrow=False,
            font={"size": 12, "color": surface.muted},
        )
    _write_below(fig, "step")
    fig.update_xaxes(range=[-0.015 * steps, 1.015 * steps], anchor="y3", fixedrange=True)
    axes = [{"domain": domain, "fixedrange": True, "gridcolor": surface.grid} for domain in _DOMAINS]
    return fig.update_layout(
        yaxis={"title": "entropy, nats", "range": [0, 1.2 * max(highest, 0.1)]} | axes[0],
        yaxis2={"title": "MaxVio", "type": "log", "range": [math.log10(_LEAST), top]}
        | {"tickvals": [0.02, 0.1, 0.5, 2, 10]}
        | axes[1],
        yaxis3={"title": "token directions", "rangemode": "tozero"} | axes[2],
        margin={"l": 56, "r": 14, "t": 40, "b": _BELOW},
        dragmode=False,
    )


def by_source(counts: np.ndarray, sources: Sequence[str], *, mode: theme.Mode = "light") -> go.Figure:
    """Sources from top to bottom, experts from left to right: the share of a source's choices that each expert gets.

    The colours reach to the largest share there is.

    Args:
        counts: (J, E) choices.
        sources: J names.
        mode: light or dark; the colours are the same in both.
    """
    experts = counts.shape[1]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # (J, E)
    most = float(share.max()) or 1.0
    rows, columns = np.divmod(np.arange(share.size), experts)
    wrapped = [textwrap.wrap(name, _NAME_WIDTH) for name in sources]
    names = ["<br>".join(map(html.escape, lines)) for lines in wrapped]
    fig = go.Figure(
        go.Heatmap(
            z=share,
            colorscale=SQUARE_ROOT,
            zmin=0,
            zmax=most,
            customdata=counts,
            hovertemplate="%{y}, expert %{x}: %{z:.1%}, %{customdata} tokens<extra></extra>",
            y=names,
            colorbar=_BAR | {"title": {"text": "share of the source", "side": "top"}, "tickformat": ".0%"},
        )
    )
    if experts <= _WRITTEN:
        fig.add_scatter(
            x=columns,
            y=[names[row] for row in rows],
            mode="text",
            text=[f"{value:.0%}" for value in share.ravel()],
            textfont={"color": ["#000000" if value > most / 4 else "#FFFFFF" for value in share.ravel()]},
            hoverinfo="skip",
        )
    _write_below(fig, "expert")
    fig.update_xaxes(
        tickvals=list(range(0, experts, max(1, -(-experts // 16)))),
        tickangle=0,
        range=[-0.5, experts - 0.5],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    fig.update_yaxes(autorange="reversed", showgrid=False, fixedrange=True, tickfont={"size": 12})
    longest = max(len(line) for lines in wrapped for line in lines)
    return fig.update_layout(
        margin={"l": 22 + 7 * longest, "r": 14, "t": 66, "b": _BELOW}, showlegend=False, dragmode=False
    )


def _write_below(fig: go.Figure, words: str) -> None:
    """The title of the horizontal axis, at a fixed distance.

    Plotly places a title of its own by the labels as it measures them, and puts it on the cells when it measures them
    before they are where they belong.
    """
    fig.add_annotation(
        text=words,
        xref="paper",
        x=0.5,
        yref="paper",
        y=0,
        yanchor="top",
        yshift=-24,
        showarrow=False,
        font={"size": 14},
    )
