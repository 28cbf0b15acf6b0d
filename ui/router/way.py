"""The view of one token's way: every step from its logits to its gates, with numbers."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import router_token
from engine.experiments._router import KINDS
from ui import chart, export, run, theme
from ui.charts import router as charts
from ui.charts.router import Panel
from ui.prose import plain
from ui.router.settings import PREFIX, WAY_RUN, Settings
from ui.router.tokens import around

_HEIGHT = 900


def way(given: Settings) -> None:
    """The token in its text, its steps, and where it goes."""
    found: router_token.Result | None = run.run("router_token", given.params, key=WAY_RUN)
    if found is None:
        if run.is_running(WAY_RUN):
            st.skeleton(height=_HEIGHT)
        return
    params: router_token.Params = run.params_of(WAY_RUN)
    st.markdown(around(found.tokens, found.position))
    st.caption(
        plain(
            f"Token {found.position} (counted from 0; the text has {len(found.tokens)}), as layer {found.layer} of "
            f"{found.model} receives it; a vector of length {found.norm:.3g}, scaled to unit mean square. "
            f"{kind_sentence(params.kind)}"
        )
    )
    panels = [Panel(step.title, step.formula, step.values, step.note, step.name == "rank") for step in found.stages]
    key = f"{PREFIX}_way"
    fig = charts.way(panels, found.chosen, mode=theme.mode())
    chart.figure(
        fig, key=key, sentence=f"{found.sentence} {_colours(found)} {entropy_sentence(found.entropy, params.kind)}"
    )
    export.export(fig, key=key, name="router-way", experiment="router_token", params=params, data=lambda: table(found))


def kind_sentence(kind: str) -> str:
    """What this kind of routing does, without its source."""
    return f"{kind.capitalize()} routing. {KINDS[kind].split('. ')[0]}."


def entropy_sentence(entropy: float, kind: str) -> str:
    """How undecided the router is, and of which numbers that is said."""
    of = ", that of the scores divided by their sum, which are no probabilities before" if kind == "sigmoid" else ""
    return f"The router's entropy is {entropy:.2f} nats{of}."


def table(found: router_token.Result) -> pd.DataFrame:
    """Every step of every expert as a row."""
    return pd.DataFrame(
        [
            {"step": step.name, "expert": expert, "value": value}
            for step in found.stages
            for expert, value in enumerate(step.values)
        ]
    )


def _colours(found: router_token.Result) -> str:
    """Whose bars are coloured."""
    if not found.chosen:
        return "No bar is coloured."
    return "Coloured are the bars of the experts that compute it."
