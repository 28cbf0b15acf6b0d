"""The Explore, Code and Tests tabs of the memory lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import memory, memory_tests
from ui import checks, run, source
from ui.memory.budget import budget
from ui.memory.measured import measured
from ui.memory.paged import paged
from ui.memory.qlora_step import qlora_step
from ui.memory.room import room
from ui.memory.settings import BUDGET, MEASURED, PAGED, PREFIX, ROOM, SPEED, STEP, VIEW
from ui.memory.step import step

VIEWS = {BUDGET: budget, STEP: step, ROOM: room, MEASURED: measured, SPEED: qlora_step, PAGED: paged}
"""What the Explore tab shows, by name."""


def explore(params: memory.Params) -> None:
    """The Explore tab: one view at a time."""
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=BUDGET,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    VIEWS[view](params)


def code() -> None:
    """The Code tab: the arithmetic, and what it is compared with."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.memory_budget:budget",
            "engine.saved_activations:saved_by_block",
            "engine.memory_budget:weight_bytes",
            "engine.memory_budget:optimizer_bytes",
            "engine.memory_budget:kv_cache_bytes",
            "engine.memory_budget:largest",
            "engine.memory_measurement:measure_step",
            "engine.measure:peak_memory",
            "engine.optim:PagedAdamW",
            "engine.optim:create_large_test_model",
        ]
    )


def tests(params: memory.Params) -> None:
    """The Tests tab: what must hold, on the settings of this page and on a small twin of them."""
    found = run.run("memory_tests", memory_tests.Params(**params.model_dump()), key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
