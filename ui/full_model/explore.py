"""The Explore, Code and Tests tabs of the whole model's lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import full_model_tests
from ui import checks, run, source
from ui.full_model.ablation import ablation
from ui.full_model.bars import bars
from ui.full_model.settings import BARS, KEPT, PREFIX, VIEW, Settings
from ui.full_model.throughput import throughput
from ui.full_model.training import training

VIEWS = {BARS: bars, "Training": training, "Ablation": ablation, "Throughput": throughput}
"""What the Explore tab shows, by name."""


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time."""
    KEPT.restore(VIEW)
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=BARS,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    KEPT.keep(VIEW, view, None if view == BARS else view)
    VIEWS[view](given)


def code() -> None:
    """The Code tab: how the techniques are put together, and what they cost."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.full_model:create_optimized_model",
            "engine.full_model:optimize",
            "engine.full_model:_choose_who_learns",
            "engine.full_model_cost:Model",
            "engine.full_model_cost:parameters",
            "engine.full_model_cost:model_bytes",
            "engine.full_model_cost:flops",
            "engine.full_model_memory:step_memory",
            "engine.full_model_memory:_backward",
            "engine.experiments._on_workers.full_model_step:measure",
            "engine.experiments._on_workers.full_model_training:Ground",
            "engine.experiments.full_model_ablation:_run_once",
            "engine.experiments._on_workers.full_model_throughput:continuing",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the settings of this page."""
    found = run.run("full_model_tests", full_model_tests.Params(**given.params.model_dump()), key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
