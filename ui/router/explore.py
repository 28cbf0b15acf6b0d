"""The Explore, Code and Tests tabs of the router lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import router_tests
from ui import checks, run, source
from ui.router.collapse import collapse
from ui.router.cost import cost
from ui.router.learned import learned
from ui.router.settings import COLLAPSE, COST, KEPT, LEARNED, PREFIX, RUN, TEXT, VIEW, WAY, Settings
from ui.router.text import text
from ui.router.way import way

VIEWS = {WAY: way, TEXT: text, COLLAPSE: collapse, LEARNED: learned, COST: cost}
"""What the Explore tab shows, by name."""


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time; a training that goes on meanwhile keeps its line of progress in all."""
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=WAY,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    KEPT.keep(VIEW, view, None if view == WAY else view)
    if view in (WAY, TEXT, COST) and given.started is not None and run.is_running(RUN):
        run.watch("router_collapse", given.started, lambda *_: None, key=RUN, height=1)
    VIEWS[view](given)


def code() -> None:
    """The Code tab: the router, what keeps it balanced, and the experts' layer."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.moe.routing:ExpertRouter",
            "engine.moe.routing:Routing",
            "engine.moe.balance:auxiliary_loss",
            "engine.moe.balance:z_loss",
            "engine.moe.balance:capacity",
            "engine.moe.selection_bias:SelectionBias",
            "engine.experiments._on_workers.router_training:BalancedTrainer",
            "engine.moe.statistics:load_from_counts",
            "engine.experiments._router_sources:mutual_information",
            "engine.experiments._router_sources:find_typical",
            "engine.moe.feed_forward:MoEFeedForward",
            "engine.moe.grouped:grouped_product",
            "engine.moe.cost:mixture",
            "engine.moe.cost:dense_width",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the settings of this page."""
    shared = given.params.model_dump(include=set(router_tests.Params.model_fields))
    found = run.run("router_tests", router_tests.Params(**shared), key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
