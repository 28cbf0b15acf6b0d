"""A number for every linear layer of a model: blocks down, kinds of layers across.

Legend: B blocks, K kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from ui import theme

_FRAME = theme.CATEGORIES["light"][1]  # is seen on either end of cividis
_LABELS = 16
_LETTER, _SLANT = 7, 4.5  # pixels of a label's letter, and what it adds below where the label is slanted
_FLAT = 0.75  # of the largest: a scale that began above this would make small differences look like large ones


def layer_map(
    values: np.ndarray,
    blocks: Sequence[str],
    kinds: Sequence[str],
    *,
    title: str,
    tickformat: str,
    hover: Sequence[Sequence[str]],
    across: str = "",
    signed: bool = False,
    chosen: tuple[int, int] | None = None,
    mode: theme.Mode = "light",
) -> go.Figure:
    """One number for every layer; blank where there is no layer, or none measured yet.

    Args:
        values: (B, K), NaN where there is nothing.
        blocks: B names.
        kinds: K names.
        title: of the colour scale.
        tickformat: of its numbers.
        hover: B × K texts.
        across: title of the horizontal axis, for kinds that are numbers.
        signed: whether 0 is in the middle of the scale, not at its end.
        chosen: row and column to frame.
        mode: light or dark.
    """
    known = values[np.isfinite(values)]
    limit = max(float(np.abs(known).max(initial=0)), 1e-12)
    low = -limit if signed else min(float(known.min(initial=limit)), _FLAT * limit)
    step = -(-len(blocks) // _LABELS)
    fig = go.Figure(
        go.Heatmap(
            z=values,
            zmin=low,
            zmax=limit,
            colorscale=theme.signed(mode) if signed else theme.MAGNITUDE,
            colorbar={
                "title": {"text": title, "side": "top"},
                "tickformat": tickformat,
                "nticks": 4,
                "tickvals": [low, 0, limit] if signed else None,  # round ones may all lie outside
                "orientation": "h",
                "x": 0.5,
                "y": 1.01,
                "yanchor": "bottom",
                "len": 0.8,
                "thickness": 10,
                "outlinewidth": 0,
            },
            xgap=1,
            ygap=1,
            hoverongaps=False,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    left = max(64, 44 + _LETTER * max(map(len, blocks), default=0))
    below = 46 if across else max(78, 30 + _SLANT * max(map(len, kinds), default=0))
    fig.update_layout(margin={"l": left, "r": 8, "t": 66, "b": below}, dragmode=False)
    fig.update_xaxes(
        title=across or None,
        tickvals=list(range(len(kinds))),
        ticktext=list(kinds),
        tickangle=0 if across else -35,
        range=[-0.5, len(kinds) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    fig.update_yaxes(
        title="layer ↓",
        tickvals=list(range(0, len(blocks), step)),
        ticktext=list(blocks[::step]),
        ticklabelstandoff=4,
        range=[len(blocks) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    if chosen is not None:
        row, column = chosen
        line = {"color": _FRAME, "width": 3}
        fig.add_shape(type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5, line=line)
    return fig
