"""The view of what experts learned: the tokens that each one gets more often than its share, and from which source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import ExperimentParams, router_collapse, router_text
from engine.experiments._router_sources import FEWEST_TYPICAL, Typical
from ui import chart, export, run, theme
from ui.charts import router_training as charts
from ui.charts import training as training_charts
from ui.charts.training import Line
from ui.prose import plain
from ui.router.collapse import name, pinned_run, trade
from ui.router.settings import KEPT, LEARNED_FROM, PREFIX, RUN, TEXT_RUN, TRAINED, YOURS, Settings
from ui.router.text import routed

SIDE = f"{PREFIX}_learned_run"
"""The key of which run is looked at, where one is pinned."""

UNTRAINED = (
    "Nothing here is learned: nobody has trained this router, and there are no experts behind it. You see whom it "
    "would send your tokens to."
)
_HEIGHT, _ROW = 340, 44
_MOSTLY = 0.5  # share of an expert's tokens


def learned(given: Settings) -> None:
    """The table, and the sources beside the experts, of a training or of a text."""
    chosen = st.segmented_control(
        "What is looked at",
        (TRAINED, YOURS),
        default=TRAINED,
        required=True,
        key=LEARNED_FROM,
        bind="query-params",
        help="The model that was trained in the view “Collapse”, or the text of the view “A text” at its router.",
    )
    KEPT.keep(LEARNED_FROM, chosen, None if chosen == TRAINED else chosen)
    if chosen == YOURS:
        found = routed(given)
        if found is not None:
            st.markdown(UNTRAINED)
            _of_text(found, run.params_of(TEXT_RUN))
        return
    if given.started is None:
        st.info(
            "Nothing is trained yet in this session. Press **Train**: a small model with a router learns five sources, "
            "and here you see which tokens each expert gets. “Your text” needs no training: nothing is learned there.",
            icon=":material/school:",
        )
        return
    pinned, beside = pinned_run(given) if f"{PREFIX}_pin" in st.query_params else (None, None)
    if beside is None or pinned == given.started:
        run.watch("router_collapse", given.started, _of_training, key=RUN, height=_HEIGHT)
        return
    KEPT.restore(SIDE)
    side = st.segmented_control(
        "Run", ("A", "B"), default="B", required=True, key=SIDE, bind="query-params", help="A is the pinned run."
    )
    KEPT.keep(SIDE, side, None if side == "B" else side)

    def draw(found: router_collapse.Result, params: router_collapse.Params) -> None:
        st.markdown(plain(trade([("A", beside, pinned), ("B", found, params)])))
        shown = (beside, pinned) if side == "A" else (found, params)
        st.markdown(f"**{side}** · {plain(name(shown[1]))}")
        _of_training(*shown)

    run.watch("router_collapse", given.started, draw, key=RUN, height=_HEIGHT)


def _of_training(found: router_collapse.Result, params: router_collapse.Params) -> None:
    if found.ended != "running":
        st.caption(plain(found.ending))
    if params.freeze_router:
        st.caption("The router was frozen: the experts have learned what it sends them, and it has learned nothing.")
    _table(found.typical, found.sources)
    _by_source(found.counts, found.sources, found.learned, "router_collapse", params)
    fig = training_charts.curves(
        [
            Line("beyond chance", found.checked, found.information, 0),
            Line("chance alone", found.checked, found.information_chance, 1, dotted=True),
        ],
        across="step",
        up="mutual information, nats",
        marks=[(float(np.log(len(found.sources))), "all there is to say")],
        span=(0, found.steps),
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{PREFIX}_information", sentence=information_sentence(found), height=_HEIGHT)
    with st.expander("The five sources", icon=":material/article:"):
        for source, example in zip(found.sources, found.examples, strict=True):
            st.markdown(f"**{plain(source)}**: {plain(example)} …")


def _of_text(found: router_text.Result, params: router_text.Params) -> None:
    _table(found.typical, found.sources)
    _by_source(found.counts, found.sources, found.information_sentence, "router_text", params)
    st.caption(plain(found.router_sentence))


def information_sentence(found: router_collapse.Result) -> str:
    """How much the experts said about the source at first, and how much they say now."""
    if found.experts == 1:
        return "One expert says nothing about the source."
    return (
        f"What the expert says of a token's source, in nats: {found.information[0]:.2f} before the first step, "
        f"{found.information[-1]:.2f} after step {found.checked[-1]}; all there is to say is "
        f"ln {len(found.sources)} = {np.log(len(found.sources)):.2f}."
    )


def typical_table(typical: Sequence[Typical], sources: Sequence[str]) -> pd.DataFrame:
    """One row an expert, the busiest first; the dead share the last one."""
    order = sorted((one for one in typical if one.load), key=lambda one: -one.load)
    dead = [str(one.expert) for one in typical if not one.load]
    rows = pd.DataFrame(
        {
            "expert": [str(one.expert) for one in order],
            "load": [_share(one.load, 1) for one in order],
            "from": [
                f"{'mostly' if one.purity > _MOSTLY else 'most often'} “{plain(sources[one.source])}”, "
                f"{_share(one.purity)}"
                for one in order
            ],
            "most typical tokens, and how often each goes to it": [
                "  ".join(f":gray-badge[{plain(token.label)}] {_share(token.share)}" for token in one.tokens)
                or f"none that occurs {FEWEST_TYPICAL} times and of which it gets more than a fair share"
                for one in order
            ],
        }
    )
    if dead:
        rows.loc[len(rows)] = [", ".join(dead), "0%", "—", "dead: not one token"]
    return rows


def _share(part: float, digits: int = 0) -> str:
    """A share in per cent, and a small one as small, not as none."""
    least = 10.0 ** -(digits + 2)
    return f"<\u00a0{least:.{digits}%}" if 0 < part < least else f"{part:.{digits}%}"


def _table(typical: Sequence[Typical], sources: Sequence[str]) -> None:
    st.markdown("**What each expert gets**, the busiest first")
    st.table(typical_table(typical, sources), border="horizontal", hide_index=True)
    st.caption(
        "A token is typical of an expert that gets it more often than its load explains, and more often than if all "
        f"experts got the same of it, if it occurs at least {FEWEST_TYPICAL} times. 100% is a token that always goes "
        "to the expert, whatever other experts compute it as well. ␣ is a space, ⏎ a new line."
    )


def _by_source(
    counts: np.ndarray, sources: Sequence[str], sentence: str, experiment: str, params: ExperimentParams
) -> None:
    key = f"{PREFIX}_by_source"
    fig = charts.by_source(counts, sources, mode=theme.mode())
    height = max(_HEIGHT, 144 + _ROW * len(sources))
    chart.figure(fig, key=key, sentence=f"{source_sentence(counts, sources)} {sentence}", height=height)
    export.export(
        fig, key=key, name="router-sources", experiment=experiment, params=params, data=lambda: counts_table(counts)
    )


def source_sentence(counts: np.ndarray, sources: Sequence[str]) -> str:
    """Which source keeps most to one expert."""
    if not counts.sum() or counts.shape[1] == 1:
        return "Every source goes to the same expert." if counts.sum() else "No token reaches an expert."
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    source, expert = np.unravel_index(int(share.argmax()), share.shape)
    return (
        f"“{sources[source]}” keeps most to one expert: {_share(share[source, expert])} of it goes to expert {expert}."
    )


def counts_table(counts: np.ndarray) -> pd.DataFrame:
    """Every source at every expert as a row."""
    rows, columns = np.divmod(np.arange(counts.size), counts.shape[1])
    return pd.DataFrame({"source": rows, "expert": columns, "tokens": counts.ravel()})
