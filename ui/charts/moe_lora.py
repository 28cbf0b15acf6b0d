"""Pictures of a mixture of adapters: arrays in, Plotly figure out. Shares are drawn in cividis, experts in the
colours of categories, what has a sign on a diverging scale.

Legend: M checkups, J tasks, E experts, R rank, L layers, P projections.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from ui import theme

_DASHES = ("solid", "dash")
_FRAME = theme.CATEGORIES["light"][1]  # is seen on either end of cividis, where the dark mode's is not
_TEXT_SIZE = 13
_TITLE_SIZE = 15.6  # of an axis, Plotly's own for this text


def routing(
    checked: np.ndarray,
    shares: np.ndarray,
    tasks: Sequence[str],
    span: tuple[float, float],
    *,
    mode: theme.Mode = "light",
) -> go.Figure:
    """Which experts the tokens of each task go to, checkup after checkup: a map for every task, all on one scale,
    which ends at the largest share.

    Args:
        checked: (M,) steps.
        shares: (M, J, E), rows sum to 1.
        tasks: J names.
        span: of the steps that are shown.
        mode: light or dark.
    """
    experts = shares.shape[2]
    fig = make_subplots(len(tasks), 1, shared_xaxes=True, vertical_spacing=0.05, subplot_titles=list(tasks))
    for index, task in enumerate(tasks):
        fig.add_heatmap(
            z=shares[:, index].T,
            x=_edges(checked, span),
            y=list(range(experts)),
            coloraxis="coloraxis",
            customdata=np.tile(checked, (experts, 1)),
            hovertemplate=f"{task}, after step %{{customdata}}<br>expert %{{y}}: %{{z:.0%}} of its tokens"
            "<extra></extra>",
            row=index + 1,
            col=1,
        )
    fig.update_xaxes(range=list(span), showgrid=False, zeroline=False)
    fig.update_xaxes(title="step", row=len(tasks))
    fig.update_yaxes(title="expert", dtick=1, autorange="reversed", showgrid=False, zeroline=False)
    fig.update_annotations(font={"size": _TEXT_SIZE, "color": theme.SURFACES[mode].ink}, x=0, xanchor="left")
    return fig.update_layout(
        coloraxis=_magnitude("share of the task's tokens", float(shares.max()), above=1.05),
        margin={"l": 46, "r": 12, "t": 92, "b": 54},
        dragmode=False,
    )


def information(
    values: np.ndarray, layers: Sequence[int], projections: Sequence[str], chosen: tuple[int, int]
) -> go.Figure:
    """What a token's expert tells of its task, by layer (down) and projection (across).

    Args:
        values: (L, P), from 0 to 1, NaN where there is no mixture.
        layers: their numbers.
        projections: their names.
        chosen: row and column to frame.
    """
    every = -(-len(layers) // 16)
    fig = go.Figure(
        go.Heatmap(
            z=values,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            customdata=[[f"layer {layer}, {name}" for name in projections] for layer in layers],
            hovertemplate="%{customdata}<br>tells %{z:.1%} of the task<extra></extra>",
        )
    )
    row, column = chosen
    line = {"color": _FRAME, "width": 3}
    fig.add_shape(type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5, line=line)
    highest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    fig.update_layout(
        coloraxis=_magnitude("of the task told", highest or 1.0),
        margin={"l": 52, "r": 8, "t": 62, "b": 70},
        dragmode=False,
    )
    fig.update_xaxes(
        title="projection", tickvals=list(range(len(projections))), ticktext=list(projections), tickangle=-30,
        showgrid=False, zeroline=False,
    )  # fmt: skip
    return fig.update_yaxes(
        title="layer ↓",
        tickvals=list(range(0, len(layers), every)),
        ticktext=[str(layer) for layer in layers[::every]],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )


def spectra(sigma: np.ndarray, *, mode: theme.Mode = "light") -> go.Figure:
    """The singular values of each expert's update in one projection.

    Args:
        sigma: (E, R), largest first; a 0 is left out, it has no place on a logarithmic axis.
        mode: light or dark.
    """
    colours = theme.CATEGORIES[mode]
    places = np.arange(1, sigma.shape[1] + 1)
    fig = go.Figure(
        [
            go.Scatter(
                x=places,
                y=np.where(values > 0, values, np.nan),
                name=f"expert {index}",
                mode="lines+markers",
                line={"color": colours[index % len(colours)], "width": 2, "dash": _DASHES[index // len(colours)]},
                marker={"size": 8, "symbol": index},
                hovertemplate=f"expert {index}: σ%{{x}} = %{{y:.3g}}<extra></extra>",
            )
            for index, values in enumerate(sigma)
        ]
    )
    fig.update_xaxes(
        title="direction k, the strongest first",
        range=[0.7, len(places) + 0.3],
        dtick=1 if len(places) <= 8 else 2,
        tick0=1,
    )
    fig.update_yaxes(
        title="singular value of ΔW", type="log", dtick="D2" if _decades(sigma) < 2 else 1, tickformat="~g"
    )
    return fig.update_layout(margin={"l": 62, "r": 14, "t": 62, "b": 50}, showlegend=True)


def similarity(cosines: np.ndarray, *, mode: theme.Mode = "light") -> go.Figure:
    """How alike the experts' updates of one projection are, from −1 to 1, (E, E)."""
    experts = len(cosines)
    fig = go.Figure(
        _signed_cells(
            cosines,
            [f"{place}" for place in range(experts)],
            [f"{place}" for place in range(experts)],
            1.0,
            [[f"{round(float(value), 2) + 0.0:.2f}" for value in row] for row in cosines],
            "experts %{y} and %{x}: cosine %{z:.3f}<extra></extra>",
            "cosine of the updates",
            mode,
        )
    )
    fig.add_annotation(  # an axis title keeps clear of tick labels only where one stands right above it
        text="expert", x=0.5, xref="x domain", y=0, yref="y domain", yshift=-36, showarrow=False,
        font={"size": _TITLE_SIZE},
    )  # fmt: skip
    fig.update_xaxes(type="category", showgrid=False, zeroline=False)
    fig.update_yaxes(title="expert", autorange="reversed", type="category", showgrid=False, zeroline=False)
    return fig.update_layout(margin={"l": 52, "r": 8, "t": 62, "b": 50}, dragmode=False)


