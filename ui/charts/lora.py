"""Pictures of low-rank updates: numbers in, Plotly figure out. Nothing here knows of Streamlit or of a model.

What is trained is orange or blue, what stays frozen is grey; magnitudes are drawn in cividis.

Legend: I inputs, O outputs, R rank, N adapted matrices, L layers, P projections, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ui import theme
from ui.charts.training import Line, curves

LARGEST_RANK = 64
_GAP = 0.02  # between W and the strips, as a share of its longer side
_FRAME = theme.CATEGORIES["light"][1]  # is seen on either end of cividis, where the dark mode's is not
_BAR = 0.46  # width of a bar, where the next one is 1 away; the label is above it
_BETWEEN = 0.35  # more between groups
_FEW_DECADES = 2.5
_WIDE = 0.8  # outputs for each input from which W has room for its own label
_BESIDE = 120  # pixels for that label beside W


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    Args:
        label: the rank, or "full".
        trainable: numbers that were trained.
        loss: at the end, nats a token.
        held_out_accuracy, accuracy: shares from 0 to 1, of paraphrases and of training questions.
        rank: None for full fine-tuning.
        settings: what else belongs to the run, in words.
    """

    label: str
    trainable: int
    loss: float
    held_out_accuracy: float
    accuracy: float
    rank: int | None
    settings: str


@dataclass(frozen=True)
class StepBar:
    """What a training step costs one way of training.

    Args:
        label: of the way.
        group: ways of one group stand closer together.
        median_ms: milliseconds a step.
        spread_ms: 10th and 90th percentile; None for what is calculated and not measured.
        peak_gb: memory in GB of 10^9 bytes; None likewise.
        colour: index into `theme.CATEGORIES`; None is the grey of what learns nothing.
    """

    label: str
    group: int
    median_ms: float
    spread_ms: tuple[float, float] | None
    peak_gb: float | None
    colour: int | None


