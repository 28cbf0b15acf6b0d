"""The Two inputs view: opposite targets, two experts, and a bias that pushes the inputs apart."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import moe_lora_split
from ui import chart, export, run, theme
from ui.charts import moe_lora_split as charts
from ui.moe_lora.settings import SPLIT_PREFIX, Settings
from ui.prose import plain

RUN = f"{SPLIT_PREFIX}_run"
_HEIGHT = 640
_LEARNED = 0.01
"""Mean squared error below which an input is learned; its target's is about 1."""


def two_inputs(given: Settings) -> None:
    """The whole course of the experiment."""
    found: moe_lora_split.Result | None = run.run("moe_lora_split", given.params, key=RUN)
    if found is None:
        if run.is_running(RUN):
            st.skeleton(height=_HEIGHT)
        return
    params: moe_lora_split.Params = run.params_of(RUN)
    st.markdown(
        plain(
            f"Two inputs of {moe_lora_split.WIDTH} numbers, A and B, with a cosine of {found.cosine:.2f}: the target "
            "of B is the opposite of A's. There are two experts, and each input takes one."
        )
    )
    fig = charts.split(
        found.lead,
        found.handicap,
        found.chosen,
        found.loss,
        "of scores" if params.kind == "sigmoid" else "of logits",
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{SPLIT_PREFIX}_chart", sentence=split_sentence(found, params), height=_HEIGHT)
    export.export(
        fig,
        key=f"{SPLIT_PREFIX}_chart",
        name="moe-lora-two-inputs",
        experiment="moe_lora_split",
        params=params,
        data=lambda: rounds_table(found),
    )
    if found.others:
        st.info(plain(others_sentence(found, params)), icon=":material/casino:")
    else:
        st.caption("Is it this seed's luck? Move “Other seeds” to run more of them.")


def split_sentence(found: moe_lora_split.Result, params: moe_lora_split.Params) -> str:
    """How the two inputs fared, in words."""
    rounds = len(found.loss) - 1
    error = float(found.loss[-1].max())
    if found.apart:
        a, b = found.chosen[-1]
        when = "from the start on" if found.settled == 0 else f"from round {found.settled} on"
        words = f"A takes expert {a}, B expert {b}, {when}"
    else:
        words = f"After {rounds} rounds both take expert {found.chosen[-1, 0]}"
    pushed = float(np.abs(found.handicap).max())
    if params.bias_rate == 0:
        words += "; there is no bias, so the line between the experts stays at 0"
    elif pushed == 0:
        words += "; the bias never had to move"
    else:
        words += f"; the bias moved the line between the experts by up to {pushed:.2f}"
    words += f". The larger of the two errors went from {found.loss[0].max():.2f} to {_small(error)}."
    if not found.apart and error < _LEARNED:
        words += (
            " So sharing costs nothing here: one expert can give two inputs that differ opposite outputs. What it "
            "leaves is an expert without an input."
        )
    return words


def others_sentence(found: moe_lora_split.Result, params: moe_lora_split.Params) -> str:
    """How many of the seeds part, in words."""
    rounds = [found.settled, *found.others]
    parted = [when for when in rounds if when is not None]
    first, last = params.seed, params.seed + len(found.others)
    chance = math.acos(params.similarity) / math.pi  # that a random plane lies between two vectors at this angle
    words = f"Of seeds {first} to {last}, {len(parted)} of {len(rounds)} end on different experts"
    if parted and params.bias_rate:
        words += f", the latest from round {max(parted)} on"
    return f"{words}. If nothing pushed them, a fresh router would part about {chance:.0%}."


def rounds_table(found: moe_lora_split.Result) -> pd.DataFrame:
    """Every round of both inputs, a row each."""
    rounds, inputs = (places.ravel() for places in np.indices(found.chosen.shape))
    return pd.DataFrame(
        {
            "round": rounds,
            "input": np.array(["A", "B"])[inputs],
            "score_expert_0": found.scores[..., 0].ravel(),
            "score_expert_1": found.scores[..., 1].ravel(),
            "bias_expert_0": found.bias[rounds, 0],
            "bias_expert_1": found.bias[rounds, 1],
            "takes": found.chosen.ravel(),
            "squared_error": found.loss.ravel(),
        }
    )


def _small(error: float) -> str:
    return "less than 1e-6" if error < 1e-6 else f"{error:.2g}"
