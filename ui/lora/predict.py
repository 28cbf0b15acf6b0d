"""The Predict tab of the LoRA lab: say how small the update is and how much it teaches, then see."""

from __future__ import annotations

import math

import streamlit as st

from engine.experiments import lora
from ui import chart, guess, run, theme
from ui.charts import training as charts
from ui.lora.fine_tune import accuracy_sentence
from ui.lora.settings import FULL, GUESS, PREFIX, RUN, SHARE_GUESS, Settings, share
from ui.prose import plain

_HEIGHT = 340
_SHARES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_CLOSE = 10  # percentage points


def predict(given: Settings) -> None:
    """Two guesses: one that arithmetic answers at once, one that only a run answers."""
    _guess_share(given.params)
    st.divider()
    _guess_accuracy(given)


def _guess_share(params: lora.Params) -> None:
    what = "full fine-tuning" if params.method == FULL else f"rank {params.rank}"
    st.markdown(f"**How small is it?** About what share of {plain(params.model)}'s numbers does {what} train?")
    guessed = st.segmented_control(
        "Your guess of the share",
        _SHARES,
        format_func=lambda part: f"{100 * part:g}%",
        key=SHARE_GUESS,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    if guessed is None:
        st.caption("What is closest counts.")
        return
    cost = params.predict()
    right, words = share_sentence(guessed, cost)
    if right:
        st.success(plain(words), icon=":material/check_circle:")
    else:
        st.info(plain(words), icon=":material/lightbulb:")


def share_sentence(guessed: float, cost: lora.Cost) -> tuple[bool, str]:
    """Whether no other choice is closer in ratio, and the answer in words."""
    part = cost.trainable / cost.parameters
    words = f"You said {100 * guessed:g}%, it is {share(part)}: {cost.trainable:,} of {cost.parameters:,}"
    if guessed == min(_SHARES, key=lambda offered: abs(math.log(offered / part))):
        return True, f"{words}. No other choice is closer."
    times = max(guessed / part, part / guessed)
    return False, f"{words}, {times:.1f} times {'less' if guessed > part else 'more'}."


def _guess_accuracy(given: Settings) -> None:
    st.markdown(
        f"**How much does it teach?** Before the training the model knows nothing of the town. How many questions will "
        f"it answer rightly after {given.params.steps} steps, asked in words that it has never trained on?"
    )
    st.slider(
        "Your guess, of the paraphrases",
        0,
        100,
        50,
        5,
        format="%d%%",
        key=GUESS,
        on_change=guess.keep,
        args=(GUESS,),
        bind="query-params",
        disabled=run.is_running(RUN),  # what is guessed then would be for no run
    )
    if given.params.facts.strip():
        st.caption("Your own facts have no paraphrases: the guess is then of the questions themselves.")
    if given.started is None:
        st.caption("Set your guess, then press “Train”.")
        return

    def draw(found: lora.Result, params: lora.Params) -> None:
        if given.guess is None:
            st.caption("Nothing was guessed before this run. Set your guess for another, then press “Train again”.")
            return
        if found.ended != "running" and (run.is_running(RUN) or run.problem(RUN) is not None):
            st.caption("Your guess waits for the training that it was made for.")
            return
        _verdict(found, given.guess)
        if found.ended != "running" and params != given.params:
            st.caption("The settings have changed since this run: guess again, then press “Train again”.")

    run.watch("lora", given.started, draw, key=RUN, height=_HEIGHT)


def _verdict(found: lora.Result, guessed: int) -> None:
    """The guess beside what was measured or, in a run that is under way, beside where it is."""
    asked = found.held_out_accuracy if len(found.held_out_accuracy) else found.accuracy
    name = "paraphrases" if len(found.held_out_accuracy) else "training questions"
    if not len(asked):
        st.info("The first answers come in a moment.", icon=":material/hourglass_top:")
        return
    measured = 100 * float(asked[-1])
    words = f"You said {guessed}%, it is {measured:.0f}% after step {found.checked[-1]}"
    if found.ended == "running":
        st.info(plain(f"{words} of {found.steps}."), icon=":material/hourglass_top:")
    elif found.ended != "finished":
        st.info(plain(f"{words}. {guess.unjudged(found.ended, found.steps)}"), icon=":material/info:")
    elif abs(guessed - measured) <= _CLOSE:
        st.success(plain(f"{words}: well guessed."), icon=":material/check_circle:")
    else:
        side = "more" if measured > guessed else "less"
        st.info(plain(f"{words}: the model learned {side} than you expected."), icon=":material/lightbulb:")
    fig = charts.curves(
        [charts.Line(name, found.checked, asked, 0)],
        across="step",
        up="answers right",
        share=True,
        marks=[(guessed / 100, "your guess")],
        span=(0, max(1, found.steps if found.ended == "running" else int(found.checked[-1]))),
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{PREFIX}_guess_chart", sentence=accuracy_sentence(found), height=_HEIGHT)
