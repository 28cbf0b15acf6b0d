"""The view of a text: its tokens coloured by expert, how full the experts are, and every token beside every expert."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import router_text
from ui import chart, export, links, run, theme
from ui.charts import router as charts
from ui.prose import plain
from ui.router import tokens
from ui.router.settings import PREFIX, TEXT_RUN, Settings

SOURCE = f"{PREFIX}_source"
_ALL = "all"
_HEIGHT, _LOAD_HEIGHT, _ROW = 560, 330, 22


def text(given: Settings) -> None:
    """The text, the load and the map."""
    found = routed(given)
    if found is None:
        return
    params: router_text.Params = run.params_of(TEXT_RUN)
    _totals(found, params)
    mode = theme.mode()
    starts = source_starts(found.token_source)
    st.html(tokens.by_expert(found.tokens, starts, found.experts, found.gates, found.left_out, mode=mode))
    st.caption(plain(legend_sentence(found)))
    key = f"{PREFIX}_load"
    load = found.load
    fair, words = fair_share(load, experts_choose=params.kind == "expert choice")
    fig = charts.loads(load.load, load.wanted, fair, words, mode=mode)
    chart.figure(fig, key=key, sentence=found.sentence, height=_LOAD_HEIGHT)
    export.export(
        fig, key=key, name="router-load", experiment="router_text", params=params, data=lambda: load_table(found)
    )
    _map(found, params, starts)
    st.caption(plain(f"{found.router_sentence} {found.origin}"))


def routed(given: Settings) -> router_text.Result | None:
    """The text of the page at its router; None while there is nothing to show."""
    found = run.run("router_text", given.params, key=TEXT_RUN)
    if found is None and run.is_running(TEXT_RUN):
        st.skeleton(height=_HEIGHT)
    return found


def source_starts(token_source: np.ndarray) -> list[int]:
    """Index of the first token of each source."""
    return [0, *(np.flatnonzero(np.diff(token_source)) + 1).tolist()]


def legend_sentence(found: router_text.Result) -> str:
    """How to read the coloured text, and what it shows."""
    first = found.experts[:, 0]
    words = (
        "Below each token are its experts, the largest gate first; its tint is the first one's colour, and the bar is "
        "divided by the gates."
    )
    if len(found.load.load) > charts.COLOURS:
        words += f" There are {charts.COLOURS} colours: expert {charts.COLOURS} has that of expert 0."
    if found.left_out.any():
        words += f" Struck out: {_tokens(int(found.left_out.sum()))} that no expert computes."
    changes = int((np.diff(first[first >= 0]) != 0).sum())
    if (first >= 0).sum() > 1:
        words += f" From one token to the next the first expert changes {changes} of {(first >= 0).sum() - 1} times."
    return words


def map_sentence(found: router_text.Result, shown: slice) -> str:
    """Where the router is surest and where it hesitates most, among the tokens shown."""
    probs = found.probs[shown]
    if probs.shape[1] == 1:
        return "Every token gives the one expert probability 1."
    best = probs.max(1)
    sure, unsure = int(best.argmax()), int(best.argmin())
    if best[sure] - best[unsure] < 1e-3:
        return f"The router prefers no expert: none gets more than {best[sure]:.0%} of any token."
    labels = found.tokens[shown]
    return (
        f"The router is surest at “{labels[sure]}”, of which expert {int(probs[sure].argmax())} gets {best[sure]:.0%}, "
        f"and hesitates most at “{labels[unsure]}”, where no expert gets more than {best[unsure]:.0%}."
    )


def scale_sentence(experts: int, kind: str) -> str:
    """What the colours of the map are, and what is called a probability where scores do not compete."""
    words = (
        "One expert always has its fair share, so all of the map has the colour of 1."
        if experts == 1
        else f"Coloured is the probability ÷ the fair share 1/{experts}, up to the largest shown."
    )
    if kind == "sigmoid":
        words += " Of sigmoid routing it is a score divided by the sum of the token's scores."
    return words


def load_table(found: router_text.Result) -> pd.DataFrame:
    """The load of each expert as a row."""
    load = found.load
    return pd.DataFrame(
        {
            "expert": np.arange(len(load.load)),
            "tokens": load.load,
            "wanted": load.wanted,
            "load_over_fair_share": load.relative,
            "importance": load.importance,
        }
    )


def map_table(found: router_text.Result) -> pd.DataFrame:
    """Every token at every expert as a row."""
    count, experts = found.probs.shape
    places, columns = np.divmod(np.arange(count * experts), experts)
    return pd.DataFrame(
        {
            "place": places,
            "token": [found.tokens[place] for place in places],
            "source": found.token_source[places],
            "expert": columns,
            "probability": found.probs.ravel(),
            "gate": found.gates.ravel(),
            "refused": found.dropped.ravel(),
        }
    )


def fair_share(load: router_text.Load, *, experts_choose: bool) -> tuple[float, str]:
    """What each expert would get if all got the same, and what that is: the one that `Load.relative` is measured by.

    Capacity does not change it: what tokens want is shared, not what is left of that. Where experts choose there is no
    wish, and it is the mean of what they take.
    """
    shared, words = (load.load, "mean load") if experts_choose else (load.wanted, "fair share N·K/E")
    return float(shared.mean()), words


def _totals(found: router_text.Result, params: router_text.Params) -> None:
    with st.container(horizontal=True, key=f"{PREFIX}_totals"):
        for label, value, meaning in totals(found, experts_choose=params.kind == "expert choice"):
            st.metric(label, value, help=meaning)


def totals(found: router_text.Result, *, experts_choose: bool = False) -> list[tuple[str, str, str]]:
    """Label, value and meaning of the figures above the text; a dash where nothing is wanted and there is no figure."""
    load, experts = found.load, len(found.load.load)
    labels = (
        ("Busiest expert", "Entropy of the load", "Dead experts", "Dropped")
        if experts_choose
        else ("Most wanted expert", "Entropy of the wishes", "Wanted by no token", "Dropped")
    )
    if np.isnan(load.max_violation):
        return [(label, "–", "No token wants an expert, so there is no figure.") for label in labels]
    fair, words = fair_share(load, experts_choose=experts_choose)
    counted = "" if experts_choose else " Counted is what tokens want, before capacity refuses any of it."
    room = "." if found.capacity is None else f": it takes at most {_tokens(found.capacity)}."
    values = (
        (
            f"{load.relative.max():.2f} × fair",
            f"The {words} is {fair:.4g} tokens. MaxVio = (max − mean) / mean = {load.max_violation:.2f}: 0 when all "
            f"get the same.{counted}",
        ),
        (
            f"{load.entropy:.2f} nats",
            f"{load.entropy_share:.0%} of ln {experts} = {np.log(experts):.2f}, that of equal shares.{counted}",
        ),
        (
            f"{len(load.dead)} of {experts}",
            "Experts that take no token." if experts_choose else "Experts that no token chooses.",
        ),
        (f"{load.dropped_share:.0%}", f"Choices of an expert that had no room left{room}"),
    )
    return [(label, *figure) for label, figure in zip(labels, values, strict=True)]


def _map(found: router_text.Result, params: router_text.Params, starts: list[int]) -> None:
    """Tokens beside experts: all of them, or one source with its tokens by name."""
    shown, ends = slice(0, len(found.tokens)), [*starts[1:], len(found.tokens)]
    if len(starts) > 1:
        names = {_ALL: "All sources"} | {
            str(number): f"{number} · {name}" for number, name in enumerate(found.sources, 1)
        }
        held = st.session_state.get(SOURCE)
        if held is not None and held not in names:
            st.query_params.pop(SOURCE, None)  # it was of a text of more sources
        linked = st.query_params.get(SOURCE, _ALL)
        held = linked if held is None else held
        st.session_state[SOURCE] = held if held in names else _ALL
        if linked not in names:
            links.ignored(SOURCE, linked, links.one_of(list(names)), _ALL)
        chosen = st.selectbox(
            "Tokens of",
            list(names),
            format_func=lambda option: names[option],
            key=SOURCE,
            help="Of one source the tokens are named below the map.",
            on_change=_write_source,
        )
        if chosen != _ALL:
            shown = slice(starts[int(chosen) - 1], ends[int(chosen) - 1])
    whole = shown == slice(0, len(found.tokens))
    experts = found.probs.shape[1]
    key = f"{PREFIX}_map"
    fig = charts.tokens_by_expert(
        found.probs[shown],
        found.gates[shown] > 0,
        found.dropped[shown],
        found.tokens[shown],
        starts if whole else (0,),
        mode=theme.mode(),
    )
    said = f"{map_sentence(found, shown)} {scale_sentence(experts, params.kind)}"
    chart.figure(fig, key=key, sentence=said, height=224 + _ROW * max(8, experts))
    export.export(
        fig, key=key, name="router-tokens", experiment="router_text", params=params, data=lambda: map_table(found)
    )


def _write_source() -> None:
    """Put the chosen source's number into the URL: a bound list would write its first words."""
    chosen = st.session_state[SOURCE]
    if chosen == _ALL:
        st.query_params.pop(SOURCE, None)
    else:
        st.query_params[SOURCE] = chosen


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
