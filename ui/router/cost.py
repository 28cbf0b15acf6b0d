"""The Cost view: a mixture beside dense layers of equal parameters and of equal work, counted and then measured."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import streamlit as st

from engine.experiments import router_cost
from engine.experiments._flash import bytes_in_words
from engine.experiments.router_cost import LABELS, Layer, Point, Size
from ui import chart, export, run, theme
from ui.charts import router_cost as charts
from ui.charts.router_cost import Line
from ui.evidence import provenance, timing
from ui.measure_button import measure_button
from ui.prose import plain
from ui.router.recorded import recorded
from ui.router.settings import KEPT, PREFIX, Settings

RUN = f"{PREFIX}_cost_run"
AXIS = f"{PREFIX}_axis"
_HEIGHT, _TALL = 560, 760
_READING = (
    "In brackets, and as whiskers: from the 10th to the 90th percentile of the timed runs; what else the device does "
    "meanwhile is in them. Dashed: by the device's measured peaks, the longer of computing and moving bytes. That is a "
    "model, and a bound only for sizes beyond the caches: what they hold comes faster."
)
_AXES: dict[str, Literal["tokens", "experts"]] = {"tokens": "tokens", "experts": "experts"}


def cost(given: Settings) -> None:
    """The arithmetic at once; times when they are asked for; and below, what a GPU gave when it was recorded."""
    params: router_cost.Params = given.params
    axis = st.segmented_control("Against", list(_AXES), default="tokens", required=True, key=AXIS, bind="query-params")
    KEPT.keep(AXIS, axis, None if axis == "tokens" else axis)
    _totals(params)
    started = measure_button("router_cost", params, key=RUN)
    if started is None:
        key = f"{PREFIX}_forecast"
        fig = charts.panels(forecast(params, axis), _across(axis), span=_span(params, axis), mode=theme.mode())
        chart.figure(fig, key=key, sentence=forecast_sentence(params), height=_HEIGHT)
    else:

        def draw(found: router_cost.Result, measured: router_cost.Params) -> None:
            _draw(found, measured, axis)

        run.watch("router_cost", started, draw, key=RUN, height=_TALL)
    recorded(params)


def _totals(params: router_cost.Params) -> None:
    """Parameters, FLOPs and bytes of the three layers at the most tokens."""
    costs = {layer: params.cost(Size("tokens", layer, params.tokens, params.experts)) for layer in LABELS}
    st.table(
        pd.DataFrame(
            {
                "layer": list(LABELS.values()),
                "parameters": [_amount(each.parameters) for each in costs.values()],
                "used by a token": [_amount(each.active_parameters) for each in costs.values()],
                f"FLOPs, {params.tokens:,} tokens": [_amount(each.flops) for each in costs.values()],
                "bytes": [bytes_in_words(each.bytes) for each in costs.values()],
            }
        ),
        border="horizontal",
        hide_index=True,
    )


def forecast(params: router_cost.Params, axis: str) -> list[tuple[str, list[Line]]]:
    """FLOPs and bytes of the forward pass, before anything is measured."""
    sizes = [size for size in params.sizes() if size.axis == axis]
    return [
        (
            title,
            [
                Line(
                    LABELS[layer],
                    which,
                    [_place(size) for size in sizes if size.layer == layer],
                    [value(params.cost(size)) for size in sizes if size.layer == layer],
                )
                for which, layer in enumerate(LABELS)
            ],
        )
        for title, value in (
            ("GFLOP, forward", lambda found: found.flops / 1e9),
            ("MiB moved, forward", lambda found: found.bytes / 2**20),
        )
    ]


def forecast_sentence(params: router_cost.Params) -> str:
    """What is known by arithmetic alone."""
    found: dict[Layer, router_cost.Cost] = {
        layer: params.cost(Size("tokens", layer, params.tokens, params.experts)) for layer in LABELS
    }
    mixture, large = found["mixture"], found["equal parameters"]
    return (
        f"Nothing has run yet: this is arithmetic. At {params.tokens:,} tokens the mixture of {params.experts} experts "
        f"computes {mixture.flops / large.flops:.0%} of what the dense layer of equal parameters does, and moves "
        f"{mixture.bytes / large.bytes:.0%} of its bytes; the dense layer of equal FLOPs has "
        f"{found['equal work'].parameters / mixture.parameters:.0%} of its parameters. Press “Measure” for times."
    )


def measured(found: router_cost.Result, axis: str) -> list[tuple[str, list[Line]]]:
    """Times with their spread and what the device's peaks predict; FLOPs and bytes below."""
    points = {
        layer: sorted((one for one in found.points if one.axis == axis and one.layer == layer), key=_place)
        for layer in LABELS
    }
    drawn = [(which, LABELS[layer], row) for which, (layer, row) in enumerate(points.items()) if row]
    times = [
        Line(
            label,
            which,
            [_place(one) for one in row],
            [one.median_ms for one in row],
            low=[one.low_ms for one in row],
            high=[one.high_ms for one in row],
            hover=[hover(one) for one in row],
        )
        for which, label, row in drawn
    ]
    times += [
        Line(label, which, [_place(one) for one in row], [one.predicted_ms for one in row], dashed=True)
        for which, label, row in drawn
    ]
    return [
        ("time, ms", times),
        *(
            (
                title,
                [
                    Line(label, which, [_place(one) for one in row], [value(one) for one in row])
                    for which, label, row in drawn
                ],
            )
            for title, value in (("GFLOP", lambda one: one.flops / 1e9), ("MiB moved", lambda one: one.nbytes / 2**20))
        ),
    ]


def hover(point: Point) -> str:
    """What is said of a measured point."""
    return (
        f"<b>{LABELS[point.layer]}</b>, {point.tokens:,} tokens, {point.experts} experts<br>"
        f"{timing(point)}<br>"
        f"predicted {point.predicted_ms:.3g} ms · {point.tflops:.3g} TFLOP/s"
    )


def table(found: router_cost.Result) -> pd.DataFrame:
    """The points as rows."""
    return pd.DataFrame([vars(point) for point in found.points])


def _draw(found: router_cost.Result, params: router_cost.Params, axis: str) -> None:
    key = f"{PREFIX}_cost"
    fig = charts.panels(measured(found, axis), _across(axis), span=_span(params, axis), mode=theme.mode())
    said = found.sentence or "The first times are on their way."
    chart.figure(
        fig,
        key=key,
        sentence=f"{said} {_READING}",
        height=_TALL,
    )
    if found.ended not in ("running", "finished"):
        st.info(plain(found.ending), icon=":material/info:")
    export.export(fig, key=key, name="router-cost", experiment="router_cost", params=params, data=lambda: table(found))
    if found.ended != "running":
        provenance(found)


def _place(point: Point | Size) -> int:
    """Where it lies on its axis."""
    return point.tokens if point.axis == "tokens" else point.experts


def _across(axis: str) -> str:
    return "tokens, N" if axis == "tokens" else "experts, E"


def _span(params: router_cost.Params, axis: str) -> tuple[float, float]:
    places = [_place(size) for size in params.sizes() if size.axis == axis]
    return min(places), max(places)


def _amount(number: float) -> str:
    """A number with an SI prefix, e.g. ``"1.58 M"``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
