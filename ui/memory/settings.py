"""The controls of the memory lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import memory
from engine.experiments._memory import Weights
from ui import controls
from ui.controls import Look
from ui.labs import MEMORY

PREFIX = MEMORY.url_path
BUDGET, STEP, ROOM = "Budget", "Through a step", "What fits"
MEASURED, SPEED, PAGED = "Measured", "Speed", "Paged optimizer"
VIEW = f"{PREFIX}_view"
_LENGTHS = [2**power for power in range(7, 16)]

WEIGHTS: dict[Weights, str] = {
    "nf4, double quantized": "4 bits, double quantized",
    "nf4": "4 bits",
    "int8": "8 bits",
    "bfloat16": "16 bits",
    "float32": "32 bits",
}
"""What the formats of weights are called on the page."""


def settings() -> memory.Params | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    values = controls.controls(
        memory.Params,
        prefix=PREFIX,
        fields=["shape", "card", "method", "weights", "batch", "length", "checkpointing"],
        shape=Look(widget="select"),
        card=Look(label="Memory of the card, GB"),
        method=Look(widget="select"),
        weights=Look(options=list(WEIGHTS), name=WEIGHTS.__getitem__, widget="select"),
        batch=Look(maximum=64),
        length=Look(options=_LENGTHS, name=lambda length: f"{length:,}", widget="select"),
    )
    with st.expander("Optimizer, rank, adapted matrices", icon=":material/tune:"):
        values |= controls.controls(
            memory.Params,
            prefix=PREFIX,
            fields=["optimizer", "rank", "targets"],
            optimizer=Look(widget="select"),
            rank=Look(maximum=64),
            targets=Look(widget="select"),
        )
    params = controls.validated(memory.Params, values)
    if params is not None and params.method != "LoRA" and params.weights != params.trainable_weights:
        st.caption("Weights that are trained themselves are counted in 16 bits: in fewer they could not take a step.")
    return params


def titled(name: str) -> str:
    """A name at the beginning of a line."""
    return name[0].upper() + name[1:]
