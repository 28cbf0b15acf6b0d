"""The Explore, Code and Tests tabs of the FlashAttention lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import flash_tests
from ui import checks, run, source
from ui.flash.accuracy import accuracy
from ui.flash.decode import decode
from ui.flash.missing import missing
from ui.flash.roofline import roofline
from ui.flash.settings import (
    ACCURACY,
    DECODE,
    KEPT,
    PREFIX,
    ROOFLINE,
    SOFTMAX,
    SPEED,
    TILES,
    VIEW,
    Settings,
)
from ui.flash.softmax import softmax
from ui.flash.speed import speed
from ui.flash.tiles import tiles

VIEWS = {SPEED: speed, TILES: tiles, SOFTMAX: softmax, ROOFLINE: roofline, ACCURACY: accuracy, DECODE: decode}
"""What the Explore tab shows, by name."""


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time."""
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=SPEED,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    KEPT.keep(VIEW, view, None if view == SPEED else view)
    VIEWS[view](given)


def code() -> None:
    """The Code tab: the algorithm for reading, the kernel for a GPU, and the choice among all there are."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.flash.online:stream_softmax",
            "engine.flash.online:_chunks",
            "engine.flash.tiled:stream_tiles",
            "engine.flash.tiled:_forward_tiles",
            "engine.flash.tiled:tiled_attention",
            "engine.flash.tiled:stream_backward_tiles",
            "engine.flash.split:split_attention",
            "engine.flash.split:attend_parts",
            "engine.flash.split:merge",
            "engine.flash.triton_forward:_forward_kernel",
            "engine.flash.triton_forward:_absorb",
            "engine.flash.triton_forward:attend",
            "engine.flash.backends:standard_attention",
            "engine.flash.backends:Backend",
            "engine.flash.choice:fastest",
            "engine.flash.traffic:standard_traffic",
            "engine.flash.traffic:flash_traffic",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the settings of this page."""
    shared = given.params.model_dump(include=set(flash_tests.Params.model_fields))
    found = run.run("flash_tests", flash_tests.Params(**shared), key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
        missing(found.absent)
