"""The two charts of the training lab: what its model's tokens cost, and how its heads learn to look back."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from engine.experiments import training
from engine.experiments._training import Recorded, recorded_run
from ui import chart, export, theme
from ui.charts import training as charts
from ui.prose import plain
from ui.training import sentences
from ui.training.settings import PREFIX

STEPS, TOKENS = "Steps", "Tokens read"
HEIGHT = 340
_STORYTELLER = "storyteller (recorded)"
_HEAD_FORMED = "head formed"


def loss(found: training.Result, params: training.Params, along: str) -> None:
    """What a token costs: of all that is read step by step, and at checkups of each kind."""
    recorded = None if params.text.strip() else _recorded(along)  # of another text it says nothing
    lines = [
        line("training loss", found, found.step, found.loss, along, 0, raw=True),
        line("held-out loss", found, found.checked, found.held_out_loss, along, 1),
    ]
    if 0 < params.random_share < 1:  # otherwise the training loss is of one kind
        lines.append(line("text it reads", found, found.checked, found.text_loss, along, 2, dotted=True))
        lines.append(line("random, said again", found, found.checked, found.random_loss, along, 3, dotted=True))
    sentence = sentences.loss(found)
    if len(found.loss):
        sentence += f" {sentences.apart(found, params.random_share)}"
    if recorded is not None:
        # A nat a character is the same for every tokenizer; this run's tokens hold fewer characters.
        rescaled = recorded.held_out_loss * found.characters_per_token / recorded.characters_per_token
        lines.append(line(_STORYTELLER, recorded, recorded.checked, rescaled, along, None))
        sentence += f" {sentences.storyteller(recorded, found.tokens_per_step)} Its loss is converted to these tokens."
    fig = charts.curves(
        lines,
        across=_across(along),
        up="loss, nats a token",
        logarithmic=along == TOKENS,
        marks=[(sentences.GUESSING, "guessing")],
        moment=_moment(found, along),
        span=span(found, along),
        note=_provenance(recorded),
        mode=theme.mode(),
    )
    _show(fig, lines, along, params, key="loss", sentence=sentence)


def heads(found: training.Result, params: training.Params, along: str) -> None:
    """How the best heads score on random tokens said twice, what that means, and why it comes about."""
    recorded = _recorded(along)
    lines = [
        line("induction", found, found.checked, found.induction, along, 2),
        line("previous token", found, found.checked, found.previous_token, along, 3),
        line("copied right", found, found.checked, found.copied, along, 4),
    ]
    sentence = sentences.induction(found, params.num_layers)
    if recorded is not None:
        lines.append(line(_STORYTELLER, recorded, recorded.checked, recorded.induction, along, None))
        sentence += f" The storyteller was scored on {recorded.probe}."
    fig = charts.curves(
        lines,
        across=_across(along),
        up="score, or share copied",
        logarithmic=along == TOKENS,
        share=True,
        marks=[(sentences.FORMED, "a head of this kind")],
        moment=_moment(found, along),
        span=span(found, along),
        note=_provenance(recorded),
        mode=theme.mode(),
    )
    why = f"{sentences.INDUCTION_HEAD} {sentences.mixture(params.random_share)}"
    _show(fig, lines, along, params, key="heads", sentence=sentence, more=why)


def look_back(found: training.Result) -> None:
    """What the best induction head looks at, before it has learned anything and now."""
    fig = charts.look_back(
        *found.head_maps,
        titles=("before the first step", f"after step {found.checked[-1]}"),
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{PREFIX}_look_back", sentence=sentences.look_back(found), height=HEIGHT)


def storyteller(recorded: Recorded) -> None:
    """How the storyteller learned: what there is to see before anything has been trained here."""
    reached = np.flatnonzero(recorded.induction >= sentences.FORMED)
    moment = (_reads(recorded, recorded.checked[reached[0]]), _HEAD_FORMED) if len(reached) else None
    shared = {
        "across": _across(TOKENS),
        "logarithmic": True,
        "moment": moment,
        "span": (recorded.tokens_per_step, _reads(recorded, recorded.step[-1])),
        "note": _provenance(recorded),
        "mode": theme.mode(),
    }
    left, right = st.columns(2, gap="small")
    with left:
        lines = [
            line("training loss", recorded, recorded.step, recorded.loss, TOKENS, 0, raw=True),
            line("held-out loss", recorded, recorded.checked, recorded.held_out_loss, TOKENS, 1),
        ]
        words = f"The storyteller's held-out loss fell to {recorded.held_out_loss.min():.2f} nats a token."
        chart.figure(
            charts.curves(lines, up="loss, nats a token", **shared),
            key=f"{PREFIX}_storyteller_loss",
            sentence=words,
            height=HEIGHT,
        )
    with right:
        lines = [
            line("induction", recorded, recorded.checked, recorded.induction, TOKENS, 2),
            line("previous token", recorded, recorded.checked, recorded.previous_token, TOKENS, 3),
        ]
        words = f"Its best induction head scores {recorded.induction[-1]:.0%}. {sentences.INDUCTION_HEAD}"
        chart.figure(
            charts.curves(lines, up="score of the best head", share=True, **shared),
            key=f"{PREFIX}_storyteller_heads",
            sentence=words,
            height=HEIGHT,
        )


def line(
    name: str,
    found: training.Result | Recorded,
    step: np.ndarray,
    values: np.ndarray,
    along: str,
    colour: int | None,
    *,
    raw: bool = False,
    dotted: bool = False,
) -> charts.Line:
    """A curve along what was chosen; a logarithmic axis has no place for what was measured before the first token."""
    kept = step > 0 if along == TOKENS else slice(None)
    scale = found.tokens_per_step if along == TOKENS else 1
    return charts.Line(name, step[kept] * scale, values[kept], colour, raw, dotted)


def span(found: training.Result, along: str) -> tuple[float, float]:
    """What the horizontal axis shows: the same from the first step to the last."""
    end, recorded = max(1, _end(found)), _recorded(along)
    if along == STEPS:
        return 0, end
    ends = [end * found.tokens_per_step] + ([_reads(recorded, recorded.step[-1])] if recorded else [])
    return found.tokens_per_step, max(*ends, 2 * found.tokens_per_step)


def _show(
    fig: go.Figure,
    lines: list[charts.Line],
    along: str,
    params: training.Params,
    *,
    key: str,
    sentence: str,
    more: str = "",
) -> None:
    chart.figure(fig, key=f"{PREFIX}_{key}", sentence=sentence, height=HEIGHT)
    if more:
        st.caption(plain(more))
    export.export(
        fig,
        key=f"{PREFIX}_{key}",
        name=f"training-{key}",
        experiment="training",
        params=params,
        data=lambda: charts.table(lines, _across(along)),
    )


def _moment(found: training.Result, along: str) -> tuple[float, str] | None:
    """When an induction head had formed, in the units of the axis."""
    first = sentences.formed(found)
    if not first:  # a head that was there before the first step did not form
        return None
    step = int(found.checked[first])
    return (step if along == STEPS else _reads(found, step)), _HEAD_FORMED


def _reads(found: training.Result | Recorded, step: int) -> int:
    """Tokens that were read by `step`."""
    return int(step) * found.tokens_per_step


def _provenance(recorded: Recorded | None) -> str:
    return "" if recorded is None else f"storyteller: our model on an {recorded.provenance}"


def _recorded(along: str) -> Recorded | None:
    """The storyteller's run where it can be compared: its steps hold other numbers of tokens than this run's."""
    return recorded_run() if along == TOKENS else None


def _end(found: training.Result) -> int:
    """The step at which the run ended or, while it is running, is to end."""
    return found.steps if found.ended == "running" else int(found.checked[-1])


def _across(along: str) -> str:
    return "tokens read" if along == TOKENS else "step"
