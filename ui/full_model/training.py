"""The Training view: the model of the switches learns a text, live, and goes on after a prompt meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from engine.experiments import full_model_training
from engine.experiments._full_model import SWITCHES
from engine.experiments._full_model_runs import PROMPTS
from ui import chart, controls, export, run, theme
from ui.charts import full_model_runs as charts
from ui.charts.memory import amount
from ui.charts.training import Line, curves, table
from ui.controls import Look
from ui.full_model.settings import KEPT, PREFIX, Settings
from ui.lora.settings import count
from ui.prose import plain
from ui.train_button import train_button

RUN = f"{PREFIX}_training_run"
OWN = f"{PREFIX}_training"
"""Prefix of this view's own controls."""
_STARTED = f"_{OWN}_started"
_HEIGHT = 320
_AUTOMATIC = 0.0  # stands for the rate that suits what learns: a list that holds None can be emptied
_RATES = (_AUTOMATIC, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0)
_UNEVEN = 0.5
"""MaxVio from which on a sentence calls the busiest expert's load uneven."""


def training(given: Settings) -> None:
    """This view's own controls, the button, and the run as it goes."""
    params = _params(given)
    started = st.session_state.get(_STARTED)
    train_button(
        params,
        started,
        _start,
        running=run.is_running(RUN),
        waiting=run.is_waiting(RUN),
        prefix=OWN,
    )
    if started is None:
        st.info(
            "Nothing is trained yet in this session; a link brings settings, not results. Press “Train”: the model of "
            "the switches learns a text, and tells how it goes on after the prompt, again and again. Then turn a "
            "switch and train again.",
            icon=":material/school:",
        )
        return
    run.watch("full_model_training", started, _draw, key=RUN, height=_HEIGHT)


def _params(given: Settings) -> full_model_training.Params | None:
    model = full_model_training.Params
    left, right = st.columns(2, gap="medium")
    place = st.container()
    with st.expander("Text and learning rate", icon=":material/tune:"):
        values = KEPT.controls(
            model,
            prefix=OWN,
            fields=["text", "learning_rate"],
            notes=place,
            learning_rate=Look(
                options=_RATES,
                name=lambda rate: f"{rate:g}" if rate else "what suits the switches",
                widget="select",
                value=_AUTOMATIC,
            ),
        )
    with left:
        prompt = Look(placeholder="words of your text" if values["text"].strip() else PROMPTS[given.params.begin])
        values |= KEPT.controls(model, prefix=OWN, fields=["prompt"], prompt=prompt)
    with right:
        values |= KEPT.controls(model, prefix=OWN, fields=["steps"], steps=Look(minimum=10, maximum=1000, step=10))
    values["learning_rate"] = values["learning_rate"] or None
    with place:
        return controls.validated(model, given.params.model_dump() | values)


