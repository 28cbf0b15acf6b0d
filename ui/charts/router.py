"""Pictures of a router's decisions: one token's way, the load of the experts, and every token beside every expert.

Legend: N tokens, E experts.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from ui import theme

_NOTE_WIDTH = 54  # letters of a line of a note: what a phone shows
_BARS, _LINE, _TITLE = 104, 17, 26  # pixels: the bars of a step, a line of its note, its title
_MANY = 16  # experts; of more the numbers on the bars would overlap
_NAMED_TOKENS = 56  # of more the names would overlap
_NAMED_EXPERTS = 16
_EIGHTH: dict[theme.Mode, str] = {"light": "#F0E442", "dark": "#0072B2"}  # what Okabe and Ito have beside the theme's
COLOURS = 8
"""Experts that differ in colour."""


@dataclass(frozen=True)
class Panel:
    """One step of a token's way.

    Args:
        title: its name.
        formula: how its values come about.
        values: (E,), NaN where there is none.
        note: what it changed.
        whole: whether the values are whole numbers.
    """

    title: str
    formula: str
    values: np.ndarray
    note: str
    whole: bool = False


def colour(expert: int, mode: theme.Mode) -> str:
    """The colour of an expert, the same in every picture; there are eight, so expert 8 has that of expert 0."""
    *colours, grey = theme.CATEGORIES[mode]
    colours = (*colours, _EIGHTH[mode], grey)
    return colours[expert % COLOURS]


def way(panels: Sequence[Panel], chosen: Sequence[int], *, mode: theme.Mode = "light") -> go.Figure:
    """The steps below each other, E bars each, one column an expert; those that compute the token are coloured.

    Args:
        panels: in the order of the computation.
        chosen: experts that compute the token.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    experts = len(panels[0].values)
    notes = [_lines(panel.note) for panel in panels]
    heads = [_TITLE + _LINE * len(note) + 14 for note in notes]
    tall = sum(heads) + len(panels) * _BARS
    fills = [colour(expert, mode) if expert in chosen else surface.line for expert in range(experts)]
    fig = go.Figure()
    top = 0.0
    for number, (panel, note, head) in enumerate(zip(panels, notes, heads, strict=True)):
        axis = "" if number == 0 else str(number + 1)
        fig.add_annotation(
            text=f"<b>{number + 1} · {html.escape(panel.title)}</b>  {html.escape(panel.formula)}"
            + f"<span style='color:{surface.muted}'>"
            + "".join(f"<br>{html.escape(line)}" for line in note)
            + "</span>",
            x=0,
            xref="paper",
            xshift=-38,
            y=1 - top / tall,
            yref="paper",
            xanchor="left",
            yanchor="top",
            align="left",
            showarrow=False,
            font={"size": 13},
        )
        fig.add_bar(
            x=list(range(experts)),
            y=panel.values,
            yaxis=f"y{axis}",
            marker={"color": fills},
            text=[_number(value, panel.whole) for value in panel.values] if experts <= _MANY else None,
            textposition="outside",
            textfont={"size": 12, "color": surface.ink},
            textangle=0,
            cliponaxis=False,
            constraintext="none",
            customdata=[_number(value, panel.whole) for value in panel.values],
            hovertemplate=f"expert %{{x}}: %{{customdata}}<extra>{html.escape(panel.title)}</extra>",
        )
        upper = 1 - (top + head) / tall
        fig.update_layout(
            {
                f"yaxis{axis}": {
                    "domain": [max(0.0, upper - (_BARS - 12) / tall), upper],
                    "range": _reach(panel.values),
                    "showticklabels": False,
                    "showgrid": False,
                    "zeroline": True,
                    "fixedrange": True,
                }
            }
        )
        top += head + _BARS
    fig.update_xaxes(_experts_axis(experts), anchor=f"y{len(panels)}" if len(panels) > 1 else "y")
    return fig.update_layout(
        height=round(tall) + 58,
        margin={"l": 40, "r": 8, "t": 4, "b": 54},
        showlegend=False,
        bargap=0.25,
        dragmode=False,
    )


