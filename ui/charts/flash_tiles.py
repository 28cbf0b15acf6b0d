"""Pictures of attention in tiles: the grid of blocks, what a row holds so far, and the bytes that were moved.

Legend: S steps, N blocks of queries, M blocks of keys, d head width, C parts of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ui import theme
from ui.charts.flash import TEXT, decades
from ui.charts.memory import amount, unit_of

WAITING, DONE, CURRENT, SKIPPED = range(4)
_WORDS = {WAITING: "waiting", DONE: "done", CURRENT: "now", SKIPPED: "skipped: the mask hides all of it"}
_MARKED = 400  # tiles; of more of them one sees no marks
_LABELS = 10  # blocks that an axis names


@dataclass(frozen=True)
class Tiles:
    """The tiles in the order in which they are computed.

    Args:
        query_block, key_block: (S,), which tile each step is about.
        skipped: (S,), whether the mask leaves nothing of it.
        partial: (S,), whether the mask cuts through it.
        grid: N, M.
        block_q, block_k: rows and columns of a tile.
        length: tokens.
    """

    query_block: np.ndarray
    key_block: np.ndarray
    skipped: np.ndarray
    partial: np.ndarray
    grid: tuple[int, int]
    block_q: int
    block_k: int
    length: int


def grid(tiles: Tiles, step: int, row: int, *, mode: theme.Mode = "light") -> go.Figure:
    """Queries from top to bottom, keys from left to right: which tiles are done, which is computed now.

    Args:
        tiles: all of them.
        step: the one that is computed now; S when all are done.
        row: the query that is followed; its block is framed.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    state = states(tiles, step)
    marked = state.size <= _MARKED
    fills = {WAITING: surface.grid, DONE: colours[0], CURRENT: colours[1], SKIPPED: surface.paper}
    scale = [(place, fills[kind]) for kind in fills for place in (kind / 4, (kind + 1) / 4)]
    fig = go.Figure(
        go.Heatmap(
            z=state,
            zmin=-0.5,
            zmax=3.5,
            colorscale=scale,
            showscale=False,
            xgap=2 if marked else 0.5,
            ygap=2 if marked else 0.5,
            hovertext=[[_hover(tiles, state, y, x) for x in range(tiles.grid[1])] for y in range(tiles.grid[0])],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    if marked:
        _mark(fig, np.argwhere(state == SKIPPED), "x-thin-open", surface.muted)
        partial = np.zeros(tiles.grid, dtype=bool)
        partial[tiles.query_block, tiles.key_block] = tiles.partial
        for kind in (WAITING, DONE, CURRENT):
            ink = surface.muted if kind == WAITING else surface.paper
            _mark(fig, np.argwhere(partial & (state == kind)), "line-nw-open", ink)
    for kind, words in _WORDS.items():
        if kind != SKIPPED or tiles.skipped.any():
            fig.add_scatter(
                x=[None],
                y=[None],
                name=words,
                mode="markers",
                marker=_swatch(kind == SKIPPED and marked, fills[kind], surface),
            )
    if marked and tiles.partial.any():
        marker = {"symbol": "line-nw-open", "size": 12, "color": surface.ink, "line": {"width": 2}}
        fig.add_scatter(x=[None], y=[None], name="the mask cuts through it", mode="markers", marker=marker)
    block = row // tiles.block_q
    fig.add_shape(
        type="rect",
        x0=-0.5,
        x1=tiles.grid[1] - 0.5,
        y0=block - 0.5,
        y1=block + 0.5,
        line={"color": surface.ink, "width": 2.5},
    )
    if step < len(tiles.query_block):
        y, x = int(tiles.query_block[step]), int(tiles.key_block[step])
        edge = {"color": colours[1], "width": 4}
        fig.add_shape(type="rect", x0=x - 0.47, x1=x + 0.47, y0=y - 0.47, y1=y + 0.47, line=edge)
    for axis, blocks, size, title in (
        ("xaxis", tiles.grid[1], tiles.block_k, "keys and values"),
        ("yaxis", tiles.grid[0], tiles.block_q, "queries"),
    ):
        every = -(-blocks // _LABELS)
        places = list(range(0, blocks, every))
        fig.update_layout(
            {
                axis: {
                    "title": {"text": f"{title}, tokens in blocks of {size}", "standoff": 4},
                    "tickvals": places,
                    "ticktext": [_tokens(place, size, tiles.length) for place in places],
                    "showgrid": False,
                    "zeroline": False,
                    "fixedrange": True,
                    "tickangle": 0,
                    "range": [-0.55, blocks - 0.45] if axis == "xaxis" else [blocks - 0.45, -0.55],
                }
            }
        )
    fig.update_layout(
        margin={"l": 70, "r": 10, "t": 8, "b": 128},
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top", "itemclick": False},
        dragmode=False,
        showlegend=True,
    )
    return fig


def states(tiles: Tiles, step: int) -> np.ndarray:
    """(N, M), what has become of every tile before `step` is done."""
    state = np.full(tiles.grid, WAITING)
    state[tiles.query_block[:step], tiles.key_block[:step]] = DONE
    if step < len(tiles.query_block):
        state[tiles.query_block[step], tiles.key_block[step]] = CURRENT
    state[tiles.query_block[tiles.skipped], tiles.key_block[tiles.skipped]] = SKIPPED
    return state


def output(
    running: np.ndarray | None, final: np.ndarray, reach: tuple[float, float], *, mode: theme.Mode = "light"
) -> go.Figure:
    """The followed row's output so far against what standard attention gives.

    Args:
        running: (d,), output / sum; None before the row's first tile.
        final: (d,), by standard attention.
        reach: ends of the axis, the same at every step.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    places = list(range(len(final)))
    fig = go.Figure(
        go.Bar(
            x=places,
            y=[0.0] * len(final) if running is None else running,
            name="so far, O / l",
            marker={"color": colours[0]},
            hovertemplate="number %{x}: %{y:.4f} so far<extra></extra>",
        )
    )
    fig.add_scatter(
        x=places,
        y=final,
        name="standard attention",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 14, "color": surface.ink, "line": {"width": 3}},
        hovertemplate="number %{x}: %{y:.4f} by standard attention<extra></extra>",
    )
    low, high = reach
    room = 0.08 * (high - low or 1)
    fig.update_xaxes(title={"text": "number of the output, of d", "standoff": 4}, nticks=8, fixedrange=True)
    fig.update_yaxes(title="value", range=[low - room, high + room], nticks=6, fixedrange=True)
    fig.update_layout(
        margin={"l": 56, "r": 10, "t": 8, "b": 84},
        legend={"orientation": "h", "x": 0, "y": -0.26, "yanchor": "top"},
        dragmode=False,
        bargap=0.3,
    )
    return fig


def traffic(read: int, written: int, in_all: int, standard: int, *, mode: theme.Mode = "light") -> go.Figure:
    """Bytes between main memory and the chip so far, against what both ways move in all.

    Args:
        read, written: so far, in tiles.
        in_all: in tiles, at the end.
        standard: by standard attention.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    most = max(in_all, standard)
    size, unit = unit_of(most)
    fig = go.Figure()
    for name, values, colour, pattern in (
        ("read", [read, 0], colours[0], ""),
        ("written", [written, 0], colours[2], "/"),
        ("standard attention, in all", [0, standard], colours[1], ""),
    ):
        fig.add_bar(
            name=name,
            orientation="h",
            y=[0, 1],
            x=[value / size for value in values],
            width=0.5,
            marker={
                "color": colour,
                "pattern": {"shape": pattern, "bgcolor": colour, "fgcolor": surface.paper, "size": 6, "solidity": 0.35},
            },
            customdata=[amount(value) for value in values],
            hovertemplate=name + ": %{customdata}<extra></extra>",
        )
    fig.add_shape(
        type="line",
        x0=in_all / size,
        x1=in_all / size,
        y0=-0.4,
        y1=0.4,
        line={"color": surface.ink, "width": 2, "dash": "dash"},
    )
    text = {"showarrow": False, "xanchor": "left", "font": {"size": 13, "color": surface.ink}}
    words = f"in tiles: {amount(read + written)} of {amount(in_all)}"
    for y, value, said in ((0, 0, words), (1, 0, f"standard: {amount(standard)}")):
        fig.add_annotation(text=said, x=value, y=y - 0.26, yanchor="bottom", xshift=-3, **text)
    fig.update_xaxes(
        title={"text": f"moved, {unit}", "standoff": 4}, range=[0, 1.05 * most / size], nticks=6, fixedrange=True
    )
    fig.update_yaxes(visible=False, range=[1.4, -0.75], fixedrange=True)
    fig.update_layout(
        barmode="stack",
        margin={"l": 10, "r": 14, "t": 4, "b": 84},
        legend={"orientation": "h", "x": 0, "y": -0.3, "yanchor": "top", "traceorder": "normal"},
        dragmode=False,
    )
    return fig


def on_chip(
    sizes: np.ndarray,
    counted: np.ndarray,
    theorem: np.ndarray,
    standard: int,
    chosen: float | None,
    *,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Bytes that are moved over on-chip memory, both logarithmic.

    Args:
        sizes: (C,) bytes on the chip.
        counted: (C,) moved, as the tiles of that size move them.
        theorem: (C,) T²d²/M.
        standard: moved by standard attention.
        chosen: bytes on the chip that the page is set to; None if it is not.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure()
    for name, values, line in (
        ("counted", counted, {"color": colours[0], "width": 2}),
        ("theorem, T²d²/M", theorem, {"color": surface.muted, "width": 2, "dash": "dash"}),
        ("standard attention", np.full(len(sizes), standard), {"color": colours[1], "width": 2, "dash": "dot"}),
    ):
        fig.add_scatter(
            x=sizes,
            y=values,
            name=name,
            mode="lines+markers" if name == "counted" else "lines",
            line=line,
            marker={"symbol": "diamond", "size": 9},
            customdata=[
                f"{amount(int(size))} on the chip: {amount(value)}" for size, value in zip(sizes, values, strict=True)
            ],
            hovertemplate=name + "<br>%{customdata}<extra></extra>",
        )
    if chosen is not None:
        fig.add_vline(chosen, line={"color": surface.ink, "width": 1.5, "dash": "dot"})
        fig.add_annotation(
            text="on the chip now", x=math.log10(chosen), y=1, yref="paper", xanchor="left", yanchor="top", **TEXT
        )
    reach = [*sizes.tolist(), *([] if chosen is None else [chosen])]
    most = max(*counted.tolist(), *theorem.tolist(), standard)
    least = min(*counted.tolist(), *theorem.tolist(), standard)
    for axis, title, low, high in (
        (fig.update_xaxes, "on-chip memory M, bytes", min(reach) / 1.3, max(reach) * 1.3),
        (fig.update_yaxes, "moved, bytes", least / 1.6, most * 1.6),
    ):
        axis(
            type="log",
            title={"text": title, "standoff": 4},
            range=[math.log10(low), math.log10(high)],
            **decades(low, high),
            fixedrange=True,
        )
    fig.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 76, "r": 14, "t": 10, "b": 50},
        hovermode="closest",
        dragmode=False,
    )
    return fig


def parts(
    labels: Sequence[str], shares: Sequence[float], hover: Sequence[str], *, mode: theme.Mode = "light"
) -> go.Figure:
    """How much each part of a split cache adds to the whole.

    Args:
        labels: (C,), tokens of each part.
        shares: (C,), of the softmax's sum, from 0 to 1.
        hover: (C,), what is said of each.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure(
        go.Bar(
            x=list(range(len(shares))),
            y=[100 * share for share in shares],
            marker={"color": colours[0]},
            text=[f"{share:.1%}" for share in shares] if len(shares) <= 16 else None,
            textposition="outside",
            textfont={"color": surface.ink},
            cliponaxis=False,
            customdata=list(hover),
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    every = -(-len(labels) // 8)
    places = list(range(0, len(labels), every))
    fig.update_xaxes(
        title={"text": "part of the cache, from token", "standoff": 4},
        tickvals=places,
        ticktext=[labels[place] for place in places],
        fixedrange=True,
    )
    fig.update_yaxes(title="% of the sum", range=[0, 118 * max(shares)], nticks=6, fixedrange=True)
    fig.update_layout(margin={"l": 56, "r": 10, "t": 14, "b": 50}, dragmode=False, showlegend=False, bargap=0.25)
    return fig


def _mark(fig: go.Figure, cells: np.ndarray, symbol: str, colour: str) -> None:
    if len(cells):
        fig.add_scatter(
            x=cells[:, 1],
            y=cells[:, 0],
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 1.5, "color": colour}},
            hoverinfo="skip",
            showlegend=False,
        )


def _swatch(crossed: bool, fill: str, surface: theme.Surface) -> dict[str, object]:
    if crossed:
        return {"symbol": "x-thin-open", "size": 10, "color": surface.muted, "line": {"width": 2}}
    return {"symbol": "square", "size": 13, "color": fill, "line": {"width": 1, "color": surface.line}}


def _hover(tiles: Tiles, state: np.ndarray, y: int, x: int) -> str:
    return (
        f"queries {_tokens(y, tiles.block_q, tiles.length)}, keys {_tokens(x, tiles.block_k, tiles.length)}<br>"
        f"{_WORDS[int(state[y, x])]}"
    )


def _tokens(block: int, size: int, length: int) -> str:
    """The tokens of a block, e.g. ``"4–7"``."""
    first, last = block * size, min((block + 1) * size, length) - 1
    return str(first) if first == last else f"{first}–{last}"