def _start(params: full_model_training.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask("full_model_training", params, key=RUN)


def _draw(found: full_model_training.Result, params: full_model_training.Params) -> None:
    _state(found, params)
    _figures(found)
    left, right = st.columns(2, gap="small")
    with left:
        _loss(found, params)
    with right:
        _speed(found, params)
    _samples(found)
    if found.mixtures:
        _balance(found, params)


def _state(found: full_model_training.Result, params: full_model_training.Params) -> None:
    on = [label for name, label in SWITCHES.items() if getattr(params, name)]
    words = f"On: {', '.join(on) or 'nothing'}. {found.ending}"
    if found.ended == "running":
        st.caption(plain(f"{words} {found.device}"))
        return
    words = plain(f"{words} {seconds_sentence(found)} {found.device}, torch {found.versions['torch']}.")
    if found.ended == "diverged":
        st.warning(words, icon=":material/trending_up:")
    elif found.ended in ("cancelled", "timed out"):
        st.info(words, icon=":material/info:")
    else:
        st.caption(words)


def seconds_sentence(found: full_model_training.Result) -> str:
    """How long it took, and what with."""
    steps = float(np.sum(found.tokens_per_step / found.tokens_per_second))
    return f"It took {found.seconds:.3g} s, {steps:.3g} of them in steps, the rest for samples and held-out losses."


def _figures(found: full_model_training.Result) -> None:
    with st.container(horizontal=True, key=f"{OWN}_figures"):
        st.metric("Learning", count(found.learning), help=f"Numbers, beside {found.parameters:,} of the plain model.")
        st.metric("Model", amount(found.model_bytes), help="Weights as they are stored, adapters included.")
        st.metric(
            "Memory of a step",
            amount(found.step_bytes) if found.step_bytes else "—",
            help="At its peak: weights, AdamW's means of what learns, and what the second step allocates, weighed.",
        )
        speed = f"{np.median(found.tokens_per_second):,.0f}/s" if len(found.step) else "—"
        st.metric("Tokens", speed, help="Median of the steps so far; other work on this machine slows them down.")


def span(found: full_model_training.Result) -> tuple[float, float]:
    """What the horizontal axis shows: all steps while it runs, then those that were taken."""
    taken = int(found.checked[-1]) if not len(found.step) else int(found.step[-1])
    return 0, max(1, found.steps if found.ended == "running" else taken)


def loss_sentence(found: full_model_training.Result) -> str:
    """From where to where the held-out loss went."""
    first, last = found.held_out_loss[0], found.held_out_loss[-1]
    lowest = int(found.held_out_loss.argmin())
    words = (
        f"On text that it never learns, {first:.2f} nats a token before the first step and {last:.2f} after step "
        f"{found.checked[-1]}; thinking all tokens alike likely costs {found.guessing:.2f}. The learning rate rises to "
        f"{found.learning_rate:g}, then falls."
    )
    if last > found.held_out_loss[lowest] + 0.1:
        words += (
            f" It was lower after step {found.checked[lowest]}, {found.held_out_loss[lowest]:.2f}: by now it learns "
            "its own text by heart."
        )
    return words


def speed_sentence(found: full_model_training.Result) -> str:
    """How fast the steps were."""
    if not len(found.step):
        return "No step was taken yet."
    low, median, high = np.quantile(found.tokens_per_second, (0.1, 0.5, 0.9))
    return (
        f"Steps of {found.tokens_per_step:,} tokens: {median:,.0f} tokens/s by the median, {low:,.0f} to {high:,.0f} "
        "for eight in ten. The second step is slower, as its memory is weighed."
    )


def balance_sentence(found: full_model_training.Result) -> str:
    """How evenly the mixtures' experts are loaded now, and how they were at first."""
    now, first = found.violation[-1], found.violation[0]
    worst = int(now.argmax())
    words = (
        f"After step {found.checked[-1]} the busiest expert of a mixture gets {now.mean():.0%} more than its fair "
        f"share, the mean over {len(now)} mixtures ({first.mean():.0%} before the first step); most is "
        f"{now[worst]:.0%}, in {short(found.mixtures[worst])}."
    )
    if now[worst] > _UNEVEN:
        words += " That is uneven: the selection bias moves with every step and needs some more of them."
    return words


def _loss(found: full_model_training.Result, params: full_model_training.Params) -> None:
    lines = [
        Line("learned text", found.step, found.loss, 0, raw=True),
        Line("held-out text", found.checked, found.held_out_loss, 1),
    ]
    fig = curves(
        lines,
        across="step",
        up="loss, nats a token",
        marks=[(found.guessing, "guessing")],
        span=span(found),
        mode=theme.mode(),
    )
    _show(fig, "loss", loss_sentence(found), lines, params)


def _speed(found: full_model_training.Result, params: full_model_training.Params) -> None:
    lines = [Line("tokens a second", found.step, found.tokens_per_second, 2, raw=True)]
    fig = curves(lines, across="step", up="tokens a second", span=span(found), mode=theme.mode())
    _show(fig, "speed", speed_sentence(found), lines, params)


def _balance(found: full_model_training.Result, params: full_model_training.Params) -> None:
    st.subheader("Which experts the tokens go to", anchor=False)
    lines = [
        Line("worst mixture", found.checked, found.violation.max(1), 1),
        Line("mean of all", found.checked, found.violation.mean(1), 0),
    ]
    left, right = st.columns(2, gap="small")
    with left:
        fig = curves(
            lines, across="step", up="busiest expert above its fair share", span=span(found), mode=theme.mode()
        )
        fig.update_yaxes(tickformat=".0%")
        _show(fig, "balance", balance_sentence(found), lines, params)
    with right:
        names = [short(name) for name in found.mixtures]
        fig = charts.loads(found.load[-1], names, mode=theme.mode())
        words = (
            f"Tokens of the held-out text after step {found.checked[-1]}: 1 is an expert's fair share. Every "
            "feed-forward matrix has a mixture of its own."
        )
        key = f"{OWN}_loads"
        chart.figure(fig, key=key, sentence=words, height=max(_HEIGHT, 130 + 26 * len(names)))
        _export(fig, key, params, lambda: loads_table(found))


def short(name: str) -> str:
    """A mixture's place in a few letters, e.g. ``"layer 0, gate"`` for ``"layers.0.mlp.gate_proj"``."""
    _, layer, *_, matrix = name.split(".")
    return f"layer {layer}, {matrix.removesuffix('_proj')}"


def loads_table(found: full_model_training.Result) -> pd.DataFrame:
    """Every expert at every checkup, a row each."""
    M, N, E = found.load.shape
    step, mixture, expert = (places.ravel() for places in np.indices((M, N, E)))
    return pd.DataFrame(
        {
            "step": found.checked[step],
            "mixture": np.array(found.mixtures)[mixture],
            "expert": expert,
            "load over fair share": found.load.ravel(),
        }
    )


def _samples(found: full_model_training.Result) -> None:
    st.subheader("What it says", anchor=False)
    st.caption(plain(f"It goes on after “{found.prompt}”; chance plays the same part at every step."))
    for sample in reversed(found.samples):
        with st.container(border=True, gap="xsmall"):
            st.markdown(f"**After step {sample.step}**" if sample.step else "**Before the first step**")
            st.text(sample.text)


def _show(fig: go.Figure, name: str, sentence: str, lines: list[Line], params: full_model_training.Params) -> None:
    key = f"{OWN}_{name}"
    chart.figure(fig, key=key, sentence=sentence, height=_HEIGHT)
    _export(fig, key, params, lambda: table(lines, "step"))


def _export(fig: go.Figure, key: str, params: full_model_training.Params, data: Callable[[], pd.DataFrame]) -> None:
    name = key.removeprefix(f"{OWN}_")
    export.export(fig, key=key, name=f"whole-model-{name}", experiment="full_model_training", params=params, data=data)
