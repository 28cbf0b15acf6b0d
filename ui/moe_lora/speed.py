"""The Speed view: what a mixture adds to its base layer on a GPU, and what a training step of many experts takes."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from engine.experiments._flash import bytes_in_words
from engine.experiments._moe_lora_recorded import (
    BASE,
    CAPTURED,
    CHOSEN,
    PEFT_BYTES,
    PEFT_MS,
    WHOLE,
    MixtureCosts,
    MixtureSize,
    Timing,
    recorded_mixture,
)
from engine.experiments.router_cost import overlap
from ui.evidence import provenance
from ui.flash.recorded import heading
from ui.moe_lora.settings import Settings
from ui.prose import plain

_FORWARD = {
    BASE + CAPTURED: "the base layer alone, as a CUDA graph",
    WHOLE + CAPTURED: "the base layer with its mixture, as a CUDA graph",
    BASE: "the base layer alone, one by one as all below",
    WHOLE: "the base layer with its mixture",
    "router": "the router alone",
    "concatenated": "the mixture alone, all experts in two products",
    "grouped": "the mixture alone, grouped products",
    "shared A": "the mixture alone, one A for all",
    "plain loop": "the mixture alone, a loop over experts",
}
_BENCHMARK = "tests.benchmarks.moe_lora"


def speed(given: Settings) -> None:
    """Both tables, and whether what was aimed at is reached."""
    recorded = recorded_mixture()
    if recorded is None:
        st.info("The recording is not there: engine/recorded is missing from this installation.")
        return
    found = recorded.found
    heading(recorded, "The controls change nothing here.", dashed=False)
    st.markdown(f"**What a mixture adds to its layer**, {plain(size_in_words(recorded.params))}, forward")
    _table([(words, found.timing(name)) for name, words in _FORWARD.items()])
    st.markdown(plain(added_sentence(found)))
    st.markdown(
        "One by one, rows are not parts that add up: a row by itself waits for its own launches, which in the whole go "
        "on while the GPU computes what came before."
    )
    largest = next(iter(found.steps))
    st.markdown(f"**A training step of many experts**, {plain(size_in_words(largest, chosen=False))}")
    _table([(form_in_words(size, each), each) for size, forms in found.steps.items() for each in forms])
    st.markdown(plain(step_sentence(found)))
    provenance(found)
    st.caption(f"On a GPU of your own, `python -m {_BENCHMARK}` measures it again.")


def size_in_words(size: MixtureSize, *, chosen: bool = True) -> str:
    """The shape, with or without how many experts a token has."""
    words = (
        f"{size.num_tokens:,} tokens, {size.in_features} → {size.out_features}, {size.num_experts} experts of rank "
        f"{size.rank}"
    )
    return f"{words}, {size.top_k} for each token" if chosen else words


def form_in_words(size: MixtureSize, timing: Timing) -> str:
    """A row of the second table."""
    form = {CHOSEN: "the form that the mixture chooses"}.get(timing.name, timing.name)
    return f"{size.top_k} expert{'' if size.top_k == 1 else 's'} a token, {form}"


def added_sentence(found: MixtureCosts) -> str:
    """What the mixture adds beside what its base layer takes, which it should not exceed: on the GPU, and launched."""
    graph, launched = found.added(CAPTURED), found.added()
    words = f"As a CUDA graph, which is the GPU's time alone, {_added(found, CAPTURED)}. One by one {_added(found)}. "
    if launched.median_ms > graph.median_ms and not overlap(launched, graph):
        words += (
            "They differ because the CPU launches the mixture's many small kernels one after the other and takes "
            "longer for that than the GPU for computing them, while a graph launches them all at once. "
        )
    return f"{words}A plain loop over the experts takes {found.timing('plain loop').median_ms:.2f} ms."


def _added(found: MixtureCosts, way: str = "") -> str:
    base, added = found.timing(BASE + way), found.added(way)
    spread = f"the mixture adds {added.median_ms:.3f} ms ({added.low_ms:.3f} to {added.high_ms:.3f})"
    if overlap(added, base):
        return f"{spread}, which these runs cannot tell from what the base layer takes; to add no more was the target"
    return (
        f"{spread}, {added.median_ms / base.median_ms:.1f} times what the base layer itself takes: to add no more than "
        f"that was the target, and it is {'missed' if added.median_ms > base.median_ms else 'reached'}"
    )


def step_sentence(found: MixtureCosts) -> str:
    """The chosen form beside what PEFT reports: time, what the kernels take of it, memory."""
    steps = {
        size.top_k: next(each for each in forms if each.name == CHOSEN) for size, forms in found.steps.items()
    }  # fmt: skip
    num_experts = next(iter(found.steps)).num_experts
    times = _listed([f"{each.median_ms:.2f} ms with {top_k}" for top_k, each in steps.items()])
    fast = [top_k for top_k, each in steps.items() if each.median_ms < PEFT_MS]
    light = [top_k for top_k, each in steps.items() if each.peak_bytes < PEFT_BYTES]
    words = (
        f"PEFT reports {PEFT_MS:g} ms and {PEFT_BYTES / 1e9:.2f} GB for a step of {num_experts} experts in its batched "
        "form, on an H100 and without saying how many experts a token has; to stay below both was the target. On this "
        f"GPU ours takes {times} experts a token, launched one by one{_kernels(list(steps.values()))}: in time the "
        f"target is {_reached(fast, steps)}, in memory it is {_reached(light, steps)}."
    )
    if len(light) == len(steps):
        most = max(each.peak_bytes for each in steps.values())
        words += f" Ours needs at most {most / 1e6:.0f} MB, PEFT's {PEFT_BYTES / most:.0f} times as much."
    if len(fast) < len(steps):
        words += (
            f" Each of {2 * num_experts} separate parameters, an A and a B for every expert, gets a gradient of its "
            "own, which the CPU launches: that takes the time."
        )
    return (
        f"{words} The form that it chooses is one of the two above it, timed anew: as far as it is from both, so far "
        "apart are two times of the same work."
    )


def _kernels(steps: Sequence[Timing]) -> str:
    """What the GPU computes of the steps' times, if all of them have it."""
    times = [each.kernels_ms for each in steps if each.kernels_ms is not None]
    if len(times) < len(steps):
        return ""
    below = ", alone less than PEFT's time" if max(times) < PEFT_MS < max(each.median_ms for each in steps) else ""
    return f", of which the GPU's kernels take {_listed([f'{time:.2f}' for time in times])} ms{below}"


def _reached(where: Sequence[int], steps: dict[int, Timing]) -> str:
    if len(where) == len(steps):
        return "reached"
    return f"reached with {_listed([str(top_k) for top_k in where])} alone" if where else "missed"


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _table(rows: Sequence[tuple[str, Timing]]) -> None:
    st.table(table(rows), border="horizontal", hide_index=True)


def table(rows: Sequence[tuple[str, Timing]]) -> pd.DataFrame:
    """What was timed, with its spread, and what the kernels take of it where that is known of any row.

    Time, spread and runs share a column: a phone has room for four.
    """
    columns = {
        "": [words for words, _ in rows],
        "ms (spread)": [
            f"{timing.median_ms:.3f} ({timing.low_ms:.3f} to {timing.high_ms:.3f}), {timing.runs} runs"
            for _, timing in rows
        ],
    }
    if any(timing.kernels_ms is not None for _, timing in rows):
        columns["kernels, ms"] = [
            "—" if timing.kernels_ms is None else f"{timing.kernels_ms:.3f}" for _, timing in rows
        ]
    columns |= {
        "peak memory": [bytes_in_words(timing.peak_bytes) if timing.peak_bytes else "—" for _, timing in rows],
    }
    return pd.DataFrame(columns)
