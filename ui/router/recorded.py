"""The recorded part of the Cost view: a large mixture on a GPU, ours beside other ways to compute it."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import router_cost
from engine.experiments._flash import bytes_in_words
from engine.experiments._flash_recorded import Recorded
from engine.experiments._router_recorded import OURS, TARGET, LayerSize, LayerSpeeds, Way, recorded_layer
from engine.experiments.router_cost import overlap
from ui import chart, export, theme
from ui.charts import router_cost as charts
from ui.charts.router_cost import Bar
from ui.evidence import provenance, timing
from ui.flash.recorded import heading
from ui.prose import plain
from ui.router.settings import PREFIX

LABELS = {
    OURS: "ours: grouped products, own kernels around them",
    "loop, our rows": "a loop over experts, own kernels around it",
    "grouped, plain rows": "grouped products, plain PyTorch around them",
    "loop, unfused": "the plainest loop over experts",
    "padded batch, our rows": "padded to the fullest expert, own kernels",
    "transformers, grouped_mm": "transformers' block, grouped products",
    "transformers, eager": "transformers' block, its loop",
}
"""The ways that are drawn, in this order."""

_LOADS = ("even", "uneven")
_HEIGHT = 640
_BENCHMARK = "tests.benchmarks.moe_feed_forward"


def recorded(params: router_cost.Params) -> None:
    """What a GPU gave in the direction of the controls, if that was recorded."""
    found = recorded_layer(params.direction)
    if found is None:
        return
    heading(found, size_in_words(found.params), dashed=False)
    key = f"{PREFIX}_recorded"
    speeds = found.found
    fig = charts.speeds(
        bars(speeds),
        [f"{load} load" for load in _LOADS],
        "TFLOP/s of the experts' products",
        roof=speeds.peak_flops / 1e12,
        roof_words=f"one dense product: {speeds.peak_flops / 1e12:.0f}",
        mode=theme.mode(),
    )
    chart.figure(fig, key=key, sentence=sentence(found), height=_HEIGHT)
    export.export(
        fig, key=key, name="router-recorded", experiment="router_cost", params=params, data=lambda: table(speeds)
    )
    for said in (parts_sentence(speeds), error_sentence(speeds)):
        if said:
            st.markdown(plain(said))
    provenance(speeds)
    st.caption(f"On a GPU of your own, `python -m {_BENCHMARK}` measures it again.")


def size_in_words(size: LayerSize) -> str:
    """The recorded shape, which is not that of the controls."""
    return (
        f"bfloat16, {size.num_tokens:,} tokens, {size.num_experts} experts of {size.d_model} → {size.ffn_dim} → "
        f"{size.d_model}, {size.top_k} for each token, {size.direction}. Of the controls it follows the direction "
        "alone."
    )


def bars(found: LayerSpeeds) -> list[Bar]:
    """Every way that is drawn, under both loads."""
    drawn = [
        (label, series, way)
        for name, label in LABELS.items()
        for series, load in enumerate(_LOADS)
        if (way := found.way(name, load)) is not None
    ]
    return [
        Bar(label, series, way.tflops, _at(way, way.high_ms), _at(way, way.low_ms), hover(label, way))
        for label, series, way in drawn
    ]


def hover(label: str, way: Way) -> str:
    """What is said of a bar."""
    return (
        f"<b>{label}</b>, {way.load} load<br>{way.tflops:.0f} TFLOP/s<br>"
        f"{timing(way)}<br>"
        f"{bytes_in_words(way.peak_bytes)} beyond weights and input"
    )


def sentence(recorded: Recorded[LayerSize, LayerSpeeds]) -> str:
    """How fast ours is beside a dense product and its target, and what an uneven load changes."""
    found = recorded.found
    ours, uneven = (found.way(OURS, load) for load in _LOADS)
    words = (
        f"Under an even load ours reaches {ours.tflops:.0f} TFLOP/s, {ours.tflops * 1e12 / found.peak_flops:.0%} of "
        "what one large dense product reached in the same run, routing and gathering included"
    )
    if recorded.params.direction == "forward":
        words += f"; the target of {TARGET:.0f} is {'reached' if ours.tflops >= TARGET else 'missed'}"
    words += "."
    if uneven is not None:
        words += (
            f" Where the busiest expert has {found.busiest['uneven']:.1f} times its fair share, it is "
            f"{uneven.tflops:.0f}{_faster_uneven(ours, uneven)}"
        )
        padded = found.way("padded batch, our rows"), found.way("padded batch, our rows", "uneven")
        if all(padded):
            words += f"; what pads every expert to the fullest falls from {padded[0].tflops:.0f} to "
            words += f"{padded[1].tflops:.0f}"
        words += "."
    if any(found.way(name) and not found.way(name, "uneven") for name in LABELS):
        words += " The load is made uneven by a bias, which transformers' block does not take: it has no such bar."
    return f"{words} Whiskers go from the 10th to the 90th percentile."


def _faster_uneven(even: Way, uneven: Way) -> str:
    """That an uneven load is no slower, where it is so, with what the times can say about it."""
    if uneven.tflops <= even.tflops:
        return ""
    if overlap(even, uneven):
        return " (the spreads of the two overlap: these runs do not show that one is faster)"
    return " (faster, and these times do not say why)"


def parts_sentence(found: LayerSpeeds) -> str:
    """What of ours makes it fast: the grouped product, or the kernels around it."""
    ours, loop, unaided = (found.way(name) for name in (OURS, "loop, our rows", "grouped, plain rows"))
    if not (loop and unaided):
        return ""
    if overlap(ours, loop):
        words = "Under an even load these runs show no difference with a loop over the experts for the grouped products"
    else:
        words = (
            f"Under an even load it is {loop.tflops:.0f} TFLOP/s with a loop over the experts for the grouped products"
        )
    return (
        f"{words}; without our kernels for gathering, activation and combining it is {unaided.tflops:.0f} TFLOP/s. "
        "That is so at this size."
    )


def error_sentence(found: LayerSpeeds) -> str:
    """Why transformers' block is further from float32 than ours, where it is."""
    ours, theirs = found.way(OURS), found.way("transformers, grouped_mm")
    if theirs is None or theirs.error < 3 * ours.error:
        return ""
    return (
        f"Not the same output: against float32 with the routing of ours, transformers' block is {theirs.error:.1%} "
        f"off, ours {ours.error:.2%}. Its router rounds logits to bfloat16, ours keeps float32, so that a few tokens "
        "in a thousand go to other experts; on the others it is about as exact as ours."
    )


def table(found: LayerSpeeds) -> pd.DataFrame:
    """All that was recorded, drawn or not."""
    return pd.DataFrame([vars(way) for way in found.ways])


def _at(way: Way, milliseconds: float) -> float:
    """TFLOP/s if it had taken so long."""
    return way.tflops * way.median_ms / milliseconds
