"""The Online softmax view: a row of scores chunk by chunk; the naive softmax overflows, this one does not."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import flash_online
from engine.experiments._flash import number_in_words
from ui import chart, export, run, theme
from ui.charts import flash_softmax as charts
from ui.charts.flash_softmax import Chunk
from ui.flash.settings import PREFIX, Settings

RUN = f"{PREFIX}_softmax_run"
SEEN = f"{PREFIX}_chunks"
_COUNT = f"_{PREFIX}_chunk_count"
_HEIGHT = 600


def softmax(given: Settings) -> None:
    """The slider over chunks and what is known after each."""
    found: flash_online.Result | None = run.run("flash_online", given.params, key=RUN)
    if found is None:
        if run.is_running(RUN):
            st.skeleton(height=_HEIGHT)
        return
    params: flash_online.Params = run.params_of(RUN)
    _verdict(found, params)
    count = len(found.chunks)
    _follow(count)
    seen = st.slider("Chunks read", 0, count, count, key=SEEN, bind="query-params") if count > 1 else count
    chunks = found.chunks[:seen]
    fig = charts.softmax(
        found.scores,
        [Chunk(chunk.start, chunk.stop, chunk.maximum) for chunk in chunks],
        so_far(found, seen),
        found.naive,
        found.reference,
        limit=found.exp_limit,
        overflowed=found.overflowed,
        mode=theme.mode(),
    )
    key = f"{PREFIX}_softmax"
    chart.figure(fig, key=key, sentence=f"{found.sentence} {row_sentence(found, seen)}", height=_HEIGHT)
    export.export(
        fig, key=key, name="flash-softmax", experiment="flash_online", params=params, data=lambda: table(found)
    )
    if seen:
        st.markdown("**Chunk by chunk**: what is carried over is two numbers, m and l")
        st.table(steps(found, seen), border="horizontal")


def _follow(count: int) -> None:
    """Keep the slider where it makes sense among `count` chunks: who had read all of them has read all again."""
    state = st.session_state
    before, state[_COUNT] = state.get(_COUNT, count), count
    if SEEN in state:
        state[SEEN] = count if state[SEEN] == before else min(state[SEEN], count)


def so_far(found: flash_online.Result, seen: int) -> np.ndarray:
    """The weights among the scores of the first `seen` chunks."""
    if seen == len(found.chunks):
        return found.online
    if seen == 0:
        return np.zeros(0)
    last = found.chunks[seen - 1]
    return np.exp(found.scores[: last.stop].astype(float) - last.maximum) / last.sum


def row_sentence(found: flash_online.Result, seen: int) -> str:
    """What is held after the chunks that were read."""
    if seen == 0:
        return "Nothing has been read yet."
    last = found.chunks[seen - 1]
    rest = len(found.scores) - last.stop
    held = f"After {last.stop} scores m is {last.maximum:.4g} and l is {last.sum:.4g}"
    return f"{held}; {rest} scores are still to come." if rest else f"{held}: exp(score − m) / l are the weights."


def steps(found: flash_online.Result, seen: int) -> pd.DataFrame:
    """The update of every chunk that was read, with its numbers."""
    return pd.DataFrame(
        {
            f"{number}": {
                "scores": f"{chunk.start} to {chunk.stop - 1}",
                "m": f"{_number(chunk.maximum_before)} → {_number(chunk.maximum)}",
                "factor exp(m before − m)": _number(chunk.rescale),
                "l": f"{_number(chunk.rescale)} × {_number(chunk.sum_before)} + "
                f"{_number(chunk.sum - chunk.rescale * chunk.sum_before)} = {_number(chunk.sum)}",
            }
            for number, chunk in enumerate(found.chunks[:seen], 1)
        }
    ).T


def table(found: flash_online.Result) -> pd.DataFrame:
    """Every score and what the three ways make of it."""
    return pd.DataFrame(
        {
            "score": found.scores,
            "naive_exponential": found.naive_exponentials,
            "naive": found.naive,
            "online": found.online,
            "float64": found.reference,
        }
    )


def _verdict(found: flash_online.Result, params: flash_online.Params) -> None:
    with st.container(horizontal=True, key=f"{PREFIX}_softmax_verdict"):
        st.metric(
            f"Naive, in {params.dtype}",
            "no numbers" if math.isnan(found.naive_error) else f"{number_in_words(found.naive_error)} off",
            delta=f"{len(found.overflowed)} of {len(found.scores)} overflow"
            if found.overflowed
            else "nothing overflows",
            delta_color="inverse" if found.overflowed else "off",
            delta_arrow="off",
            help=f"exp(score) / Σ exp(score). {params.dtype} ends at {found.largest:.4g}, so exp overflows for scores "
            f"above {found.exp_limit:.3g}. The error is the largest difference to float64.",
        )
        st.metric(
            f"Online, in {params.dtype}",
            f"{number_in_words(found.online_error)} off",
            delta="nothing overflows",
            delta_color="off",
            delta_arrow="off",
            help="exp(score − m) with the running maximum m: never more than exp(0) = 1.",
        )


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−")
