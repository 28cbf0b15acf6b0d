"""A picture of throughput: ours beside bitsandbytes, tensor by tensor, below what a copy reaches."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from ui import theme


def throughput(
    tensors: Sequence[str], ways: dict[str, Sequence[float]], copies: Sequence[float], *, mode: theme.Mode = "light"
) -> go.Figure:
    """GB/s of every way, a group of bars for each tensor.

    Args:
        tensors: shape and dtype of each.
        ways: GB/s on each tensor, by what the way is called.
        copies: GB/s of copying each.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    fig = go.Figure()
    for index, (way, rates) in enumerate(ways.items()):
        fig.add_bar(
            x=list(tensors),
            y=list(rates),
            name=way,
            marker={"color": colours[index]},
            hovertemplate=f"{way}<br>%{{x}}: %{{y:,.0f}} GB/s<extra></extra>",
        )
    fig.add_scatter(
        x=list(tensors),
        y=list(copies),
        name="a copy",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 60, "color": surface.ink, "line": {"width": 2}},
        hovertemplate="a copy of %{x}: %{y:,.0f} GB/s<extra></extra>",
    )
    fig.update_layout(
        margin={"l": 66, "r": 14, "t": 64, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
        barmode="group",
    )
    fig.update_xaxes(showgrid=False)
    fig.update_yaxes(title="GB/s, read and written", rangemode="tozero", tickformat=",", nticks=6)
    return fig
