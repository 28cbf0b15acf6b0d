"""The Speed and memory view: every backend at every length, measured live; predicted lines before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import _flash_cost, flash_speed
from engine.experiments._flash import bytes_in_words
from engine.experiments._flash_recorded import Recorded, recorded_speed
from ui import chart, export, run, theme
from ui.charts import flash as charts
from ui.charts.flash import MIB, End, Forecast, Panel
from ui.evidence import provenance, timing
from ui.flash.missing import missing
from ui.flash.points import inverse_spread, lines
from ui.flash.recorded import heading, sweep_in_words
from ui.flash.settings import KEPT, PREFIX, Settings, has_gpu
from ui.measure_button import measure_button
from ui.prose import plain

RUN = f"{PREFIX}_speed_run"
TIME, RATE, SHARE = "Time", "FLOP/s", "% of peak"
_QUANTITY = f"{PREFIX}_quantity"
_HEIGHT, _FORECAST_HEIGHT = 780, 440
_DRAWN_STOPS = {"memory": "out of memory", "time": "too slow to wait for"}


def speed(given: Settings) -> None:
    """The button that measures, and either what is predicted or what has been measured so far."""
    params: flash_speed.Params = given.params
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        started = measure_button("flash_speed", params, key=RUN)
        _choose_quantity()
    if started is None:
        _forecast(params)
    else:
        run.watch("flash_speed", started, _draw, key=RUN, height=_HEIGHT)
    recorded = recorded_speed(params)
    if recorded is not None:
        heading(recorded, sweep_in_words(recorded.params))
        _recorded(recorded)


def _choose_quantity() -> None:
    KEPT.restore(_QUANTITY)
    quantity = st.segmented_control(
        "What the upper picture shows",
        (TIME, RATE, SHARE),
        default=TIME,
        required=True,
        key=_QUANTITY,
        bind="query-params",
        label_visibility="collapsed",
    )
    KEPT.keep(_QUANTITY, quantity, None if quantity == TIME else quantity)


def _forecast(params: flash_speed.Params) -> None:
    """Memory by arithmetic alone, for the device that would run it."""
    predicted = _flash_cost.predict(params, on_gpu=has_gpu())
    fig = charts.over_length([Panel("peak memory, MiB", forecasts=_memory_lines(predicted))], mode=theme.mode())
    key = f"{PREFIX}_forecast"
    chart.figure(fig, key=key, sentence=forecast_sentence(params, predicted), height=_FORECAST_HEIGHT)
    export.export(
        fig, key=key, name="flash-memory", experiment="flash_speed", params=params, data=lambda: _forecasts(predicted)
    )
    st.caption(
        "Attention is softmax(QKᵀ / √d) V, and QKᵀ has a number for every pair of tokens: that is the T × T matrix. "
        "Nothing has run yet: this is arithmetic. **Measure** times every implementation that exists on this device, "
        "at every length, and weighs what each allocates; points appear as they come."
    )


def forecast_sentence(params: flash_speed.Params, predicted: Sequence[_flash_cost.Predicted]) -> str:
    """What the two lines say at their right end."""
    standard, flash = (next(line for line in predicted if line.name == name) for name in ("standard", "flash"))
    length, held, kept = int(standard.lengths[-1]), float(standard.peak_bytes[-1]), float(flash.peak_bytes[-1])
    words = (
        f"Predicted, beyond the inputs: at T = {length:,} standard attention holds {bytes_in_words(held)}, as it "
        f"writes a matrix of T × T for each of {params.heads} heads; in tiles it takes {bytes_in_words(kept)}, "
        f"{held / kept:,.0f} times less."
    )
    if params.tokens == "fixed batch" and len(standard.lengths) > 1:
        grew, crept = held / float(standard.peak_bytes[-2]), kept / float(flash.peak_bytes[-2])
        words += f" Doubling the length to get there multiplied the one by {grew:.1f} and the other by {crept:.1f}."
    return words


def panels(found: flash_speed.Result, quantity: str, *, recorded: bool = False) -> list[Panel]:
    """Time or speed above, memory below; of a recording without what is predicted."""
    ends = [stop for stop in found.stops if stop.kind == "time" or (stop.kind == "memory" and stop.needed_bytes > 0)]
    upper_ends = [End(stop.backend, stop.label, stop.length, _DRAWN_STOPS[stop.kind]) for stop in ends]
    lower_ends = [
        End(
            stop.backend,
            stop.label,
            stop.length,
            f"would need {bytes_in_words(stop.needed_bytes)}",
            stop.needed_bytes / MIB,
        )
        for stop in ends
        if stop.kind == "memory"
    ]
    title, value = _upper(found, quantity)
    said = partial(hover, found)
    upper = Panel(
        title,
        lines(found.points, value, said, recorded=recorded),
        _time_lines(found) if quantity == TIME and not recorded else (),
        upper_ends,
        logarithmic=quantity == TIME,
        most=100.0 if quantity == SHARE else None,
    )
    lower = Panel(
        "peak memory, MiB",
        lines(found.points, lambda point: (point.peak_bytes / MIB,) * 3, said, recorded=recorded),
        () if recorded else _memory_lines(found.predicted),
        lower_ends,
        limit=found.free_bytes / MIB if lower_ends and found.free_bytes else None,
        limit_words=f"free: {bytes_in_words(found.free_bytes)}",
    )
    return [upper, lower]


def table(found: flash_speed.Result) -> pd.DataFrame:
    """The points as rows."""
    return pd.DataFrame([vars(point) for point in found.points])


def _upper(
    found: flash_speed.Result, quantity: str
) -> tuple[str, Callable[[flash_speed.Point], tuple[float, float, float]]]:
    """Title of the upper axis, and a point's value on it with its spread."""
    if quantity == TIME:
        return "time, ms", lambda point: (point.median_ms, point.low_ms, point.high_ms)
    if quantity == SHARE:
        return "% of the device's measured peak", lambda point: _by_time(point, 100 * (point.peak_share or math.nan))
    factor, unit = (1, "TFLOP/s") if max((point.tflops for point in found.points), default=1) >= 1 else (1e3, "GFLOP/s")
    return unit, lambda point: _by_time(point, factor * point.tflops)


