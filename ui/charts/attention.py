"""Pictures of attention: numbers in, Plotly figure out. Nothing here knows of Streamlit or of a model.

Weights are drawn on a square-root colour scale from 0 to 100 %, the same on every chart, so that a weight of 4 % is
still to be seen and two charts can be compared; what the mask forbids is left blank.

Legend: T tokens, L layers, H heads.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.colors import sample_colorscale, unlabel_rgb
from plotly.subplots import make_subplots

from ui import theme

_LEVELS = np.linspace(0, 1, 64)
_COLOURS = sample_colorscale(theme.MAGNITUDE, _LEVELS)

SQUARE_ROOT = [[level**2, colour] for level, colour in zip(_LEVELS.tolist(), _COLOURS, strict=True)]
"""Cividis with its colours at the squares of their places: the colour grows with the root of the weight."""

_THUMBNAIL = 48  # cells of a small map along a side, at most
_DENSITY = 2  # pixels of a picture for one of the page, so that cells stay sharp when the browser scales it
_GAP = 3
TITLE_HEIGHT = 30
"""Pixels of a title of two lines above a small map."""

_MAX_LABELS = 32
_MAP_SIDE = 420
ARC_POINTS = 24
_ARC_BINS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)

Cell = tuple[int, int]


def thumbnails(
    attention: np.ndarray,
    grid: Sequence[Sequence[Cell | None]],
    hover: Callable[[Cell], str],
    *,
    side: int,
    chosen: Cell | None = None,
    titles: dict[Cell, str] | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Many heads at a glance: one picture of small maps, laid out as `grid`.

    Args:
        attention: (L, H, T, T) weights.
        grid: rows of (layer, head); None leaves a place empty. Without `titles`, a row is a layer.
        hover: what the pointer shows over a head.
        side: pixels along a map, which the figure's size follows from.
        chosen: the head to frame.
        titles: what to write above each map, two lines at most.
        mode: light or dark.
    """
    rows, columns = len(grid), max(len(row) for row in grid)
    title = TITLE_HEIGHT if titles else 0
    header = title / (side + title)
    image = _mosaic(attention, grid, rows, columns, header, side)
    texts = [[hover(cell) if cell else "" for cell in row] + [""] * (columns - len(row)) for row in grid]
    fig = go.Figure(
        go.Heatmap(
            z=np.zeros((rows, columns), np.uint8),
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            coloraxis="coloraxis",
            opacity=0,
        )
    )
    fig.add_layout_image(
        source=image, xref="x", yref="y", x=-0.5, y=-0.5, sizex=columns, sizey=rows, sizing="stretch", layer="below"
    )
    fig.update_xaxes(range=[-0.5, columns - 0.5], showgrid=False, zeroline=False, constrain="domain")
    fig.update_yaxes(range=[rows - 0.5, -0.5], showgrid=False, zeroline=False)
    if titles:
        fig.update_xaxes(visible=False)
        fig.update_yaxes(visible=False)
        for y, row in enumerate(grid):
            for x, cell in enumerate(row):
                if cell:
                    fig.add_annotation(
                        x=x, y=y - 0.5, text=titles[cell], showarrow=False, yanchor="top", font={"size": 11}, yshift=3
                    )
    else:
        fig.update_xaxes(title="head →", dtick=1 if columns <= 24 else 5, tickangle=0, tickfont={"size": 10})
        fig.update_yaxes(title="layer ↓", dtick=1, tickfont={"size": 10}, ticklabelstandoff=5)
    for y, row in enumerate(grid):
        if chosen in row:
            x = row.index(chosen)
            fig.add_shape(
                type="rect",
                x0=x - 0.5,
                x1=x + 0.5,
                y0=y - 0.5 + header,
                y1=y + 0.5,
                line={"color": theme.CATEGORIES[mode][1], "width": 2.5},
            )
    margin = {"l": 8, "r": 8, "t": 64, "b": 8} if titles else {"l": 44, "r": 8, "t": 64, "b": 44}
    height = rows * (side + title)
    bar = _scale("weight", ".0%") | {"y": 1 + 4 / height}
    fig.update_layout(
        margin=margin | {"autoexpand": False},
        width=columns * side + margin["l"] + margin["r"],
        height=height + margin["t"] + margin["b"],
        dragmode=False,
        coloraxis={"colorscale": SQUARE_ROOT, "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    return fig


def weights(
    matrix: np.ndarray,
    tokens: Sequence[str],
    *,
    allowed: np.ndarray | None = None,
    cell: Cell | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """One head, large: who looks (down) at whom (across).

    Args:
        matrix: (T, T) weights, query × key.
        tokens: T labels.
        allowed: (T, T) False where the mask forbids; blank there.
        cell: (query, key) to frame.
        mode: light or dark.
    """
    tokens = _escaped(tokens)
    return go.Figure(
        _weights_map(matrix, tokens, allowed, _scale("weight", ".0%")), _token_layout(tokens) | _frames(cell, mode)
    )


def stages(
    scores: np.ndarray,
    scaled: np.ndarray,
    masked: np.ndarray,
    matrix: np.ndarray,
    output: np.ndarray,
    tokens: Sequence[str],
    *,
    scaling: str,
    cell: Cell | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """The five steps of a head side by side, on one query axis: QKᵀ, scaled, masked, softmax, · V.

    Args:
        scores, scaled, masked, matrix: (T, T) each, query × key.
        output: (T, d).
        tokens: T labels.
        scaling: what `scaled` did to `scores`, e.g. ``"÷ 8"``.
        cell: (query, key) to frame.
        mode: light or dark.
    """
    tokens = _escaped(tokens)
    names = [
        f"{name}<br><sup>{low:.3g} … {high:.3g}</sup>"
        for name, low, high in (
            ("QKᵀ", scores.min(), scores.max()),
            (scaling, scaled.min(), scaled.max()),
            ("masked", *_range(masked)),
        )
    ]
    names += ["softmax<br><sup>0 … 100 %</sup>", f"· V<br><sup>{output.min():.3g} … {output.max():.3g}</sup>"]
    fig = make_subplots(1, 5, shared_yaxes=True, horizontal_spacing=0.025, subplot_titles=names)
    signed = {"colorscale": theme.signed(mode), "zmid": 0, "hoverongaps": False}
    logits = np.where(np.isneginf(masked), np.nan, masked)
    reach = np.nanmax(np.abs(scaled))
    for column, (values, options) in enumerate(
        (
            (scores, {**signed, "zmin": -np.abs(scores).max(), "zmax": np.abs(scores).max()}),
            (scaled, {**signed, "zmin": -reach, "zmax": reach}),
            (logits, {**signed, "zmin": -reach, "zmax": reach}),
        ),
        start=1,
    ):
        fig.add_trace(_map(values, tokens, tokens, "%{z:.2f}", **options, showscale=False), 1, column)
    fig.add_trace(_weights_map(matrix, tokens, ~np.isneginf(masked), None), 1, 4)
    features = [str(index) for index in range(output.shape[1])]
    limit = np.abs(output).max() or 1.0
    fig.add_trace(
        _map(output, tokens, features, "%{z:.3f}", "feature", **signed, zmin=-limit, zmax=limit, showscale=False), 1, 5
    )
    positions, labels = _ticks(tokens)
    fig.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    fig.update_yaxes(title="query ↓", tickvals=positions, ticktext=labels, col=1)
    fig.update_xaxes(title="key →", showticklabels=False, showgrid=False, zeroline=False)
    fig.update_xaxes(title="feature →", col=5)
    for column in range(1, 5):
        fig.update_xaxes(tickvals=positions, ticktext=labels, col=column)
    if cell:
        for column in range(1, 5):
            fig.add_shape(_rectangle(cell, mode), row=1, col=column)
    fig.update_layout(margin={"l": 44 + _width(labels), "r": 8, "t": 52, "b": 44})
    return fig


def arcs(matrix: np.ndarray, tokens: Sequence[str], threshold: float, *, mode: theme.Mode = "light") -> go.Figure:
    """An arc from every query back (or ahead) to each key that gets at least `threshold`; the thicker the more.

    Args:
        matrix: (T, T) weights, query × key.
        tokens: T labels.
        threshold: smallest weight that is drawn, from 0 to 1.
        mode: light or dark.
    """
    tokens = _escaped(tokens)
    fig = go.Figure()
    colour = theme.SURFACES[mode].accent
    query, key = np.nonzero(matrix >= max(threshold, 1e-6))
    share = matrix[query, key]
    low = 0.0
    for high in _ARC_BINS:
        inside = (share > low) & (share <= high) if high < 1 else share > low
        if inside.any():
            x, y = _arc_path(query[inside], key[inside])
            fig.add_scatter(
                x=x,
                y=y,
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                opacity=0.25 + 0.75 * high,
                line={"color": colour, "width": 0.8 + 5 * high},
            )
        low = high
    fig.add_scatter(
        x=(query + key) / 2,
        y=np.abs(query - key) / 2,
        mode="markers",
        marker={"size": 12, "opacity": 0},
        showlegend=False,
        customdata=[[tokens[q], tokens[k], s] for q, k, s in zip(query, key, share, strict=True)],
        hovertemplate="“%{customdata[0]}” looks at “%{customdata[1]}”: %{customdata[2]:.1%}<extra></extra>",
    )
    positions, labels = _ticks(tokens)
    below = _below(labels)
    fig.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": below["margin"]})
    fig.update_xaxes(
        tickvals=positions,
        ticktext=labels,
        tickangle=below["angle"],
        range=[-0.7, len(tokens) - 0.3],
        showgrid=False,
        zeroline=False,
        title="token",
    )
    tallest = np.abs(query - key).max(initial=1) / 2
    fig.update_yaxes(visible=False, range=[-0.35, tallest * 1.08 + 0.3])
    return fig


def out_of(row: np.ndarray, tokens: Sequence[str], query: int, *, mode: theme.Mode = "light") -> go.Figure:
    """Where one token looks: its weight on every key.

    Args:
        row: (T,) weights of the query.
        tokens: T labels.
        query: its position.
        mode: light or dark.
    """
    tokens = _escaped(tokens)
    colours = [theme.SURFACES[mode].accent] * len(tokens)
    colours[query] = theme.CATEGORIES[mode][1]
    fig = go.Figure(
        go.Bar(
            x=list(range(len(tokens))),
            y=row,
            marker_color=colours,
            customdata=list(tokens),
            hovertemplate="“%{customdata}”: %{y:.1%}<extra></extra>",
        )
    )
    positions, labels = _ticks(tokens)
    below = _below(labels)
    fig.update_layout(margin={"l": 60, "r": 8, "t": 8, "b": below["margin"]})
    fig.update_xaxes(
        tickvals=positions, ticktext=labels, tickangle=below["angle"], title="key (the query itself in orange)"
    )
    fig.update_yaxes(
        title=f"weight that “{tokens[query]}” gives", tickformat=".0%", range=[0, max(0.05, row.max() * 1.1)]
    )
    return fig


def difference(matrix: np.ndarray, tokens: Sequence[str], *, mode: theme.Mode = "light") -> go.Figure:
    """What a change did to the map: weight now less weight before; blank where a token was dropped.

    Args:
        matrix: (T, T) differences, NaN where there is nothing to compare.
        tokens: T labels of the untouched text.
        mode: light or dark.
    """
    tokens = _escaped(tokens)
    found = np.abs(matrix[np.isfinite(matrix)])
    limit = max(found.max(initial=0.0), 0.01)
    heatmap = _map(
        matrix,
        tokens,
        tokens,
        "%{z:+.1%}",
        colorscale=theme.signed(mode),
        zmin=-limit,
        zmax=limit,
        hoverongaps=False,
        colorbar=_scale("now − before", "+.0%"),
    )
    return go.Figure(heatmap, _token_layout(tokens))


def next_tokens(
    tokens: Sequence[str], before: Sequence[float], after: Sequence[float], *, mode: theme.Mode = "light"
) -> go.Figure:
    """The ten most probable next tokens; a mark shows where each stood before the change.

    Args:
        tokens: labels, the most probable first.
        before: their probabilities in the untouched model.
        after: their probabilities now.
        mode: light or dark.
    """
    tokens = _escaped(tokens)
    places = list(range(len(tokens)))
    changed = not np.allclose(before, after, atol=1e-6)
    top = max([*before, *after, 0.01])
    bars = {
        "type": "bar",
        "x": list(after),
        "y": places,
        "orientation": "h",
        "marker": {"color": theme.SURFACES[mode].accent},
        "name": "now",
        "text": [f"{value:.1%}" for value in after],
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": list(zip(tokens, before, strict=True)),
        "hovertemplate": "“%{customdata[0]}”: %{x:.2%} now, %{customdata[1]:.2%} before<extra></extra>",
    }
    marks = {
        "type": "scatter",
        "x": list(before),
        "y": places,
        "mode": "markers",
        "name": "before",
        "hoverinfo": "skip",
        "marker": {"symbol": "line-ns", "size": 15, "line": {"width": 3, "color": theme.CATEGORIES[mode][1]}},
    }
    return go.Figure(
        [bars, marks] if changed else [bars],
        {
            "xaxis": {"title": {"text": "probability"}, "tickformat": ".0%", "range": [0, top * 1.45], "nticks": 4},
            "yaxis": {"tickvals": places, "ticktext": list(tokens), "autorange": "reversed", "showgrid": False},
            "margin": {"l": 8 + _width(tokens), "r": 8, "t": 30 if changed else 8, "b": 44},
            "showlegend": changed,
            "bargap": 0.25,
        },
    )


def _escaped(tokens: Sequence[str]) -> list[str]:
    """Tokens as Plotly shows them letter by letter: it takes <s> for a tag, and a link for a link."""
    return [token.replace("&", "&amp;").replace("<", "&lt;") for token in tokens]


def _map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], number: str, across: str = "key", **options: object
) -> go.Heatmap:
    """A heat map with positions as coordinates, for tokens repeat. The pointer shows an axis's own labels; where those
    are thinned out, or there are none, the names come along with the numbers."""
    names = {}
    query, target = "%{y}", "%{x}"
    if len(columns) > _MAX_LABELS or across != "key":
        both = np.empty((*values.shape, 2), dtype=object)
        both[..., 0], both[..., 1] = np.asarray(rows, dtype=object)[:, None], np.asarray(columns, dtype=object)[None, :]
        names["customdata"] = both
        query, target = "%{customdata[0]}", "%{customdata[1]}"
    return go.Heatmap(
        z=values.astype(np.float32),
        hovertemplate=f"query “{query}”<br>{across} “{target}”<br>{number}<extra></extra>",
        **names,
        **options,
    )


def _scale(title: str, tickformat: str) -> dict[str, object]:
    """A colour scale that lies above its map: it costs no width, which phones do not have."""
    return {
        "title": {"text": title, "side": "top"},
        "tickformat": tickformat,
        "orientation": "h",
        "x": 0.5,
        "y": 1.01,
        "yanchor": "bottom",
        "len": 0.6,
        "thickness": 10,
        "outlinewidth": 0,
    }


def _weights_map(
    matrix: np.ndarray, tokens: Sequence[str], allowed: np.ndarray | None, colorbar: dict | None
) -> go.Heatmap:
    shown = matrix if allowed is None else np.where(allowed, matrix, np.nan)
    bar = {"colorbar": colorbar} if colorbar else {"showscale": False}
    return _map(shown, tokens, tokens, "%{z:.2%}", colorscale=SQUARE_ROOT, zmin=0, zmax=1, hoverongaps=False, **bar)


def _ticks(tokens: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and labels, thinned out when there are too many to read."""
    step = math.ceil(len(tokens) / _MAX_LABELS)
    positions = list(range(0, len(tokens), step))
    return positions, [tokens[position] for position in positions]


def _range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest number of `values`, −∞ left out; 0 and 0 if nothing is left."""
    finite = values[np.isfinite(values)]
    return (finite.min(), finite.max()) if finite.size else (0.0, 0.0)


def _width(labels: Sequence[str]) -> int:
    """Pixels that the longest label takes, about: fixed margins draw much faster than Plotly's automatic ones."""
    return min(130, 8 * max(map(len, labels), default=0))


def _below(labels: Sequence[str]) -> dict[str, int]:
    """Angle of the labels of a horizontal axis, and the margin that they and the axis's title take below it."""
    angle = -60 if len(labels) > 6 else 0
    return {"angle": angle, "margin": 56 if angle == 0 else 52 + round(0.87 * _width(labels))}


def _token_layout(tokens: Sequence[str]) -> dict[str, object]:
    """A square map with the tokens along both axes. One dict: Plotly checks it once, and not at every update."""
    positions, labels = _ticks(tokens)
    below = _below(labels)
    axis = {"tickvals": positions, "ticktext": labels, "showgrid": False, "zeroline": False, "constrain": "domain"}
    return {
        "height": 64 + _MAP_SIDE + below["margin"],
        "margin": {"l": 44 + _width(labels), "r": 12, "t": 64, "b": below["margin"]},
        "xaxis": {**axis, "title": {"text": "key →"}, "tickangle": below["angle"]},
        "yaxis": {**axis, "title": {"text": "query ↓"}, "autorange": "reversed", "scaleanchor": "x"},
    }


def _frames(cell: Cell | None, mode: theme.Mode) -> dict[str, object]:
    return {"shapes": [_rectangle(cell, mode)]} if cell else {}


def _rectangle(cell: Cell, mode: theme.Mode) -> dict[str, object]:
    query, key = cell
    line = {"color": theme.CATEGORIES[mode][1], "width": 2}
    return {"type": "rect", "x0": key - 0.5, "x1": key + 0.5, "y0": query - 0.5, "y1": query + 0.5, "line": line}


def _arc_path(query: np.ndarray, key: np.ndarray) -> tuple[list[float | None], list[float | None]]:
    """Half circles from query to key as one line, broken by None."""
    angle = np.linspace(0, math.pi, ARC_POINTS)
    centre, radius = (query + key) / 2, np.abs(query - key) / 2
    radius = np.where(radius == 0, 0.18, radius)  # a token that looks at itself is a small hump
    x = centre[:, None] + radius[:, None] * np.cos(angle)
    y = radius[:, None] * np.sin(angle)
    gap = np.full((len(query), 1), np.nan)
    return np.hstack([x, gap]).ravel(), np.hstack([y, gap]).ravel()


def _mosaic(
    attention: np.ndarray, grid: Sequence[Sequence[Cell | None]], rows: int, columns: int, header: float, side: int
) -> str:
    """All maps of the grid in one PNG with a palette, as a data URI; blank where a causal model cannot look.

    `header` is the share of each place that stays free above its map, `side` the pixels along a map on the page. A cell
    of a map is a square of whole pixels.
    """
    length = attention.shape[-1]
    pool = math.ceil(length / _THUMBNAIL)
    cells = math.ceil(length / pool)
    zoom = math.ceil(_DENSITY * side / cells)
    gap = math.ceil(_GAP * cells * zoom / side)
    size = cells * zoom + gap
    above = round(size * header / (1 - header))
    blank = len(_COLOURS)
    canvas = np.full((rows * (size + above), columns * size), blank, np.uint8)
    causal = not np.triu(attention[0, 0].astype(np.float32), 1).any()
    hidden = np.triu(np.ones((cells, cells), bool), 1) if causal else np.zeros((cells, cells), bool)
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            if cell is None:
                continue
            level = np.sqrt(_pooled(attention[cell].astype(np.float32), pool)) * (blank - 1)
            tile = np.where(hidden, blank, np.clip(level.round(), 0, blank - 1)).astype(np.uint8)
            top, left = y * (size + above) + above + gap // 2, x * size + gap // 2
            canvas[top : top + size - gap, left : left + size - gap] = tile.repeat(zoom, 0).repeat(zoom, 1)
    image = Image.fromarray(canvas, mode="P")
    palette = [round(part) for colour in _COLOURS for part in unlabel_rgb(colour)]
    image.putpalette([*palette, 0, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=blank)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pooled(matrix: np.ndarray, pool: int) -> np.ndarray:
    """The largest of every pool × pool block: a thin line of attention must not vanish when it is made small."""
    if pool == 1:
        return matrix
    side = math.ceil(len(matrix) / pool)
    padded = np.zeros((side * pool, side * pool), matrix.dtype)
    padded[: len(matrix), : len(matrix)] = matrix
    return padded.reshape(side, pool, side, pool).max((1, 3))
