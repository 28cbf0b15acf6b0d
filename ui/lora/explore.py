"""The Explore, Code and Tests tabs of the LoRA lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import lora_tests
from ui import checks, run, source
from ui.lora.adapter import adapter
from ui.lora.fine_tune import fine_tune
from ui.lora.inside import inside
from ui.lora.settings import ADAPTER, FINE_TUNE, INSIDE, PREFIX, RUN, SIZE, SWEEP, VIEW, Settings
from ui.lora.size import size
from ui.lora.speed import speed
from ui.lora.sweep import sweep

VIEWS = {SIZE: size, FINE_TUNE: fine_tune, INSIDE: inside, SWEEP: sweep, "Speed": speed, ADAPTER: adapter}
"""What the Explore tab shows, by name."""


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time; a training that goes on meanwhile keeps its line of progress in all."""
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=SIZE,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    if view not in (FINE_TUNE, INSIDE) and given.started is not None and run.is_running(RUN):
        run.watch("lora", given.started, lambda *_: None, key=RUN, height=1)
    VIEWS[view](given)


def code() -> None:
    """The Code tab: the low-rank update, its variants, and what is seen of it."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.lora.layer:LoRALayer",
            "engine.lora.product:adapted_linear_reference",
            "engine.lora.product:adapted_linears",
            "engine.lora.product:_AdaptedLinears",
            "engine.lora.linear:LoRALinear.merge",
            "engine.lora.linear:LoRALinear.unmerge",
            "engine.lora.spectrum:singular_values",
            "engine.lora.spectrum:effective_rank",
            "engine.lora.layer:rank_stabilized_scaling",
            "engine.lora.linear:DoRALinear",
            "engine.lora.linear:pissa_start",
            "engine.lora.injection:lora_parameter_groups",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the settings of this page."""
    found = run.run("lora_tests", lora_tests.Params(**given.params.model_dump()), key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
