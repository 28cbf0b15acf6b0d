"""The controls of the training lab, what the run will cost, and the button that starts it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import streamlit as st

from engine.experiments import duration, training
from engine.experiments._training_cost import Cost
from ui import controls, guess, run
from ui.controls import Look
from ui.labs import TRAINING
from ui.prose import plain
from ui.train_button import train_button

PREFIX = TRAINING.url_path
RUN = f"{PREFIX}_run"
GUESS = f"{PREFIX}_guess"
_STARTED = f"_{PREFIX}_started"
_MANY_TIMES = 20
_PREFIXES = ("", "k", "M", "G", "T", "P")
_HEADS = (1, 2, 3, 4, 8, 16)
STEPS_HELP = (
    "Updates of the weights. The learning rate's rise and fall stretch over all of them: a run of more steps takes "
    "other steps from the start, and does not merely go on from where a shorter one ended."
)
_RANDOM_HELP = (
    "This share of what it reads is random tokens, each sequence said twice, and the rest is text: the second round "
    "can only be foretold by looking back."
)
_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        params: the settings now; None if they make no sense (the sentence is then on the page).
        started: those that were last started; None before the first run.
        guess: of the last held-out loss, if one was made before that run.
    """

    params: training.Params | None
    started: training.Params | None
    guess: float | None


def settings() -> Settings:
    """Draw the controls, what a run would cost, and the button that starts it."""
    values = controls.controls(
        training.Params,
        prefix=PREFIX,
        fields=["steps", "learning_rate", "random_share", "num_layers", "d_model"],
        steps=Look(minimum=10, maximum=2000, step=10, help=STEPS_HELP),
        learning_rate=Look(options=_RATES, name=lambda rate: f"{rate:g}", widget="select"),
        random_share=Look(help=_RANDOM_HELP),
    )
    dividing = [heads for heads in _HEADS if values["d_model"] % heads == 0]
    values |= controls.controls(
        training.Params, prefix=PREFIX, fields=["num_heads"], num_heads=Look(options=dividing, widget="select")
    )
    with st.expander("Text, batch and seed", icon=":material/tune:"):
        values |= controls.controls(training.Params, prefix=PREFIX, fields=["text", "batch_size", "seed"])
    params = controls.validated(training.Params, values)
    started, running = st.session_state.get(_STARTED), run.is_running(RUN)  # first: a run that has ended is known then
    if params is not None:
        samples = _samples(params)
        st.caption(plain(cost_sentence(params.predict(samples), run.latest(RUN)) + batch_sentence(params, samples)))
    train_button(params, started, _start, running=running, waiting=run.is_waiting(RUN), prefix=PREFIX)
    if run.problem(RUN) is not None:
        st.warning("This training gave no result: the note where the curves stand says why.", icon=":material/info:")
    return Settings(params, started, guess.settled(GUESS))


def batch_sentence(params: training.Params, samples: int | None) -> str:
    """That a batch holds less than was asked for, where that is known."""
    if samples is None or samples >= params.batch_size:
        return ""
    return f" The text has {samples} samples, so a batch holds {samples}, not {params.batch_size}."


def _samples(params: training.Params) -> int | None:
    """How many samples the text holds, if it was the last run's."""
    last, known = run.latest(RUN), run.params_of(RUN)
    return last.samples_to_learn if known is not None and known.text == params.text else None


def cost_sentence(cost: Cost, last: training.Result | None) -> str:
    """What a run will cost, and for how long by the speed of this session's last run, if there was one."""
    words = (
        f"Predicted: {amount(cost.parameters)} parameters, {amount(cost.flops)}FLOP, "
        f"{amount(cost.memory_bytes)}B of memory."
    )
    times = cost.flops / training.Params().predict().flops
    if times >= _MANY_TIMES:
        words += f" This is {times:,.0f} times the arithmetic of the default run."
    if last is not None and len(last.step):
        seconds = cost.flops / last.predicted.flops * step_seconds(last)
        words += f" At the speed of your last run its steps take about {roughly(seconds)}"
        limit = training.Params.time_limit
        words += f", and it stops at its limit of {duration(limit)}." if seconds > limit else "."
    return words


def step_seconds(found: training.Result) -> float:
    """How long the steps of a run took together; the one that was weighed, and took longer for it, as the median."""
    seconds = found.tokens_per_step / found.tokens_per_second  # (S,)
    weighed = min(2, len(seconds)) - 1
    others = np.delete(seconds, weighed)
    if len(others):
        seconds[weighed] = np.median(others)
    return float(seconds.sum())


def roughly(seconds: float) -> str:
    """A time to two digits at most, in the unit that suits it, e.g. ``"40 s"``, ``"3 min"``, ``"2.1 h"``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{max(1.0, float(f'{seconds:.2g}')):g} s"


def amount(number: float) -> str:
    """A number to three digits with an SI prefix, e.g. ``"1.32 M"``; without one it ends in a space."""
    rounded = float(f"{number:.3g}")
    power = min(max(0, int(math.log10(max(abs(rounded), 1)) // 3)), len(_PREFIXES) - 1)
    return f"{rounded / 1000**power:.3g} {_PREFIXES[power]}"


def _start(params: training.Params) -> None:
    st.session_state[_STARTED] = params
    guess.settle(GUESS)
    run.ask("training", params, key=RUN)
