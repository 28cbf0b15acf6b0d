"""Pictures of a training run: arrays in, Plotly figure out. What was recorded elsewhere is dashed and grey.

Legend: P period of random tokens said twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ui import theme
from ui.charts.attention import SQUARE_ROOT

WINDOW = 15
"""Steps over which a noisy curve is averaged."""

_MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: in the legend.
        x, y: its points.
        colour: index into `theme.CATEGORIES`; None is the grey of what was recorded, dashed.
        raw: whether these are single steps: they are drawn faintly behind their smoothed curve, which alone is drawn
            of what was recorded.
        dotted: whether it is, so that one that lies under it is seen.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int | None = 0
    raw: bool = False
    dotted: bool = False


def curves(
    lines: Sequence[Line],
    *,
    across: str,
    up: str,
    logarithmic: bool = False,
    share: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    moment: tuple[float, str] | None = None,
    span: tuple[float, float] | None = None,
    note: str = "",
    mode: theme.Mode = "light",
) -> go.Figure:
    """Curves over the steps of a run, or over the tokens read.

    Args:
        lines: what to draw; an empty one is left out, and so is a dashed one of a single point, which would not show.
        across, up: titles of the axes, with their units.
        logarithmic: whether the horizontal axis is.
        share: whether the vertical axis is a share from 0 to 1.
        marks: heights to mark with a dotted line, and what to call each.
        moment: a place on the horizontal axis to mark with a thin upright line, and what to call it.
        span: what the horizontal axis shows, so that it stays as it is while a run grows; by default what the curves
            need.
        note: stands below the axis, e.g. where and when the dashed curves were recorded.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    vertical = {"title": {"text": up}, "rangemode": "tozero" if not share else "normal"}
    if share:
        vertical |= {"range": [-0.02, 1.05], "tickformat": ".0%"}
    horizontal = {
        "title": {"text": across, "standoff": 6},
        **({"type": "log", "exponentformat": "SI"} if logarithmic else {}),
    }
    if span is not None:
        horizontal["range"] = _padded(*np.log10(span)) if logarithmic else _padded(*span)
    upright, named = _moment(moment, logarithmic, mode) if moment else ([], [])
    traces = [trace for line in lines if len(line.x) > (line.colour is None) for trace in _traces(line, share, mode)]
    return go.Figure(
        traces,
        {
            "margin": {"l": 56, "r": 14, "t": 58, "b": 66},
            "xaxis": horizontal,
            "yaxis": vertical,
            "hovermode": "x unified",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "showlegend": True,
            "shapes": [
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": height,
                    "y1": height,
                    "line": {"color": surface.muted, "width": 1, "dash": "dot"},
                }
                for height, _ in marks
            ]
            + upright,
            "annotations": [
                {
                    "text": label,
                    "xref": "paper",
                    "x": 1,
                    "xanchor": "right",
                    "y": height,
                    "yanchor": "bottom",
                    "showarrow": False,
                    "font": {"size": 12, "color": surface.muted},
                }
                for height, label in marks
            ]
            + named
            + [
                {
                    "text": note,
                    "xref": "paper",
                    "x": 0,
                    "xanchor": "left",
                    "yref": "paper",
                    "y": 0,
                    "yshift": -46,
                    "yanchor": "top",
                    "showarrow": False,
                    "font": {"size": 12, "color": surface.muted},
                }
            ][: bool(note)],
        },
    )


def table(lines: Sequence[Line], across: str) -> pd.DataFrame:
    """Every point of every curve, a row each: `across`, the curve's name, its value."""
    return pd.concat(
        [pd.DataFrame({across: line.x, "curve": line.name, "value": line.y}) for line in lines], ignore_index=True
    )


def look_back(before: np.ndarray, now: np.ndarray, titles: tuple[str, str], *, mode: theme.Mode = "light") -> go.Figure:
    """One head's attention on random tokens said twice, at two times; where an induction head looks lies between lines.

    Args:
        before, now: (2P, 2P) weights, query × key; what the causal mask forbids is left blank.
        titles: of the two.
        mode: light or dark.
    """
    surface, length = theme.SURFACES[mode], len(now)
    fig = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    allowed = np.tri(length, dtype=bool)
    for column, weights in enumerate((before, now), start=1):
        fig.add_heatmap(
            z=np.where(allowed, weights.astype(np.float32), np.nan),
            zmin=0,
            zmax=1,
            colorscale=SQUARE_ROOT,
            showscale=False,
            hoverongaps=False,
            hovertemplate="%{y} looks at %{x}: %{z:.0%}<extra></extra>",
            row=1,
            col=column,
        )
        for side in (-1, 1):
            fig.add_shape(
                type="line",
                x0=1 + side,
                y0=length // 2,
                x1=length // 2 + side,
                y1=length - 1,
                line={"color": theme.CATEGORIES[mode][1], "width": 1},
                row=1,
                col=column,
            )
    axis = {"showgrid": False, "zeroline": False, "constrain": "domain", "dtick": length // 2}
    fig.update_xaxes(
        title={"text": "looks at token", "standoff": 4}, range=[-0.5, length - 0.5], scaleanchor="y", **axis
    )
    fig.update_yaxes(range=[length - 0.5, -0.5], **axis)
    fig.update_yaxes(title="token", col=1)
    fig.update_annotations(font={"size": 12, "color": surface.muted})
    return fig.update_layout(margin={"l": 48, "r": 8, "t": 28, "b": 44}, dragmode=False)


def smoothed(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """The mean of `window` values around each place, of as many on either side as there are on both.

    So it lags behind nothing, and begins and ends with the values themselves.
    """
    place = np.arange(len(values))
    side = np.minimum(window // 2, np.minimum(place, place[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[place + side + 1] - total[place - side]) / (2 * side + 1)


def _moment(
    moment: tuple[float, str], logarithmic: bool, mode: theme.Mode
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """An upright line and its name; on a logarithmic axis Plotly wants a number for the line, its log for the name."""
    (x, name), colour = moment, theme.SURFACES[mode].muted
    line = {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": colour, "width": 1}}
    label = {
        "text": name,
        "x": float(np.log10(x)) if logarithmic else x,
        "xanchor": "right",
        "xshift": -3,
        "yref": "paper",
        "y": 1,
        "yanchor": "top",
        "showarrow": False,
        "font": {"size": 12, "color": colour},
    }
    return [line], [label]


def _padded(low: float, high: float) -> list[float]:
    margin = 0.015 * (high - low)
    return [float(low - margin), float(high + margin)]


def _traces(line: Line, share: bool, mode: theme.Mode) -> list[dict[str, object]]:
    thin = np.unique(np.linspace(0, len(line.x) - 1, _MAX_POINTS).astype(int))
    recorded = line.colour is None
    dash = "dot" if line.dotted or (recorded and line.raw) else "dash" if recorded else "solid"
    colour = theme.CATEGORIES[mode][-1 if recorded else line.colour]
    smooth = smoothed(line.y) if line.raw else line.y
    drawn = {
        "type": "scatter",
        "name": line.name,
        "x": line.x[thin],
        "y": smooth[thin],
        "mode": "lines" if recorded or line.raw or line.dotted or len(line.x) > 60 else "lines+markers",
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"size": 5},
        "hovertemplate": "%{y:.0%}" if share else "%{y:.4g}",
    }
    if not line.raw or recorded:
        return [drawn]
    faint = drawn | {
        "y": line.y[thin],
        "line": {"color": colour, "width": 1},
        "opacity": 0.4,
        "hoverinfo": "skip",
    }
    del faint["hovertemplate"]
    return [faint, drawn | {"name": "smoothed"}]
