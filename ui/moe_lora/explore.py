"""The Explore, Code and Tests tabs of the MoE-LoRA lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import moe_lora_tests
from ui import checks, run, source
from ui.moe_lora.experts import experts
from ui.moe_lora.settings import EXPERTS, KEPT, PREFIX, RUN, SPEED, SPLIT, TRAINING, VIEW, Settings
from ui.moe_lora.speed import speed
from ui.moe_lora.training import training
from ui.moe_lora.two_inputs import two_inputs

VIEWS = {TRAINING: training, EXPERTS: experts, SPLIT: two_inputs, SPEED: speed}
"""What the Explore tab shows, by name."""


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time; a training that goes on meanwhile keeps its line of progress in all."""
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=TRAINING,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    KEPT.keep(VIEW, view, None if view == TRAINING else view)
    if view in (SPLIT, SPEED) and given.started is not None and run.is_running(RUN):
        run.watch("moe_lora", given.started, lambda *_: None, key=RUN, height=1)
    VIEWS[view](given)


def code() -> None:
    """The Code tab: the mixture, its router and bias, and what is seen of them."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.moe.lora:MoELoRALayer",
            "engine.moe.cost:cheaper_form",
            "engine.moe.lora:MoELoRALinear",
            "engine.moe.injection:inject_moe_lora",
            "engine.moe.injection:without_expert",
            "engine.moe.routing:ExpertRouter",
            "engine.moe.selection_bias:SelectionBias",
            "engine.moe.selection_bias:_settle",
            "engine.moe.observation:observing",
            "engine.experiments._on_workers.moe_lora_training:Examination",
            "engine.experiments._on_workers.moe_lora_training:dissect",
            "engine.experiments._on_workers.moe_lora_training:similarity",
            "engine.experiments.moe_lora_split:_train",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the settings of this page."""
    found = run.run("moe_lora_tests", moe_lora_tests.Params(**given.params.model_dump()), key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