def to_scale(inputs: int, outputs: int, rank: int, *, mode: theme.Mode = "light") -> go.Figure:
    """W and its update A·B, all three drawn to one scale: A stands left of W, B lies above it.

    The axes are those of the largest rank, whatever the rank is: nothing but the strips moves.

    Args:
        inputs, outputs: I and O, of W.
        rank: R.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    gap = _GAP * max(inputs, outputs)
    room = gap + LARGEST_RANK
    numbers = f"{inputs:,} × {outputs:,} = {inputs * outputs:,}"
    fig = go.Figure(
        [
            _block("W, frozen", (0, outputs), (0, inputs), numbers, surface.grid, surface.line),
            _block(
                "A, trained", (-gap - rank, -gap), (0, inputs), f"{inputs:,} × {rank} = {inputs * rank:,}", colours[1]
            ),
            _block(
                "B, trained",
                (0, outputs),
                (-gap - rank, -gap),
                f"{rank} × {outputs:,} = {rank * outputs:,}",
                colours[0],
            ),
        ]
    )
    inside = outputs >= _WIDE * inputs
    frozen = {"x": outputs / 2, "xanchor": "center"} if inside else {"x": outputs, "xanchor": "left", "xshift": 10}
    label = {"showarrow": False, "font": {"size": 14, "color": surface.ink}}
    fig.update_layout(
        annotations=[
            {
                "text": f"<b>W</b>{' ' if inside else '<br>'}{inputs:,} × {outputs:,}<br>{inputs * outputs:,}<br>"
                f"numbers,{' ' if inside else '<br>'}frozen",
                "y": inputs / 2,
                "align": "center" if inside else "left",
                **frozen,
                **label,
            },
            {
                "text": f"<b>A</b> {inputs:,} × {rank}",
                "x": -gap - rank,
                "xshift": -12,
                "y": inputs / 2,
                "textangle": -90,
                **label,
            },
            {
                "text": f"<b>B</b> {rank} × {outputs:,}",
                "x": 0 if not inside else outputs / 2,
                "xanchor": "center" if inside else "left",
                "y": -gap - rank,
                "yanchor": "bottom",
                **label,
            },
        ],
        margin={"l": 40, "r": 24 if inside else _BESIDE, "t": 30, "b": 10},
        showlegend=False,
        dragmode=False,
    )
    fig.update_xaxes(visible=False, range=[-room, outputs], constrain="domain", fixedrange=True)
    fig.update_yaxes(
        visible=False, range=[inputs, -room], constrain="domain", scaleanchor="x", scaleratio=1, fixedrange=True
    )
    return fig


def layer_map(
    values: np.ndarray,
    layers: Sequence[int],
    projections: Sequence[str],
    *,
    chosen: tuple[int, int] | None = None,
) -> go.Figure:
    """How much each matrix was changed, by layer (down) and projection (across); blank where there is no adapter.

    Args:
        values: (L, P) ‖ΔW‖ / ‖W‖, NaN where there is none.
        layers: their numbers.
        projections: their names.
        chosen: row and column to frame.
    """
    step = -(-len(layers) // 16)
    fig = go.Figure(
        go.Heatmap(
            z=values,
            zmin=0,
            colorscale=theme.MAGNITUDE,
            colorbar=_scale("‖ΔW‖ / ‖W‖", ".2~p"),
            xgap=1,
            ygap=1,
            hoverongaps=False,
            customdata=[[f"layer {layer}, {name}" for name in projections] for layer in layers],
            hovertemplate="%{customdata}<br>‖ΔW‖ / ‖W‖ = %{z:.2%}<extra></extra>",
        )
    )
    fig.update_layout(margin={"l": 52, "r": 8, "t": 62, "b": 70}, dragmode=False)
    fig.update_xaxes(
        title="projection", tickvals=list(range(len(projections))), ticktext=list(projections), tickangle=-30,
        showgrid=False, zeroline=False,
    )  # fmt: skip
    fig.update_yaxes(
        title="layer ↓",
        tickvals=list(range(0, len(layers), step)),
        ticktext=[str(layer) for layer in layers[::step]],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    if chosen is not None:
        row, column = chosen
        line = {"color": _FRAME, "width": 3}
        fig.add_shape(type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5, line=line)
    return fig


def delta_map(pooled: np.ndarray, inputs: int, outputs: int) -> go.Figure:
    """|ΔW| of one matrix, each place the largest number of a block; drawn as W is in `to_scale`.

    Args:
        pooled: inputs down, outputs across, each at most 64 blocks.
        inputs, outputs: I and O, of the matrix itself.
    """
    rows, columns = pooled.shape
    fig = go.Figure(
        go.Heatmap(
            z=pooled,
            x=(np.arange(columns) + 0.5) * outputs / columns,
            y=(np.arange(rows) + 0.5) * inputs / rows,
            zmin=0,
            colorscale=theme.MAGNITUDE,
            colorbar=_scale("largest |ΔW| of a block", ".2g"),
            hovertemplate="input %{y:.0f}, output %{x:.0f}<br>|ΔW| up to %{z:.3g}<extra></extra>",
        )
    )
    fig.update_layout(margin={"l": 60, "r": 8, "t": 62, "b": 70}, dragmode=False)
    fig.update_xaxes(title="output →", showgrid=False, zeroline=False)
    fig.update_yaxes(title="input ↓", autorange="reversed", showgrid=False, zeroline=False)
    return fig


def spectrum(spectra: np.ndarray, names: Sequence[str], chosen: int, *, mode: theme.Mode = "light") -> go.Figure:
    """The singular values of every update, those of the chosen one strong.

    Args:
        spectra: (N, K) largest first; a 0 is left out, it has no place on a logarithmic axis.
        names: N labels.
        chosen: row of `spectra` that the learner looks at.
        mode: light or dark.
    """
    places = np.arange(1, spectra.shape[1] + 1)
    seen = np.where(spectra > 0, spectra, np.nan)
    gap = np.full((len(spectra), 1), np.nan)
    others = {
        "type": "scatter",
        "x": np.tile(np.append(places, np.nan), len(spectra)),
        "y": np.hstack([seen, gap]).ravel(),
        "mode": "lines",
        "name": "the others",
        "line": {"color": theme.SURFACES[mode].muted, "width": 1},
        "opacity": 0.35,
        "hoverinfo": "skip",
    }
    strong = {"x": places, "y": seen[chosen], "name": names[chosen], "hovertemplate": "σ%{x} = %{y:.4g}<extra></extra>"}
    return go.Figure(
        [others, _strong(mode) | strong],
        _directions(len(places))
        | {
            "yaxis": {"title": {"text": "singular value of ΔW"}, "type": "log", "exponentformat": "power", "dtick": 1},
            "showlegend": True,
        },
    )


def energy(sigma: np.ndarray, effective_rank: float, *, mode: theme.Mode = "light") -> go.Figure:
    """What the first k directions of one update hold of it, with its effective rank marked.

    Args:
        sigma: (K,) singular values, largest first.
        effective_rank: of them.
        mode: light or dark.
    """
    held = {
        "x": np.arange(1, len(sigma) + 1),
        "y": captured_energy(sigma),
        "hovertemplate": "the first %{x}: %{y:.1%}<extra></extra>",
    }
    fig = go.Figure(
        [_strong(mode) | held],
        _directions(len(sigma))
        | {
            "yaxis": {"title": {"text": "share of ‖ΔW‖² in the first k"}, "tickformat": ".0%", "range": [0, 1.05]},
            "showlegend": False,
        },
    )
    if effective_rank > 0:
        left = effective_rank > len(sigma) / 2
        fig.add_vline(effective_rank, line={"color": theme.CATEGORIES[mode][1], "width": 2, "dash": "dash"})
        fig.add_annotation(
            text=f"effective rank {effective_rank:.1f}",
            x=effective_rank,
            y=0.04,
            xanchor="right" if left else "left",
            yanchor="bottom",
            xshift=-6 if left else 6,
            showarrow=False,
            font={"color": theme.SURFACES[mode].ink},
        )
    return fig


def gradients(
    step: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, span: tuple[float, float], *, mode: theme.Mode = "light"
) -> go.Figure:
    """The norms of the gradients of A and of B, with the place marked where A's is exactly 0.

    Args:
        step: (S,), from 1.
        of_a, of_b: (S,).
        span: of the steps that are shown.
        mode: light or dark.
    """
    shown = (step >= span[0]) & (step <= span[1])
    waits = len(of_a) > 0 and of_a[0] == 0
    lines = [
        Line("of A, exactly 0 at first" if waits else "of A", step[shown], of_a[shown], 1),
        Line("of B", step[shown], of_b[shown], 0),
    ]
    fig = curves(lines, across="step", up="norm of the gradient", span=span, mode=mode)
    if waits:
        fig.add_scatter(
            x=step[:1],
            y=of_a[:1],
            mode="markers",
            marker={"size": 15, "symbol": "circle-open", "line": {"width": 2.5}, "color": theme.CATEGORIES[mode][1]},
            cliponaxis=False,
            showlegend=False,
            hoverinfo="skip",
        )
    return fig


def sweep(
    points: Sequence[SweepPoint], rank: int | None, span: tuple[float, float], *, mode: theme.Mode = "light"
) -> go.Figure:
    """What each rank ends at, loss above and accuracy below, over the numbers that it trains.

    Args:
        points: runs, in any order.
        rank: that of the controls, to be ringed; None for full fine-tuning.
        span: smallest and largest number of parameters that the axis shows, the same from the first point to the last.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    points = sorted(points, key=lambda point: point.trainable)
    trainable = [point.trainable for point in points]
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.07)
    drawn = (
        ("last loss", [point.loss for point in points], colours[2], "circle", "%{y:.3f} nats a token", 1),
        ("paraphrases", [point.held_out_accuracy for point in points], colours[0], "circle", "%{y:.0%}", 2),
        ("training questions", [point.accuracy for point in points], colours[1], "diamond", "%{y:.0%}", 2),
    )
    for name, values, colour, symbol, number, row in drawn:
        fig.add_scatter(
            x=trainable,
            y=values,
            name=name,
            mode="lines+markers+text" if row == 1 else "lines+markers",
            text=[point.label for point in points],
            textposition="top center",
            textfont={"color": surface.ink},
            cliponaxis=False,
            line={"color": colour, "width": 2, "dash": "dot" if symbol == "diamond" else "solid"},
            marker={"size": 9, "symbol": symbol},
            customdata=[point.settings for point in points],
            hovertemplate=f"rank %{{text}}, %{{x:,}} numbers<br>%{{customdata}}<br>{name}: {number}<extra></extra>",
            row=row,
            col=1,
        )
    marked = next((point for point in points if point.rank == rank), None)
    if marked is not None:
        for row, value in ((1, marked.loss), (2, marked.held_out_accuracy)):
            fig.add_scatter(
                x=[marked.trainable],
                y=[value],
                name="your rank" if rank is not None else "your choice",
                showlegend=row == 1,
                mode="markers",
                marker={"size": 14, "symbol": "circle-open", "line": {"width": 2.5}, "color": surface.ink},
                cliponaxis=False,
                hoverinfo="skip",
                row=row,
                col=1,
            )
    low, high = np.log10(span)
    margin = 0.06 * max(high - low, 0.5)
    fig.update_xaxes(type="log", exponentformat="SI", dtick=1, range=[low - margin, high + margin])
    fig.update_xaxes(title="numbers trained", row=2)
    seen = _loss_range([point.loss for point in points])
    ticks = "D2" if seen[1] - seen[0] < _FEW_DECADES else 1  # D2: at 1, 2 and 5
    fig.update_yaxes(title="loss, nats a token", type="log", range=seen, dtick=ticks, tickformat="~g", row=1)
    fig.update_yaxes(title="answers right", tickformat=".0%", range=[-0.04, 1.06], row=2)
    fig.update_layout(
        margin={"l": 64, "r": 20, "t": 44, "b": 50}, legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    )
    return fig


