"""One head in five views: its map, its arithmetic, its arcs, one token's row, and what a change did to it."""

from __future__ import annotations

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

ONE, STEPS, ARCS, TOKEN, CHANGE = "One head", "Step by step", "Arcs", "One token", "What changed"


def one_head(given: Settings, view: str) -> None:
    """Draw `view` of the chosen head, beside that of the pinned run A if there is one."""
    params = given.params
    bar = st.container(horizontal=True, vertical_alignment="center")
    with bar:
        pinned = compare.pin(params, prefix=PREFIX)
        whose = ONE
        if view in (ONE, ARCS, TOKEN):
            whose = st.segmented_control(
                "Whose weights",
                ("This head", "Mean of the layer"),
                default="This head",
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
    places = st.columns(len(results)) if view != STEPS else [st.container() for _ in results]
    for place, (side, wanted, found) in zip(places, results, strict=True):
        with place:
            if side:
                st.markdown(f"**{side}** · head {wanted.layer}.{wanted.head}")
            if found.note:
                st.info(plain(found.note), icon=":material/info:")
            _HEAD_VIEWS[view](found, wanted, f"{PREFIX}_{view.replace(' ', '')}{side}", whose == "Mean of the layer")


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
    if (held := st.session_state.get(key)) is not None and held >= len(tokens):
        st.session_state[key] = len(tokens) - 1
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


def _map(found: attention_head.Result, params: attention_head.Params, key: str, mean: bool) -> None:
    first = not key.endswith("A")
    allowed = ~np.isneginf(found.masked)
    figure_place, beside = st.container(), st.container()
    cell = None
    if first and not mean:
        with beside:
            cell = _cell(found)
            st.markdown(arithmetic(found, *cell, params.temperature))
    matrix = found.layer_mean if mean else found.weights
    name = f"All heads of layer {params.layer}, averaged," if mean else f"Head {params.layer}.{params.head}"
    sentence = attention_head.describe(matrix, found.tokens, name)
    with figure_place:
        fig = charts.weights(matrix, found.tokens, allowed=allowed, cell=cell, mode=theme.mode())
        chart.figure(fig, key=key, sentence=sentence, height=500)
        if first:
            clicks.on_cell_click(key, lambda x, y: _choose_cell(found, x, y))
        _export_matrix(fig, key, matrix, found.tokens, params)


def _steps(found: attention_head.Result, params: attention_head.Params, key: str, mean: bool) -> None:
    first = not key.endswith("A")
    figure_place = st.container()
    cell = _cell(found) if first else None
    scaling = f"× {found.scale:.3g}" if params.temperature == 1 else f"× {found.scale:.3g} ÷ {params.temperature:g}"
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
        hidden = np.isneginf(found.masked).mean()
        sentence = (
            f"The scores span {found.scores.min():.3g} to {found.scores.max():.3g}; scaled, "
            f"{found.scaled.min():.3g} to {found.scaled.max():.3g}. The mask removes {hidden:.0%} of the cells; "
            f"the largest weight that is left is {found.weights.max():.0%}."
        )
        chart.figure(fig, key=key, sentence=sentence, height=400)
        if first:
            clicks.on_cell_click(key, lambda x, y: _choose_cell(found, x, y))
        _export_matrix(fig, key, found.weights, found.tokens, params)
    if cell:
        st.markdown(arithmetic(found, *cell, params.temperature))


def _arcs(found: attention_head.Result, params: attention_head.Params, key: str, mean: bool) -> None:
    threshold = st.session_state.get(f"{PREFIX}_threshold", 15)
    if not key.endswith("A"):
        threshold = st.slider(
            "Show arcs from", 1, 100, 15, format="%d %%", key=f"{PREFIX}_threshold", bind="query-params"
        )
    matrix = found.layer_mean if mean else found.weights
    shown = int((matrix >= threshold / 100).sum())
    total = int((matrix > 0).sum())
    fig = charts.arcs(matrix, found.tokens, threshold / 100, mode=theme.mode())
    sentence = (
        f"{shown} of {total} connections carry at least {threshold} %; together they hold "
        f"{matrix[matrix >= threshold / 100].sum() / matrix.sum():.0%} of the mass."
    )
    chart.figure(fig, key=key, sentence=sentence, height=420)
    _export_matrix(fig, key, matrix, found.tokens, params)


def _token(found: attention_head.Result, params: attention_head.Params, key: str, mean: bool) -> None:
    last = len(found.tokens) - 1
    query = min(st.session_state.get(f"{PREFIX}_query", last), last)
    if not key.endswith("A"):
        query = _token_choice("query", "Query (who looks)", found.tokens, last)
    row = (found.layer_mean if mean else found.weights)[query]
    fig = charts.out_of(row, found.tokens, query, mode=theme.mode())
    if row.sum() == 0:
        sentence = f"“{found.tokens[query]}” may look at nothing: the mask forbids every key."
    else:
        best = int(row.argmax())
        effective = np.exp(-(row * np.log(np.where(row > 0, row, 1))).sum())
        sentence = (
            f"“{found.tokens[query]}” looks most at “{found.tokens[best]}” ({row[best]:.0%}); "
            f"in effect it looks at {effective:.1f} tokens."
        )
    chart.figure(fig, key=key, sentence=sentence, height=420)
    _export_matrix(fig, key, row[None], found.tokens, params, [found.tokens[query]])


def _change(found: attention_head.Result, params: attention_head.Params, key: str, mean: bool) -> None:
    moved = np.nan_to_num(found.difference)
    if not moved.any():
        st.info(
            "Nothing has changed yet: move the temperature, choose a mask, or drop a token, and this view shows what "
            "that does to the head.",
            icon=":material/tune:",
        )
        return
    fig = charts.difference(found.difference, found.untouched_tokens, mode=theme.mode())
    query, target = np.unravel_index(np.abs(moved).argmax(), moved.shape)
    tokens = found.untouched_tokens
    sentence = (
        f"The largest change: “{tokens[query]}” now gives “{tokens[target]}” {moved[query, target]:+.0%} "
        f"({found.untouched[query, target]:.0%} before). On average a token moves "
        f"{np.abs(moved).sum() / 2 / len(found.tokens):.0%} of its attention."
    )
    chart.figure(fig, key=key, sentence=sentence, height=500)
    _export_matrix(fig, key, found.difference, tokens, params)


_HEAD_VIEWS = {ONE: _map, STEPS: _steps, ARCS: _arcs, TOKEN: _token, CHANGE: _change}


def _export_matrix(
    fig: Any,
    key: str,
    matrix: np.ndarray,
    tokens: list[str],
    params: attention_head.Params,
    queries: list[str] | None = None,
) -> None:
    queries = queries or tokens
    export.export(
        fig,
        key=key,
        name=f"attention-{params.layer}.{params.head}",
        experiment="attention_head",
        params=params,
        data=lambda: pd.DataFrame(
            {
                "query": np.repeat(queries, len(tokens)),
                "key": np.tile(tokens, len(queries)),
                "weight": matrix.ravel(),
            }
        ),
    )