def without(
    change: np.ndarray,
    right: np.ndarray,
    tasks: Sequence[str],
    columns: Sequence[str],
    across: str,
    limit: float,
    *,
    mode: theme.Mode = "light",
) -> go.Figure:
    """What becomes of each task (down) when something is switched off (across).

    Args:
        change: (J, columns) of the loss, in nats a token.
        right: (J, columns), share of the questions that are still answered rightly, written into the cells.
        tasks: J names.
        columns: what is switched off.
        across: title of the horizontal axis.
        limit: largest change that the scale shows, so that two such figures share it.
        mode: light or dark.
    """
    words = [
        [f"{round(float(value), 2) + 0.0:+.2f}<br>{share:.0%} right" for value, share in zip(*row, strict=True)]
        for row in zip(change, right, strict=True)
    ]
    fig = go.Figure(
        _signed_cells(
            change,
            list(columns),
            list(tasks),
            limit or 1.0,
            words,
            "%{y} without %{x}: loss %{z:+.3f}<extra></extra>",
            "change of the loss, nats a token",
            mode,
        )
    )
    fig.update_xaxes(title=across, type="category", showgrid=False, zeroline=False)
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False, zeroline=False)
    return fig.update_layout(margin={"l": 84, "r": 8, "t": 62, "b": 52}, dragmode=False)


def _signed_cells(
    values: np.ndarray,
    x: Sequence[str],
    y: Sequence[str],
    limit: float,
    words: list[list[str]],
    hover: str,
    title: str,
    mode: theme.Mode,
) -> list[go.Heatmap | go.Scatter]:
    """A map of signed numbers, written into its cells in what can be read there; 0 is the page's own colour."""
    scale = theme.signed(mode)
    places = np.clip((values / limit + 1) / 2, 0, 1).ravel()
    written = go.Scatter(
        x=list(x) * len(y),
        y=[name for name in y for _ in x],
        text=[word for row in words for word in row],
        mode="text",
        textfont={"size": 12, "color": _inks(places, scale)},
        hoverinfo="skip",
        showlegend=False,
    )
    cells = go.Heatmap(
        z=values,
        x=list(x),
        y=list(y),
        zmin=-limit,
        zmax=limit,
        zmid=0,
        colorscale=scale,
        colorbar=_above(title),
        xgap=1,
        ygap=1,
        hovertemplate=hover,
    )
    return [cells, written]


def _inks(places: np.ndarray, scale: theme.ColorScale) -> list[str]:
    """Black or white for each place on the scale: the better has a contrast of 4.5 or more (WCAG 2) to any colour."""
    stops, colours = zip(*scale, strict=True)
    channels = np.array([hex_to_rgb(colour) for colour in colours])  # (stops, 3)
    behind = _luminance(np.stack([np.interp(places, stops, channel) for channel in channels.T], axis=-1))
    return ["#000000" if dark else "#FFFFFF" for dark in (behind + 0.05) / 0.05 > 1.05 / (behind + 0.05)]


def _luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance of (…, 3) sRGB from 0 to 255."""
    share = rgb / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


def _edges(checked: np.ndarray, span: tuple[float, float]) -> list[float]:
    """Where the columns of a map begin and end: half-way between checkups, the outer ones at the first and last."""
    middle = (checked[1:] + checked[:-1]) / 2
    if len(checked) < 2:
        return [span[0], span[0] + 0.04 * (span[1] - span[0])]
    return [float(checked[0]), *middle.tolist(), float(checked[-1])]


def _decades(sigma: np.ndarray) -> float:
    seen = sigma[sigma > 0]
    return float(np.log10(seen.max() / seen.min())) if len(seen) else 0.0


def _magnitude(title: str, highest: float, above: float = 1.01) -> dict[str, object]:
    ticks = [0, highest / 2, highest]
    return {
        "cmin": 0,
        "cmax": highest,
        "colorscale": theme.MAGNITUDE,
        "colorbar": _above(title)
        | {"tickvals": ticks, "ticktext": [f"{tick:.{0 if highest > 0.2 else 1}%}" for tick in ticks], "y": above},
    }


def _above(title: str) -> dict[str, object]:
    """A colour scale above its map: it costs no width, which phones do not have."""
    return {
        "title": {"text": title, "side": "top"},
        "nticks": 5,
        "orientation": "h",
        "x": 0.5,
        "y": 1.01,
        "yanchor": "bottom",
        "len": 0.7,
        "thickness": 10,
        "outlinewidth": 0,
    }