def loads(
    load: np.ndarray, wanted: np.ndarray, fair: float, fair_words: str, *, mode: theme.Mode = "light"
) -> go.Figure:
    """A bar of tokens for each expert against the fair share; what was refused on top, dead experts hatched.

    Args:
        load: (E,) tokens that each expert computes.
        wanted: (E,) tokens that chose it.
        fair: tokens of each if all were equal.
        fair_words: what that is.
        mode: light or dark.
    """
    surface, experts = theme.SURFACES[mode], np.arange(len(load))
    refused = wanted - load
    dead = (load == 0) & (refused == 0)
    fig = go.Figure(
        go.Bar(
            x=experts,
            y=load,
            name="computed",
            marker={"color": [colour(expert, mode) for expert in experts]},
            customdata=load / fair if fair else np.ones(len(load)),
            hovertemplate="expert %{x}: %{y} tokens, %{customdata:.2f} times the fair share<extra></extra>",
            showlegend=False,
        )
    )
    if refused.any():
        fig.add_bar(
            x=experts,
            y=refused,
            name="refused: no room left",
            marker={"color": surface.paper, "line": {"color": surface.ink, "width": 1}}
            | {"pattern": {"shape": "x", "fgcolor": surface.muted, "size": 7}},
            hovertemplate="expert %{x}: %{y} refused<extra></extra>",
        )
    if dead.any():
        fig.add_bar(
            x=experts[dead],
            y=np.full(dead.sum(), max(fair, 1)),
            name="dead: no token",
            marker={"color": surface.paper, "line": {"color": surface.muted, "width": 1}}
            | {"pattern": {"shape": "/", "fgcolor": surface.muted, "size": 8}},
            hovertemplate="expert %{x}: no token<extra></extra>",
        )
    fig.add_scatter(
        x=[-0.5, len(load) - 0.5],
        y=[fair, fair],
        mode="lines",
        name=f"{fair_words}, {fair:.4g} tokens",
        line={"color": surface.ink, "width": 1.5, "dash": "dash"},
        hoverinfo="skip",
    )
    fig.update_xaxes(_experts_axis(len(load)))
    if len(load) <= _MANY:
        counts = [f"{expert}<br><b>{count}</b>" for expert, count in enumerate(load)]
        fig.update_xaxes(ticktext=counts, title={"text": "expert, and its tokens"})
    fig.update_yaxes(
        title={"text": "tokens", "standoff": 4},
        range=[0, 1.12 * max(float(wanted.max()), fair, 1.0)],
        fixedrange=True,
    )
    return fig.update_layout(
        barmode="stack",
        bargap=0.2,
        margin={"l": 52, "r": 8, "t": 40, "b": 66},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
    )


