"""The controls of the whole model's lab: four switches, the model and its sizes, common to all views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from engine.experiments._full_model import SWITCHES, SwitchParams
from ui import controls
from ui.controls import Look
from ui.kept import Kept
from ui.labs import FULL_MODEL

PREFIX = FULL_MODEL.url_path
VIEW = f"{PREFIX}_view"
BARS = "Bars"
SAVES, SLOWS = f"{PREFIX}_saves", f"{PREFIX}_slows"
GUESSES = (SAVES, SLOWS)
"""Keys of the guesses on the Predict tab."""
KEPT = Kept(PREFIX)
_SIZES = ("d_model", "num_layers", "num_heads")
_ADAPTERS = ("rank", "experts", "top_k")


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        params: switches and sizes; the experiments of the views add what is their own.
    """

    params: SwitchParams


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    KEPT.begin()
    values = _controls(*SWITCHES)
    place = st.container()
    values |= _controls("begin", "batch_size", "length")
    fresh = values["begin"] == "fresh"
    with st.expander("Sizes, adapters, seed", icon=":material/tune:"):
        if not fresh:
            st.caption("The storyteller has sizes of its own: 6 layers of width 256, 8 heads, 4,096 words.")
        own = _SIZES if fresh else ()
        values |= _controls(*own, *_ADAPTERS, "seed", notes=place)
    with place:
        params = controls.validated(SwitchParams, values)
    return None if params is None else Settings(params)


def _controls(*fields: str, notes: DeltaGenerator | None = None, **looks: Look) -> dict[str, Any]:
    return KEPT.controls(SwitchParams, prefix=PREFIX, fields=fields, notes=notes, **looks)
