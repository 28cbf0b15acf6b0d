"""Pictures of where memory goes: bytes in, Plotly figure out. Nothing here knows of Streamlit or of a model.

What is held throughout a step has one colour a part; what is hatched comes and goes, or belongs to the part before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ui import theme

_BAR = 0.46  # width of a bar, where the next one is 1 away; the label is above it
_FAR = 2.5  # a card that is so many times larger than the largest stack is not drawn to scale
_LOOKS: dict[str, tuple[int, str]] = {
    "weights": (0, ""),
    "scales": (0, "/"),
    "adapters": (2, ""),
    "optimizer state": (1, ""),
    "gradients": (4, ""),
    "activations": (5, ""),
    "logits and loss": (3, ""),
    "temporary tensors": (5, "/"),
    "KV cache": (2, "/"),
    "workspace": (6, ""),
}
"""Category and pattern of every part, in the order in which they are stacked."""


@dataclass(frozen=True)
class Stack:
    """One bar.

    Args:
        label: what stands above it.
        parts: bytes by part.
        chosen: whether it is the one that the settings say.
    """

    label: str
    parts: Mapping[str, int]
    chosen: bool = False

    @property
    def total(self) -> int:
        """Bytes together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Line:
    """The largest batches of one way to train.

    Args:
        label: of the way.
        batches: by length; 0 where not one text fits.
        colour: index into `theme.CATEGORIES`.
        dashed: whether it is drawn dashed.
    """

    label: str
    batches: Sequence[int]
    colour: int
    dashed: bool


@dataclass(frozen=True)
class Pair:
    """A prediction and a measurement.

    Args:
        label: of what.
        predicted: bytes.
        measured: bytes; None where there is none.
    """

    label: str
    predicted: int
    measured: int | None


def unit_of(most: float) -> tuple[float, str]:
    """Bytes of the unit that a number of bytes is told in, and its name."""
    return next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= size), (1.0, "B"))


def amount(nbytes: float) -> str:
    """Bytes to three digits with their unit, e.g. ``"13.5 GB"``."""
    size, name = unit_of(nbytes)
    number = nbytes / size
    digits = max(0, 2 - int(math.log10(max(number, 1))))
    return f"{number:,.{digits}f}\u00a0{name}"