def _by_time(point: flash_speed.Point, value: float) -> tuple[float, float, float]:
    return inverse_spread(value, point.median_ms, point.low_ms, point.high_ms)


def hover(found: flash_speed.Result, point: flash_speed.Point) -> str:
    """Everything about a point: its spread, its ratio to standard attention, its speed and memory."""
    rate = f"{point.tflops:.3g} TFLOP/s" if point.tflops >= 1 else f"{1000 * point.tflops:.3g} GFLOP/s"
    share = "" if point.peak_share is None else f", {point.peak_share:.0%} of the peak"
    words = [
        f"<b>{point.label}</b>, T = {point.length:,}, batch {point.batch}",
        timing(point),
        f"{rate}{share}",
        f"peak {bytes_in_words(point.peak_bytes)}, predicted {bytes_in_words(point.predicted_bytes)}",
    ]
    standard = next(
        (other for other in found.points if (other.backend, other.length) == ("standard", point.length)), None
    )
    if standard is not None and standard is not point:
        ratio = standard.median_ms / point.median_ms
        words.insert(
            2, f"{ratio:.2f} times as fast as standard" if ratio >= 1 else f"{1 / ratio:.2f} times slower than standard"
        )
    return "<br>".join(words)


def _memory_lines(predicted: Sequence[_flash_cost.Predicted]) -> list[Forecast]:
    return [_dashed(line, np.asarray(line.peak_bytes) / MIB) for line in predicted]


def _time_lines(found: flash_speed.Result) -> list[Forecast]:
    return [_dashed(line, np.asarray(line.ms)) for line in found.predicted if np.isfinite(line.ms).all()]


def _dashed(line: _flash_cost.Predicted, values: np.ndarray) -> Forecast:
    backend = "standard" if line.name == "standard" else "torch-flash"
    return Forecast(backend, line.label, [int(length) for length in line.lengths], values.tolist())


def _forecasts(predicted: Sequence[_flash_cost.Predicted]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"line": line.name, "length": int(length), "predicted_bytes": int(size)}
            for line in predicted
            for length, size in zip(line.lengths, line.peak_bytes, strict=True)
        ]
    )


def _recorded(recorded: Recorded[flash_speed.Params, flash_speed.Result]) -> None:
    found, quantity = recorded.found, st.session_state.get(_QUANTITY) or TIME
    fig = charts.over_length(panels(found, quantity, recorded=True), mode=theme.mode())
    chart.figure(fig, key=f"{PREFIX}_speed_recorded", sentence=found.sentence, height=_HEIGHT)
    missing(found.absent, found.stops)


def _draw(found: flash_speed.Result, params: flash_speed.Params) -> None:
    quantity = st.session_state.get(_QUANTITY) or TIME
    fig = charts.over_length(panels(found, quantity), mode=theme.mode())
    key = f"{PREFIX}_speed"
    chart.figure(fig, key=key, sentence=found.sentence, height=_HEIGHT)
    if found.ended not in ("running", "finished"):
        st.info(plain(found.ending), icon=":material/info:")
    export.export(fig, key=key, name="flash-speed", experiment="flash_speed", params=params, data=lambda: table(found))
    st.caption(
        "Dashed: memory by the books, and for time the longer of computing and moving bytes at this device's measured "
        "peaks. That is a model: exponentials, starting kernels and the mask's pass take longer than it says, and what "
        "caches hold comes faster. Flash attention is counted to move every tensor once, so none of its kernels can be "
        "faster unless the tensors fit into caches; standard attention moves its matrix at every step, and may be "
        "faster where that is short enough for them."
    )
    if not found.on_gpu and found.ended != "running":
        st.caption(
            "This is a processor: there is no small memory to program as on a GPU, caches do that by themselves. The "
            "T × T matrix costs memory here as well; how much time it costs depends on the kernels."
        )
    missing(found.absent, found.stops)
    if found.ended != "running":
        provenance(found)