def steps(bars: Sequence[StepBar], note: str, *, mode: theme.Mode = "light") -> go.Figure:
    """Milliseconds of a training step and, beside them, its memory at the peak; labels above the bars, as on phones
    there is no room beside them.

    Args:
        bars: from top to bottom, one of them measured.
        note: stands below the axes: where and when this was recorded.
        mode: light or dark.
    """
    surface, colours = theme.SURFACES[mode], theme.CATEGORIES[mode]
    between = [_BETWEEN * (bar.group != before.group) for before, bar in pairwise(bars)]
    heights = [place + gap for place, gap in enumerate(np.cumsum([0.0, *between]).tolist())]
    placed = list(zip(bars, heights, strict=True))
    measured = [(bar, height) for bar, height in placed if bar.spread_ms is not None]
    calculated = [(bar, height) for bar, height in placed if bar.spread_ms is None]
    marker = {"color": [surface.muted if bar.colour is None else colours[bar.colour] for bar, _ in measured]}
    shared = {"y": [height for _, height in measured], "marker": marker}
    fig = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.64, 0.36], horizontal_spacing=0.06)
    fig.add_bar(
        x=[bar.median_ms for bar, _ in measured],
        error_x={
            "array": [bar.spread_ms[1] - bar.median_ms for bar, _ in measured],
            "arrayminus": [bar.median_ms - bar.spread_ms[0] for bar, _ in measured],
            "color": surface.ink,
            "thickness": 1.5,
            "width": 4,
        },
        customdata=[[bar.label, *bar.spread_ms] for bar, _ in measured],
        hovertemplate="%{customdata[0]}<br>%{x:.1f} ms, %{customdata[1]:.1f} to %{customdata[2]:.1f}<extra></extra>",
        **shared,
        row=1,
        col=1,
    )
    fig.add_bar(
        x=[bar.peak_gb for bar, _ in measured],
        customdata=[bar.label for bar, _ in measured],
        hovertemplate="%{customdata}<br>%{x:.1f} GB<extra></extra>",
        **shared,
        row=1,
        col=2,
    )
    fig.add_bar(
        x=[bar.median_ms for bar, _ in calculated],
        y=[height for _, height in calculated],
        marker={"color": surface.muted},
        customdata=[bar.label for bar, _ in calculated],
        hovertemplate="%{customdata}<br>%{x:.1f} ms<extra></extra>",
        row=1,
        col=1,
    )
    ends = [bar.median_ms if bar.spread_ms is None else bar.spread_ms[1] for bar in bars]
    weights = [bar.peak_gb for bar, _ in measured]
    for column, right, up, values in (
        (1, ends, heights, [bar.median_ms for bar in bars]),
        (2, weights, shared["y"], weights),
    ):
        fig.add_scatter(
            x=right,
            y=up,
            mode="text",
            text=[f"\u00a0{value:.1f}" for value in values],
            textposition="middle right",
            textfont={"color": surface.ink, "size": 12},
            cliponaxis=False,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    fig.update_traces(width=_BAR, orientation="h", selector={"type": "bar"})
    label = {"showarrow": False, "xanchor": "left", "font": {"size": 13, "color": surface.ink}}
    fig.update_layout(
        annotations=[
            {"text": bar.label, "x": 0, "y": height - _BAR / 2, "yanchor": "bottom", "xshift": -3, **label}
            for bar, height in zip(bars, heights, strict=True)
        ]
        + [
            {
                "text": note,
                "xref": "paper",
                "yref": "paper",
                "x": 0,
                "y": 0,
                "yshift": -44,
                "yanchor": "top",
                "align": "left",
                **label,
                "font": {"size": 12, "color": surface.muted},
            }
        ],
        margin={"l": 10, "r": 16, "t": 8, "b": 84},
        showlegend=False,
        dragmode=False,
    )
    fig.update_yaxes(visible=False, range=[heights[-1] + 0.5, -0.8], fixedrange=True)
    fig.update_xaxes(range=[0, 1.25 * max(ends)], title="ms a step", nticks=5, row=1, col=1)
    fig.update_xaxes(range=[0, 1.4 * max(weights)], title="GB at the peak", nticks=4, row=1, col=2)
    fig.update_xaxes(title_standoff=4, fixedrange=True)
    return fig


def captured_energy(sigma: np.ndarray) -> np.ndarray:
    """The share of ‖ΔW‖² that the first k directions hold, Σ_{i≤k} σᵢ² / Σ σᵢ², for every k, (R,); 0 if ΔW = 0."""
    energy = np.square(sigma, dtype=np.float64)
    total = energy.sum()
    return energy.cumsum() / total if total > 0 else np.zeros_like(energy)


def _loss_range(losses: Sequence[float]) -> list[float]:
    """log₁₀ of what a logarithmic axis of losses shows, with room for the label above the highest.

    A run that diverged has none; a loss that has become 0 in its precision has no place.
    """
    seen = [math.log10(loss) for loss in losses if loss > 0]
    low, high = (min(seen), max(seen)) if seen else (-1.0, 0.0)
    room = max(high - low, 0.8)  # at least a decade in all, so that there are ticks
    missing = (room - (high - low)) / 2
    return [low - missing - 0.1 * room, high + missing + 0.2 * room]


def _block(
    name: str, x: tuple[float, float], y: tuple[float, float], numbers: str, fill: str, edge: str | None = None
) -> go.Scatter:
    """A filled rectangle. Its edge of one pixel is what is left of a strip that is thinner than the screen can show."""
    (left, right), (top, bottom) = x, y
    return go.Scatter(
        x=[left, right, right, left, left],
        y=[top, top, bottom, bottom, top],
        name=name,
        text=f"{name}: {numbers} numbers",
        mode="lines",
        fill="toself",
        fillcolor=fill,
        line={"color": edge or fill, "width": 1},
        hoveron="fills",
        hoverinfo="text",
    )


def _strong(mode: theme.Mode) -> dict[str, object]:
    """The line that the learner looks at."""
    colour = theme.CATEGORIES[mode][0]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2},
        "marker": {"size": 6, "color": colour},
    }


def _directions(count: int) -> dict[str, object]:
    """A layout with the directions of an update across."""
    return {
        "margin": {"l": 64, "r": 14, "t": 40, "b": 50},
        "xaxis": {
            "title": {"text": "direction k, the strongest first"},
            "range": [0.5, count + 0.5],
            "tick0": 1 if count <= 8 else 0,
            "dtick": max(1, 2 ** round(math.log2(count / 8))) if count > 8 else 1,
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }


def _scale(title: str, tickformat: str) -> dict[str, object]:
    """A colour scale above its map: it costs no width, which phones do not have."""
    return {
        "title": {"text": title, "side": "top"},
        "tickformat": tickformat,
        "nticks": 4,
        "orientation": "h",
        "x": 0.5,
        "y": 1.01,
        "yanchor": "bottom",
        "len": 0.7,
        "thickness": 10,
        "outlinewidth": 0,
    }
