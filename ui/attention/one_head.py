"""One head in five views: its map, its arithmetic, its arcs, one token's row, and what a change did to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import attention_head
from ui import chart, clicks, compare, export, run, theme
from ui.attention.arithmetic import arithmetic
from ui.attention.settings import PREFIX, Settings
from ui.charts import attention as charts
from ui.prose import plain

THIS, MEAN = "This head", "Mean of the layer"
ONE, STEPS, ARCS, TOKEN, CHANGE = "One head", "Step by step", "Arcs", "One token", "What changed"


def one_head(given: Settings, view: str) -> None:
    """Draw `view` of the chosen head, beside that of the pinned run A if there is one."""
    params = given.params
    bar = st.container(horizontal=True, vertical_alignment="center")
    with bar:
        pinned = compare.pin(params, prefix=PREFIX)
        whose = THIS
        if view in (ONE, ARCS, TOKEN):
            whose = st.segmented_control(
                "Whose weights",
                (THIS, MEAN),
                default=THIS,
                required=True,
                key=f"{PREFIX}_whose",
                bind="query-params",
                label_visibility="collapsed",
            )
    sides = [("", params, f"{PREFIX}_head")]
    if pinned:
        sides = [("A", pinned, f"{PREFIX}_pinned"), ("B", params, f"{PREFIX}_head")]
    results = []
    for side, wanted, key in sides:
        found = run.run("attention_head", wanted, key=f"{key}_run")
        if found is None:
            return
        results.append((side, run.params_of(f"{key}_run") or wanted, found))
    chosen = _CHOICES[view](results[-1][2]) if view in _CHOICES else None
    places = st.columns(len(results)) if view != STEPS else [st.container() for _ in results]
    for place, (side, wanted, found) in zip(places, results, strict=True):
        with place:
            if side:
                st.markdown(f"**{side}** · layer {wanted.layer}, head {wanted.head}")
            if found.note:
                st.info(plain(found.note), icon=":material/info:")
            shown = _Shown(found, wanted, f"{PREFIX}_{view.replace(' ', '')}{side}", whose == MEAN, side != "A", chosen)
            _HEAD_VIEWS[view](shown)


@dataclass(frozen=True)
class _Shown:
    """A head as one view draws it.

    Args:
        found: the head.
        params: what it was computed with.
        key: of the figure.
        mean: whether the mean of the layer's heads is asked for.
        leads: whether this is the learner's own run, which the controls belong to, and not the pinned one.
        chosen: what was chosen above the figures, for both: a threshold in per cent, or a query.
    """

    found: attention_head.Result
    params: attention_head.Params
    key: str
    mean: bool
    leads: bool
    chosen: int | None

    @property
    def weights(self) -> np.ndarray:
        return self.found.layer_mean if self.mean else self.found.weights


def _threshold(_: attention_head.Result) -> int:
    return st.slider("Show arcs from", 1, 100, 15, format="%d %%", key=f"{PREFIX}_threshold", bind="query-params")


def _query(found: attention_head.Result) -> int:
    return _token_choice("query", "Query (who looks)", found.tokens, len(found.tokens) - 1)


def _cell(found: attention_head.Result) -> charts.Cell:
    """The query and the key that the learner looks at, chosen from lists or with a click on the map."""
    last = len(found.tokens) - 1
    best = int(found.weights[last].argmax())
    query, key = st.columns(2)
    with query:
        query = _token_choice("query", "Query (who looks)", found.tokens, last)
    with key:
        key = _token_choice("key", "Key (at whom)", found.tokens, best)
    return query, key


def _token_choice(name: str, label: str, tokens: list[str], default: int) -> int:
    key = f"{PREFIX}_{name}"
    if (held := st.session_state.get(key)) is not None and held not in range(len(tokens)):
        st.session_state[key] = default
    return st.selectbox(
        label,
        range(len(tokens)),
        index=default,
        format_func=lambda i: f"{i} · {tokens[i]}",
        key=key,
        bind="query-params",
    )


def _choose_cell(found: attention_head.Result, key: int, query: int) -> None:
    if query < len(found.tokens) and key < len(found.tokens):
        st.session_state[f"{PREFIX}_query"], st.session_state[f"{PREFIX}_key"] = query, key


def _map(shown: _Shown) -> None:
    found, params = shown.found, shown.params
    figure_place, beside = st.container(), st.container()
    cell = None
    if shown.leads and not shown.mean:
        with beside:
            cell = _cell(found)
            st.markdown(arithmetic(found, *cell, params.temperature))
    name = (
        f"All heads of layer {params.layer}, averaged," if shown.mean else f"Layer {params.layer}, head {params.head}"
    )
    with figure_place:
        fig = charts.weights(
            shown.weights, found.tokens, allowed=~np.isneginf(found.masked), cell=cell, mode=theme.mode()
        )
        sentence = attention_head.describe(shown.weights, found.tokens, name)
        chart.figure(fig, key=shown.key, sentence=sentence)
        if shown.leads:
            clicks.on_cell_click(shown.key, lambda x, y: _choose_cell(found, x, y))
        _export_matrix(fig, shown, shown.weights, found.tokens, found.tokens)


def _steps(shown: _Shown) -> None:
    found, params = shown.found, shown.params
    figure_place = st.container()
    cell = _cell(found) if shown.leads else None
    scaling = f"× {found.scale:.3g}" if params.temperature == 1 else f"× {found.scale:.3g} ÷ {params.temperature:g}"
    hidden = np.isneginf(found.masked).mean()
    sentence = (
        f"The scores span {found.scores.min():.3g} to {found.scores.max():.3g}; scaled, "
        f"{found.scaled.min():.3g} to {found.scaled.max():.3g}. The mask removes {hidden:.0%} of the cells; "
        f"the largest weight left is {found.weights.max():.0%}. Orange: negative; blue: positive; blank: hidden."
    )
    with figure_place:
        fig = charts.stages(
            found.scores,
            found.scaled,
            found.masked,
            found.weights,
            found.output,
            found.tokens,
            scaling=scaling,
            cell=cell,
            mode=theme.mode(),
        )
        chart.figure(fig, key=shown.key, sentence=sentence, height=400)
        if shown.leads:
            clicks.on_cell_click(shown.key, lambda x, y: _choose_cell(found, x, y), traces=4)
        _export_matrix(fig, shown, found.weights, found.tokens, found.tokens)
    if cell:
        st.markdown(arithmetic(found, *cell, params.temperature))


def _arcs(shown: _Shown) -> None:
    matrix, tokens = shown.weights, shown.found.tokens
    fig = charts.arcs(matrix, tokens, shown.chosen / 100, mode=theme.mode())
    drawn = matrix >= shown.chosen / 100
    sentence = (
        f"{drawn.sum()} of {(matrix > 0).sum()} connections carry at least {shown.chosen} %; together they hold "
        f"{matrix[drawn].sum() / matrix.sum():.0%} of the mass."
    )
    chart.figure(fig, key=shown.key, sentence=sentence, height=420)
    _export_matrix(fig, shown, matrix, tokens, tokens)


def _token(shown: _Shown) -> None:
    tokens = shown.found.tokens
    query = min(shown.chosen, len(tokens) - 1)  # the pinned run may be of a shorter text
    row = shown.weights[query]
    best = int(row.argmax())
    effective = np.exp(-(row * np.log(np.where(row > 0, row, 1))).sum())
    fig = charts.out_of(row, tokens, query, mode=theme.mode())
    sentence = (
        f"“{tokens[query]}” looks most at “{tokens[best]}” ({row[best]:.0%}); in effect it looks at "
        f"{effective:.1f} tokens."
    )
    chart.figure(fig, key=shown.key, sentence=sentence, height=420)
    _export_matrix(fig, shown, row[None], [tokens[query]], tokens)


def _change(shown: _Shown) -> None:
    found, tokens = shown.found, shown.found.untouched_tokens
    change = np.nan_to_num(found.difference)
    if not found.moved:
        st.info(
            "Nothing has changed yet: move the temperature, choose a mask, or drop a token, and this view shows what "
            "that does to the head.",
            icon=":material/tune:",
        )
        return
    fig = charts.difference(found.difference, tokens, mode=theme.mode())
    query, target = np.unravel_index(np.abs(change).argmax(), change.shape)
    sentence = (
        f"The largest change: “{tokens[query]}” gave “{tokens[target]}” {found.untouched[query, target]:.0%} and now "
        f"gives it {found.untouched[query, target] + change[query, target]:.0%}. On average a token moves "
        f"{found.moved:.0%} of its attention."
    )
    chart.figure(fig, key=shown.key, sentence=sentence)
    _export_matrix(fig, shown, found.difference, tokens, tokens)


_CHOICES = {ARCS: _threshold, TOKEN: _query}
_HEAD_VIEWS = {ONE: _map, STEPS: _steps, ARCS: _arcs, TOKEN: _token, CHANGE: _change}


def _export_matrix(fig: Any, shown: _Shown, matrix: np.ndarray, queries: list[str], keys: list[str]) -> None:
    export.export(
        fig,
        key=shown.key,
        name=f"attention-layer{shown.params.layer}-head{shown.params.head}",
        experiment="attention_head",
        params=shown.params,
        data=lambda: pd.DataFrame(
            {"query": np.repeat(queries, len(keys)), "key": np.tile(keys, len(queries)), "weight": matrix.ravel()}
        ),
    )
