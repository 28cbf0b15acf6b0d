"""The Predict tab of the MoE-LoRA lab: say who wins and how far routing follows the tasks, then see."""

from __future__ import annotations

import streamlit as st

from engine.experiments import moe_lora
from engine.experiments._moe_lora import ROLES
from ui import chart, guess, run, theme
from ui.charts.training import Line, curves
from ui.moe_lora.settings import PREFIX, RUN, TOP_SHARE, WINNER, Settings
from ui.moe_lora.training import RIGHT, runs_sentence, span
from ui.moe_lora.verdict import asked, right_answers
from ui.prose import plain

_HEIGHT = 340
_CLOSE = 10  # percentage points


def predict(given: Settings) -> None:
    """Two guesses that a run answers; what was not guessed before it began is not told here."""
    running = run.is_running(RUN)
    st.markdown(
        "**Who answers most?** One model learns four tasks, three times: with a mixture of adapters and a router, with "
        "one LoRA that has as many numbers, and with one that takes as many FLOPs a token. Which gets most of the "
        "questions right that are never trained on?"
    )
    st.segmented_control(
        "Your guess, who answers most",
        ROLES,
        key=WINNER,
        on_change=guess.keep,
        args=(WINNER,),
        wrap=True,
        bind="query-params",
        disabled=running,  # what is guessed then would be for no run
        label_visibility="collapsed",
    )
    st.markdown(
        "**Does a task get an expert of its own?** Of what a task's tokens choose, what share goes to the expert that "
        f"it uses most, on average over tasks and projections? Spread evenly over {_experts(given.params)} it would be "
        f"{100 / given.params.experts:.0f}%, with {_own(given.params)} {100 / given.params.top_k:.0f}%."
    )
    st.slider(
        "Your guess, share of the most used expert",
        0,
        100,
        50,
        5,
        format="%d%%",
        key=TOP_SHARE,
        on_change=guess.keep,
        args=(TOP_SHARE,),
        bind="query-params",
        disabled=running,
    )
    if given.started is None:
        st.caption("Make your guesses, then press “Train”.")
        return
    run.watch("moe_lora", given.started, lambda found, params: _judge(found, params, given), key=RUN, height=_HEIGHT)


def _judge(found: moe_lora.Result, params: moe_lora.Params, given: Settings) -> None:
    winner, share = guess.settled(WINNER), guess.settled(TOP_SHARE)
    if winner is None and share is None:
        st.caption("Nothing was guessed before this run. Make your guesses for another, then press “Train again”.")
        return
    if found.ended == "running":
        st.info("The answers come when all three runs are done.", icon=":material/hourglass_top:")
        return
    if run.is_running(RUN) or run.problem(RUN) is not None:
        st.caption("Your guesses wait for the training that they were made for.")
        return
    if found.ended != "finished":
        st.info(plain(guess.unjudged(found.ended, found.steps)), icon=":material/info:")
        return
    if winner is None:
        st.caption("You did not guess who answers most, so that it is not told here.")
    else:
        _say(*winner_sentence(found, winner))
    if share is not None:
        _say(*share_sentence(found, share))
    if winner is not None:
        lines = [Line(leg.role, leg.checked, leg.mean_accuracy, colour) for colour, leg in enumerate(found.runs)]
        fig = curves(lines, across="step", up="answers right", share=True, span=span(found), mode=theme.mode())
        chart.figure(fig, key=f"{PREFIX}_guess_chart", sentence=runs_sentence(found, RIGHT), height=_HEIGHT)
    if params != given.params:
        st.caption("The settings have changed since this run: guess again, then press “Train again”.")


def _experts(params: moe_lora.Params) -> str:
    return "one expert" if params.experts == 1 else f"{params.experts} experts"


def _own(params: moe_lora.Params) -> str:
    """What a task would have that used nothing else."""
    return "an expert of its own" if params.top_k == 1 else f"{params.top_k} experts of its own"


def _say(right: bool, words: str) -> None:
    if right:
        st.success(plain(words), icon=":material/check_circle:")
    else:
        st.info(plain(words), icon=":material/lightbulb:")


def winner_sentence(found: moe_lora.Result, guessed: str) -> tuple[bool, str]:
    """Whether nobody answered more than who was guessed, and the answer in words."""
    right = {leg.role: right_answers(leg) for leg in found.runs}
    most = max(right.values())
    best = [role for role, count in right.items() if count == most]
    numbers = ", ".join(f"{role} {count}" for role, count in right.items())
    words = f"You said {guessed}. Right answers to {asked()} questions after {found.steps} steps: {numbers}"
    if guessed in best:
        return True, f"{words}. {'Nobody answers more.' if len(best) == 1 else 'It shares the first place.'}"
    return False, f"{words}: {' and '.join(best)} answer{'s' if len(best) == 1 else ''} most."


def top_share(found: moe_lora.Result) -> float:
    """The share of a task's tokens that its most used expert gets, the mean over tasks and projections."""
    return float(found.routing[-1].max(-1).mean())


def share_sentence(found: moe_lora.Result, guessed: int) -> tuple[bool, str]:
    """Whether the guess is close, and the answer in words."""
    measured, before = 100 * top_share(found), 100 * float(found.routing[0].max(-1).mean())
    words = (
        f"You said {guessed}%, the most used expert gets {measured:.0f}% of what a task's tokens choose, {before:.0f}% "
        "before the first step, when words that recur in a task already bring their expert with them"
    )
    if abs(guessed - measured) <= _CLOSE:
        return True, f"{words}: well guessed."
    side = "more" if measured > guessed else "less"
    return False, f"{words}: routing follows the tasks {side} than you expected."
