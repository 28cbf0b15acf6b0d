"""The picture of two inputs that a bias pushes apart. Legend: S rounds."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ui import theme

_FLOOR = 1e-8  # of a loss on the logarithmic axis: float32 has nothing below


def split(
    lead: np.ndarray,
    handicap: np.ndarray,
    chosen: np.ndarray,
    loss: np.ndarray,
    unit: str,
    *,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Above, by how much each input prefers expert 0, and the line that the bias draws between the experts; in the
    middle, which one each takes; below, their errors.

    Args:
        lead: (S + 1, 2), score for expert 0 minus score for expert 1.
        handicap: (S + 1,): an input whose lead is above it takes expert 0.
        chosen: (S + 1, 2), 0 or 1.
        loss: (S + 1, 2), mean squared errors.
        unit: of the scores.
        mode: light or dark.
    """
    colours, surface = theme.CATEGORIES[mode], theme.SURFACES[mode]
    rounds = np.arange(len(lead))
    fig = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.5, 0.14, 0.36])
    for index, name in enumerate(("input A", "input B")):
        colour, dash = colours[index], ("solid", "dash")[index]
        shared = {"x": rounds, "mode": "lines", "name": name, "legendgroup": name}
        fig.add_scatter(
            y=lead[:, index],
            line={"color": colour, "width": 3, "dash": dash},
            hovertemplate="%{y:.3f}",
            **shared,
            row=1,
            col=1,
        )
        fig.add_scatter(
            y=np.maximum(loss[:, index], _FLOOR),
            line={"color": colour, "width": 2, "dash": dash},
            showlegend=False,
            customdata=loss[:, index],
            hovertemplate="%{customdata:.3g}",
            **shared,
            row=3,
            col=1,
        )
    fig.add_scatter(
        x=rounds,
        y=handicap,
        mode="lines",
        name="the bias: above it expert 0, below it expert 1",
        line={"color": surface.ink, "width": 2, "dash": "dot"},
        hovertemplate="%{y:.3f}",
        row=1,
        col=1,
    )
    fig.add_heatmap(
        z=chosen.T,
        x=rounds,
        y=["A", "B"],
        zmin=0,
        zmax=1,
        colorscale=[[0, colours[2]], [0.5, colours[2]], [0.5, colours[3]], [1, colours[3]]],
        showscale=False,
        ygap=2,
        hovertemplate="input %{y} takes expert %{z}<extra></extra>",
        row=2,
        col=1,
    )
    for index, name in ((2, "expert 0"), (3, "expert 1")):
        square = {"symbol": "square", "size": 11, "color": colours[index]}
        fig.add_scatter(x=[None], y=[None], mode="markers", marker=square, name=name, hoverinfo="skip", row=1, col=1)
    fig.update_xaxes(range=[-0.5, len(lead) - 0.5], zeroline=False)
    fig.update_xaxes(title="round", row=3)
    fig.update_yaxes(title=f"lead of expert 0, {unit}", row=1)
    fig.update_yaxes(title="takes", autorange="reversed", showgrid=False, row=2)
    fig.update_yaxes(
        title="squared error", type="log", exponentformat="power", dtick=2 if loss.min() < 1e-3 else 1, row=3
    )
    return fig.update_layout(margin={"l": 64, "r": 14, "t": 76, "b": 48}, hovermode="x unified")