def stacks(
    bars: Sequence[Stack], *, card: float | None = None, line: str = "the card", mode: theme.Mode = "light"
) -> go.Figure:
    """Bars from top to bottom, stacked from their parts, against a line for what the card holds.

    Args:
        bars: one at least.
        card: bytes of the card; None for no line.
        line: what the line is called.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    most = max(bar.total for bar in bars)
    far = card is not None and card > _FAR * most
    right = max(most, card or 0) if not far else most
    size, unit = unit_of(right)
    fig = go.Figure()
    for part, (colour, pattern) in _LOOKS.items():
        if any(bar.parts.get(part) for bar in bars):
            fig.add_bar(
                name=part,
                orientation="h",
                x=[bar.parts.get(part, 0) / size for bar in bars],
                y=list(range(len(bars))),
                width=_BAR,
                marker={
                    "color": colours[colour],
                    "line": {"width": 0},
                    "pattern": {
                        "shape": pattern,
                        "bgcolor": colours[colour],
                        "fgcolor": surface.paper,
                        "size": 6,
                        "solidity": 0.35,
                    },
                },
                customdata=[[_plain(bar.label), amount(bar.parts.get(part, 0))] for bar in bars],
                hovertemplate="%{customdata[0]}<br>" + part + ": %{customdata[1]}<extra></extra>",
            )
    text = {"showarrow": False, "font": {"size": 13, "color": surface.ink}, "bgcolor": surface.paper, "borderpad": 0}
    annotations = [
        {
            "text": f"<b>{bar.label}</b>" if bar.chosen else bar.label,
            "x": 0,
            "y": number - _BAR / 2,
            "xanchor": "left",
            "yanchor": "bottom",
            "xshift": -3,
            **text,
        }
        for number, bar in enumerate(bars)
    ]
    annotations += [
        {"text": amount(bar.total), "x": bar.total / size, "y": number, "xanchor": "left", "xshift": 4, **text}
        for number, bar in enumerate(bars)
    ]
    if card is not None and not far:
        fig.add_shape(
            type="line",
            x0=card / size,
            x1=card / size,
            y0=0,
            y1=1,
            yref="paper",
            line={"color": surface.ink, "width": 2, "dash": "dash"},
        )
    if card is not None:
        own_size, own_unit = unit_of(card)
        annotations.append(
            {
                "text": f"{line}: {card / own_size:.3g}\u00a0{own_unit}" + (", far to the right" if far else ""),
                "x": 1 if far else card / size,
                "xref": "paper" if far else "x",
                "y": 1,
                "yref": "paper",
                "xanchor": "right" if far or card > 0.5 * right else "left",
                "yanchor": "top",
                "xshift": 0 if far else -6 if card > 0.5 * right else 6,
                **text,
            }
        )
    fig.update_layout(
        barmode="stack",
        annotations=annotations,
        legend={"orientation": "h", "x": 0, "y": -0.13, "yanchor": "top", "traceorder": "normal"},
        margin={"l": 10, "r": 16, "t": 8, "b": 130},
        dragmode=False,
    )
    fig.update_xaxes(range=[0, 1.18 * right / size], title={"text": unit, "standoff": 4}, nticks=6, fixedrange=True)
    fig.update_yaxes(visible=False, range=[len(bars) - 0.6, -1.05], fixedrange=True)
    return fig


def rooms(
    lines: Sequence[Line], lengths: Sequence[int], here: tuple[int, int], context: int, *, mode: theme.Mode = "light"
) -> go.Figure:
    """The largest batch that fits against the length of the texts, both on logarithmic axes.

    Args:
        lines: one for each way to train.
        lengths: tokens, ascending.
        here: length and batch of the settings, marked.
        context: tokens that the model reads at most, a dotted line.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure()
    for line in lines:
        fig.add_scatter(
            name=line.label,
            x=list(lengths),
            y=[batch or None for batch in line.batches],
            mode="lines+markers",
            line={"color": colours[line.colour], "width": 2, "dash": "dash" if line.dashed else "solid"},
            marker={"size": 6},
            hovertemplate=f"{line.label}<br>%{{y:,}} texts of %{{x:,}} tokens<extra></extra>",
        )
    fig.add_scatter(
        name="your settings",
        x=[here[0]],
        y=[here[1]],
        mode="markers",
        marker={"symbol": "x", "size": 12, "color": surface.ink},
        hovertemplate="your settings<br>%{y:,} texts of %{x:,} tokens<extra></extra>",
    )
    fig.add_vline(context, line={"color": surface.ink, "width": 1, "dash": "dot"})
    fig.add_annotation(
        text=f"reads {context:,}",
        x=math.log10(context),
        y=1,
        yref="paper",
        xanchor="left",
        yanchor="top",
        xshift=4,
        showarrow=False,
        font={"size": 13, "color": surface.ink},
        bgcolor=surface.paper,
    )
    most = max([here[1], *(batch for line in lines for batch in line.batches)])
    fig.update_xaxes(
        type="log",
        title={"text": "tokens of a text", "standoff": 4},
        tickvals=list(lengths),
        ticktext=[_short(length) for length in lengths],
        tickangle=0,
        range=[math.log10(0.85 * min(*lengths, here[0])), math.log10(1.18 * max(*lengths, here[0]))],
        fixedrange=True,
    )
    ticks = [10**power for power in range(0, 6) if 10**power <= 2 * most]
    fig.update_yaxes(
        type="log",
        title="largest batch",
        tickvals=ticks,
        ticktext=[f"{tick:,}" for tick in ticks],
        range=[math.log10(0.8), math.log10(1.5 * most)],
        fixedrange=True,
    )
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        margin={"l": 64, "r": 16, "t": 8, "b": 130},
        dragmode=False,
    )
    return fig


def pairs(rows: Sequence[Pair], *, mode: theme.Mode = "light") -> go.Figure:
    """Predicted above measured, for every row; labels above the bars.

    Args:
        rows: from top to bottom.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    most = max(max(row.predicted, row.measured or 0) for row in rows)
    size, unit = unit_of(most)
    fig = go.Figure()
    for name, colour, shift in (("predicted", 0, -0.13), ("measured", 1, 0.13)):
        drawn = [(number, row) for number, row in enumerate(rows) if getattr(row, name) is not None]
        values = [getattr(row, name) for _, row in drawn]
        fig.add_bar(
            name=name,
            orientation="h",
            x=[value / size for value in values],
            y=[number + shift for number, _ in drawn],
            width=0.25,
            text=[amount(value) for value in values],
            textposition="outside",
            textangle=0,
            cliponaxis=False,
            marker={"color": colours[colour]},
            customdata=[row.label for _, row in drawn],
            hovertemplate="%{customdata}<br>" + name + ": %{text}<extra></extra>",
        )
    fig.update_layout(
        barmode="overlay",
        annotations=[
            {
                "text": row.label if row.measured is not None else f"{row.label} (not told apart here)",
                "x": 0,
                "y": number - 0.27,
                "xanchor": "left",
                "yanchor": "bottom",
                "xshift": -3,
                "showarrow": False,
                "font": {"size": 13, "color": surface.ink},
            }
            for number, row in enumerate(rows)
        ],
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        margin={"l": 10, "r": 16, "t": 8, "b": 84},
        dragmode=False,
    )
    fig.update_xaxes(range=[0, 1.25 * most / size], title={"text": unit, "standoff": 4}, nticks=6, fixedrange=True)
    fig.update_yaxes(visible=False, range=[len(rows) - 0.6, -0.75], fixedrange=True)
    return fig


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)


def _plain(label: str) -> str:
    return label.replace("<br>", " ")