def tokens_by_expert(
    probs: np.ndarray,
    taken: np.ndarray,
    dropped: np.ndarray,
    tokens: Sequence[str],
    starts: Sequence[int] = (0,),
    *,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Tokens in reading order from left to right, experts from top to bottom; dots on those that compute them.

    The colours are those of probability ÷ fair share, from 0 to the largest there is, with the page's own at the fair
    share: on a scale up to probability 1 the many experts would share its darkest end.

    Args:
        probs: (N, E).
        taken, dropped: (N, E) bool: the expert computes the token; it was wanted and had no room.
        tokens: N labels.
        starts: index of the first token of each source; where the tokens are too many to be named, these are numbered.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    count, experts = probs.shape
    names = [html.escape(token) for token in tokens]
    states = np.where(taken, ", chosen", np.where(dropped, ", refused", ""))
    relative = probs * experts
    most = max(2.0, float(relative.max(initial=0)))
    said = [
        [
            f"{names[n]} ({n}) · expert {e}{states[n, e]}: {probs[n, e]:.1%}, {relative[n, e]:.2f} × fair"
            for n in range(count)
        ]
        for e in range(experts)
    ]
    fig = go.Figure(
        go.Heatmap(
            z=relative.T,
            colorscale=_around_fair(most, mode),
            zmin=0,
            zmax=most,
            customdata=said,
            hovertemplate="%{customdata}<extra></extra>",
            colorbar={
                "title": {"text": f"probability ÷ fair share 1/{experts}", "side": "right"},
                "nticks": 6,
                "thickness": 10,
                "x": 1.01,
            },
        )
    )
    few = count <= _NAMED_TOKENS
    for mask, name, symbol, size in (
        (taken, "chosen", "circle", 8 if few else 4.5),
        (dropped, "refused: no room left", "x", 8 if few else 5.5),
    ):
        places, rows = np.nonzero(mask)
        if len(places):
            fig.add_scatter(
                x=places,
                y=rows,
                mode="markers",
                name=name,
                marker={
                    "symbol": symbol,
                    "size": size,
                    "color": surface.ink,
                    "line": {"width": 0.8, "color": surface.paper},
                },
                hoverinfo="skip",
            )
    for start in starts[1:]:
        line = {"color": surface.muted, "width": 2}
        fig.add_shape(type="line", x0=start - 0.5, x1=start - 0.5, y0=-0.5, y1=experts - 0.5, line=line)
    if count <= _NAMED_TOKENS:
        ticks = {"tickvals": list(range(count)), "ticktext": names, "tickangle": -90}
    else:
        ends = [*starts[1:], count]
        ticks = {
            "tickvals": [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)],
            "ticktext": [str(number + 1) for number in range(len(starts))],
            "tickangle": 0,
        }
    fig.update_xaxes(
        title={"text": "tokens in reading order" + (", by source" if count > _NAMED_TOKENS else ""), "standoff": 6},
        range=[-0.5, count - 0.5],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
        tickfont={"size": 11},
        showline=True,  # the fair share has the page's own colour
        mirror=True,
        **ticks,
    )
    step = max(1, -(-experts // _NAMED_EXPERTS))
    fig.update_yaxes(
        title={"text": "expert", "standoff": 4},
        range=[experts - 0.5, -0.5],
        tickvals=list(range(0, experts, step)),
        showgrid=False,
        zeroline=False,
        fixedrange=True,
        showline=True,
        mirror=True,
    )
    return fig.update_layout(
        margin={"l": 46, "r": 8, "t": 40, "b": 96 if count <= _NAMED_TOKENS else 56},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": surface.ink}},
        showlegend=True,
        dragmode=False,
    )


def _lines(note: str) -> list[str]:
    """`note` in as few lines as a phone shows, of about the same length."""
    count = len(textwrap.wrap(note, _NOTE_WIDTH))
    for width in range(max(1, len(note) // max(1, count)), _NOTE_WIDTH):
        if len(lines := textwrap.wrap(note, width)) == count:
            return lines
    return textwrap.wrap(note, _NOTE_WIDTH)


def _around_fair(most: float, mode: theme.Mode) -> list[list[Any]]:
    """The part from 0 to `most` of the diverging scale whose middle is at 1 and whose end is at `most`, at least 2."""
    scale = theme.signed(mode)
    reach = most - 1
    inside = [[(1 + (2 * place - 1) * reach) / most, tint] for place, tint in scale]
    first = sample_colorscale([tint for _, tint in scale], [0.5 - 0.5 / reach])[0]
    return [[0.0, first], *(point for point in inside if point[0] > 0)]


def _experts_axis(experts: int) -> dict[str, Any]:
    step = max(1, -(-experts // _NAMED_EXPERTS))
    return {
        "title": {"text": "expert", "standoff": 4},
        "tickvals": list(range(0, experts, step)),
        "range": [-0.6, experts - 0.4],
        "showgrid": False,
        "fixedrange": True,
    }


def _reach(values: np.ndarray) -> list[float]:
    """What an axis of bars shows: 0 and all values, with room for a number beyond each end."""
    known = values[np.isfinite(values)]
    low, high = min(0.0, float(known.min(initial=0))), max(0.0, float(known.max(initial=0)))
    room = 0.26 * ((high - low) or 1)
    return [low - (room if low < 0 else 0), high + (room if high > 0 or low == 0 else 0)]


def _number(value: float, whole: bool) -> str:
    if not np.isfinite(value):
        return "–"
    if whole:
        return f"{value:.0f}"
    return "0" if value == 0 else f"{value:.2f}".replace("-", "−")
