"""The Predict tab of the memory lab: say which part is largest and how much it is in all, then see."""

from __future__ import annotations

import math

import streamlit as st

from engine.experiments import memory
from engine.experiments._memory import GB
from ui.charts.memory import amount
from ui.memory.settings import PREFIX, WEIGHTS
from ui.prose import plain

_PARTS = ("weights", "optimizer state", "gradients", "activations", "logits and loss", "temporary tensors", "workspace")
_SIZES = tuple(float(f"{2.0**power:g}") for power in range(-2, 11))


def predict(params: memory.Params) -> None:
    """Two guesses about the plan that the controls say."""
    found = memory.compute(params)
    way = found.ways[found.chosen]
    st.markdown(
        plain(
            f"The plan: {way.name} of {params.shape}, weights in {WEIGHTS[way.weights]}, {params.optimizer}, "
            f"{params.batch} × {params.length:,} tokens{', with checkpointing' if params.checkpointing else ''}."
        )
    )
    _guess_part(way)
    st.divider()
    _guess_size(way)


def _guess_part(way: memory.Way) -> None:
    st.markdown("**Which part is largest?** At the moment of the step at which most memory is held.")
    guess = st.segmented_control(
        "Your guess of the part", _PARTS, key=f"{PREFIX}_part", bind="query-params", label_visibility="collapsed"
    )
    if guess is None:
        return
    parts = way.peak.parts
    largest = max(_PARTS, key=lambda part: parts.get(part, 0))
    words = f"{amount(parts[largest])} of {amount(way.peak.total)}, at {way.peak.name}"
    if guess == largest:
        st.success(plain(f"Right: {largest}, {words}."), icon=":material/check_circle:")
    else:
        st.info(
            plain(f"It is {largest}: {words}. For {guess} it is {amount(parts.get(guess, 0))}."),
            icon=":material/lightbulb:",
        )


def _guess_size(way: memory.Way) -> None:
    st.markdown("**How much is it in all?** At the peak of a step.")
    guess = st.select_slider(
        "Your guess",
        _SIZES,
        value=_SIZES[6],
        format_func=lambda size: f"{size:g} GB",
        key=f"{PREFIX}_size",
        bind="query-params",
    )
    if not st.toggle("Show the answer", key=f"{PREFIX}_size_shown", bind="query-params"):
        return
    total = way.peak.total / GB
    nearest = min(_SIZES, key=lambda size: abs(math.log(size / total)))
    if guess == nearest:
        st.success(plain(f"Well guessed: {amount(way.peak.total)}."), icon=":material/check_circle:")
    else:
        factor = max(guess / total, total / guess)
        side = "less" if guess > total else "more"
        st.info(
            plain(f"It is {amount(way.peak.total)}, {factor:.1f} times {side} than you said."),
            icon=":material/lightbulb:",
        )
