"""The Explore, Code and Tests tabs of the attention lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import attention_effect, attention_fused, attention_head, attention_tests
from ui import chart, checks, evidence, run, source, theme
from ui.attention.one_head import ARCS, CHANGE, ONE, STEPS, TOKEN, one_head
from ui.attention.overview import all_heads
from ui.attention.settings import PREFIX, Settings, waiting
from ui.charts import attention as charts
from ui.prose import plain

ALL = "All heads"
VIEWS = (ALL, ONE, STEPS, ARCS, TOKEN, CHANGE)


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time, so that a slider redraws one chart; the next token is always beside it."""
    if waiting(given):
        return
    view = st.segmented_control(
        "Show",
        VIEWS,
        default=ALL,
        required=True,
        key=f"{PREFIX}_view",
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    if view == ALL:
        all_heads(given)
    else:
        one_head(given, view)
    with given.below:
        _next_token(given.params)
    _fused_note(given)


def _next_token(params: attention_head.Params) -> None:
    st.markdown("**Next token**")
    found = run.run("attention_effect", attention_effect.Params(**params.model_dump()), key=f"{PREFIX}_effect")
    if found is None:
        return
    if not found.candidates:
        st.caption(plain(found.sentence))
        return
    fig = charts.next_tokens(
        [candidate.token for candidate in found.candidates],
        [candidate.before for candidate in found.candidates],
        [candidate.after for candidate in found.candidates],
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{PREFIX}_next", sentence=found.sentence, height=320)


def _fused_note(given: Settings) -> None:
    seen = given.overview
    st.caption(plain(seen.fused_sentence))
    if given.params.weights == "untrained":
        return
    with st.expander("Time both ways", icon=":material/speed:", on_change="rerun", key=f"{PREFIX}_fused") as note:
        if note.open:
            text = attention_fused.Params(**given.params.model_dump(include=set(attention_fused.Params.model_fields)))
            found = run.run("attention_fused", text, key=f"{PREFIX}_fused_run")
            if found:
                st.markdown(plain(found.sentence))
                st.caption("The pass that keeps every map")
                evidence.evidence(found.eager)
                st.caption("The same pass through the fused kernel")
                evidence.evidence(found.fused)


def code() -> None:
    """The Code tab: what the pictures are computed by."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.attention:attention_stages",
            "engine.attention:_scores",
            "engine.attention:_softmax",
            "engine.masks:causal",
            "engine.masks:sliding_window",
            "engine.masks:prefix_lm",
            "engine.head_statistics:induction_score",
            "engine.head_statistics:previous_token_score",
            "engine.head_statistics:first_token_mass",
            "engine.head_statistics:entropy",
            "engine.attention:MultiHeadAttention",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the settings of this page."""
    params = attention_tests.Params(**given.params.model_dump())
    found = run.run("attention_tests", params, key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
