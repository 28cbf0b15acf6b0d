"""The Predict tab of the training lab: guess the loss before the run, see it after."""

from __future__ import annotations

import streamlit as st

from engine.experiments import training
from ui import chart, guess, run, theme
from ui.charts import training as charts
from ui.page import NOTHING_TO_SHOW
from ui.prose import plain
from ui.training import sentences
from ui.training.curves import HEIGHT, STEPS, span
from ui.training.settings import GUESS, PREFIX, RUN, Settings


def predict(given: Settings) -> None:
    """The Predict tab: the guess is made before the run, and lies beside it afterwards."""
    asked = given.params or given.started
    if asked is None:
        st.caption(NOTHING_TO_SHOW)
        return
    st.markdown(
        f"**How far will it get?** Who guesses evenly among all {training.VOCAB_SIZE} tokens pays "
        f"ln {training.VOCAB_SIZE} = {sentences.GUESSING:.2f} nats for each; a model that has learned nothing pays a "
        f"little more, as it guesses unevenly. What will a token of unread text cost after {asked.steps} steps?"
    )
    st.slider(
        "Your guess of the last held-out loss, nats a token",
        0.0,
        6.0,
        4.0,
        0.1,
        key=GUESS,
        on_change=guess.keep,
        args=(GUESS,),
        bind="query-params",
        disabled=run.is_running(RUN),  # what is guessed then would be for no run
    )
    if given.started is None:
        st.caption("Set your guess, then press “Train”.")
        return

    def draw(found: training.Result, params: training.Params) -> None:
        if given.guess is None:
            st.caption("Nothing was guessed before this run. Set your guess for another, then press “Train again”.")
            return
        if found.ended != "running" and (run.is_running(RUN) or run.problem(RUN) is not None):
            st.caption("Your guess waits for the training that it was made for.")
            return
        _verdict(found, given.guess)
        if found.ended != "running" and params != given.params:
            st.caption("The settings have changed since this run: guess again, then press “Train again”.")

    run.watch("training", given.started, draw, key=RUN, height=HEIGHT)


def _verdict(found: training.Result, guessed: float) -> None:
    """The guess beside what was measured or, in a run that is under way, beside where it is."""
    measured = float(found.held_out_loss[-1])
    off = guessed - measured
    words = f"You said {guessed:.1f}, it is {measured:.2f} after step {found.checked[-1]}"
    if found.ended == "running":
        st.info(plain(f"{words} of {found.steps}."), icon=":material/hourglass_top:")
    elif found.ended != "finished":
        st.info(plain(f"{words}. {guess.unjudged(found.ended, found.steps)}"), icon=":material/info:")
    elif abs(off) <= 0.2:
        st.success(plain(f"{words}: well guessed."), icon=":material/check_circle:")
    else:
        side = "learned more" if off > 0 else "learned less"
        st.info(plain(f"{words}: the model {side} than you expected."), icon=":material/lightbulb:")
    fig = charts.curves(
        [charts.Line("held-out loss", found.checked, found.held_out_loss, 1)],
        across="step",
        up="loss, nats a token",
        marks=[(sentences.GUESSING, "guessing"), (guessed, "your guess")],
        span=span(found, STEPS),
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{PREFIX}_guess_chart", sentence=sentences.progress(found), height=HEIGHT)
