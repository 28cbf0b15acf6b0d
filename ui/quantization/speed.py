"""The Speed view: how fast 4-bit quantization is on a GPU, ours beside bitsandbytes, as it was recorded."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import _quantization_speed
from engine.experiments._quantization_speed import OURS, TARGET, RecordedThroughput
from ui import chart, export, theme
from ui.charts import quantization_speed as charts
from ui.prose import plain
from ui.quantization.settings import PREFIX, Settings

_HEIGHT = 400
_BENCHMARK = "tests.benchmarks.quantize_throughput"
_NAMES = {"nf4": "NormalFloat 4", "fp4-bnb": "FP4 (bitsandbytes)"}
_LABELS = {
    "bitsandbytes": "bitsandbytes",
    "quantize()": "ours, waiting to hear whether weights are finite",
    "kernel": "ours, the kernel alone",
    "dequantize()": "ours",
    "double quantization, bitsandbytes": "bitsandbytes, double quantization",
    "double quantization": "ours, double quantization",
}


def speed(given: Settings) -> None:
    """Both operations, and what the numbers say of them."""
    found = _quantization_speed.recorded_throughput()
    if found is None:
        st.info("The recording is not there: engine/recorded is missing from this installation.")
        return
    st.caption(
        plain(
            f"Nothing is measured here, and the controls change nothing here: {found.provenance}. One tensor in blocks "
            f"of 64. Codes that differ from bitsandbytes' in all of this: {found.differing_codes}."
        )
    )
    key = f"{PREFIX}_speed_type"
    chosen = st.segmented_control(
        "Data type", list(_NAMES), default="nf4", required=True, format_func=_NAMES.__getitem__, key=key
    )
    for operation, told in (("quantize", quantizing), ("dequantize", dequantizing)):
        tensors = list(found.copies)
        rates = {
            (one.way, one.tensor): one.gb_per_s
            for one in found.measured
            if (one.operation, one.data_type) == (operation, chosen)
        }
        ways = {
            label: [rates[way, tensor] for tensor in tensors]
            for way, label in _LABELS.items()
            if (way, tensors[0]) in rates
        }
        st.markdown(f"**{operation.capitalize()}**")
        fig = charts.throughput(tensors, ways, list(found.copies.values()), mode=theme.mode())
        name = f"{PREFIX}_speed_{operation}"
        chart.figure(fig, key=name, sentence=told(found, chosen), height=_HEIGHT)
        export.export(
            fig,
            key=name,
            name=f"quantization-speed-{operation}",
            experiment="quantization",
            params=given.params,
            data=lambda: _table(found),
        )
    st.markdown(f"On a GPU of your own, `python -m {_BENCHMARK}` measures it again.")


def quantizing(found: RecordedThroughput, data_type: str) -> str:
    """How many times as fast as bitsandbytes both of ours are, and which of them reaches the target."""
    whole, kernel = (found.speedups(way, data_type) for way in OURS["quantize"])
    reached = [
        name for name, (least, _) in (("quantize() itself", whole), ("the kernel alone", kernel)) if least >= TARGET
    ]
    verdict = {
        (): "is reached on every tensor by neither",
        ("the kernel alone",): "is reached on every tensor by the kernel alone, not by quantize() with its wait",
    }.get(tuple(reached), "is reached on every tensor by both")
    return (
        f"{_NAMES[data_type]}: quantize(), which waits until it knows that all weights are finite, has "
        f"{_range(whole)} times the throughput of bitsandbytes, which does not check; the kernel alone has "
        f"{_range(kernel)} times. The target of {TARGET:g} times {verdict}."
    )


def dequantizing(found: RecordedThroughput, data_type: str) -> str:
    """How many times as fast as bitsandbytes ours is, with and without double quantization."""
    plainly, nested = (_range(found.speedups(way, data_type)) for way in OURS["dequantize"])
    return (
        f"{_NAMES[data_type]}: ours has {plainly} times the throughput of bitsandbytes, with double quantization "
        f"{nested} times. The line across each group is a copy in memory, as fast as anything can be."
    )


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


def _table(found: RecordedThroughput) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "operation": one.operation,
                "way": one.way,
                "tensor": one.tensor,
                "data_type": one.data_type,
                "gb_per_s": one.gb_per_s,
                **{field: one.evidence[field] for field in ("median_ms", "low_ms", "high_ms", "runs", "device")},
            }
            for one in found.measured
        ]
    )
