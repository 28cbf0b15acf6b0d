"""The Predict tab of the whole model's lab: say which switch saves most memory and which slows most, then see."""

from __future__ import annotations

import operator
import statistics

import streamlit as st

from engine.experiments import full_model_switches
from engine.experiments._full_model import SWITCHES
from engine.experiments.full_model_step import Step
from ui import guess, run
from ui.full_model import measuring
from ui.full_model.sentences import memory_effect, named, speed_effect
from ui.full_model.settings import SAVES, SLOWS, Settings
from ui.prose import plain

NONE = "none of them"
_OPTIONS = (*SWITCHES.values(), NONE)


def predict(given: Settings) -> None:
    """Two guesses that a measurement answers; what was not guessed before it began is not told here."""
    running = run.is_running(measuring.ALL)
    on = [name for name in SWITCHES if getattr(given.params, name)]
    st.markdown(plain(f"Your settings have {named(on)}. Each switch alone is turned on and off, the others as set."))
    questions = {
        SAVES: "**Which switch saves most memory of a training step?**",
        SLOWS: "**Which switch slows a step most?**",
    }
    guesses = []
    for key, question in questions.items():
        st.markdown(question)
        guessed = st.segmented_control(
            question,
            _OPTIONS,
            key=key,
            on_change=guess.keep,
            args=(key,),
            wrap=True,
            bind="query-params",
            disabled=running,  # what is guessed then would be for no measurement
            label_visibility="collapsed",
        )
        guesses.append(guessed)
    started = measuring.started()
    st.button(
        "Measuring…" if running else "Measure" if started is None else "Measure again",
        key="_full_model_guess_start",
        type="primary",
        icon=":material/hourglass_top:" if running else ":material/speed:",
        disabled=running or None in guesses,
        on_click=measuring.measure_switches,
        args=(given.params,),
    )
    if started is None:
        st.caption("Make both guesses, then press “Measure”: a step of each combination is timed and weighed.")
        return
    measuring.follow(_judge)
    if measuring.settings_of(started) != measuring.settings_of(given.params):
        st.caption("The settings have changed since this measurement: guess again, then press “Measure again”.")


def _judge(found: full_model_switches.Result, _: full_model_switches.Params) -> None:
    saves, slows = guess.settled(SAVES), guess.settled(SLOWS)
    if saves is None and slows is None:
        st.caption("Nothing was guessed before this measurement. Make your guesses for another, then measure again.")
        return
    if run.is_running(measuring.ALL):
        st.info("The answers come when all was measured.", icon=":material/hourglass_top:")
        return
    if not found.is_complete:
        st.info("It was stopped before it was done: your guesses are neither right nor wrong.")
        return
    pairs = {name: found.worth(name) for name in SWITCHES}
    if saves is not None:
        _say(*memory_answer(pairs, saves))
    if slows is not None:
        _say(*speed_answer(pairs, slows))


def memory_answer(pairs: dict[str, tuple[Step, Step]], guessed: str) -> tuple[bool, str]:
    """Whether no switch saves more than the one that was guessed, and the answer in words.

    Args:
        pairs: with each switch on and with it off, as measured.
        guessed: its name for people, or `NONE`.
    """
    saved = {name: off.peak_bytes - on.peak_bytes for name, (on, off) in pairs.items()}
    most = max(saved, key=saved.__getitem__)
    best = SWITCHES[most] if saved[most] > 0 else NONE
    effects = ", ".join(f"{SWITCHES[name]} {memory_effect(saved[name])}" for name in SWITCHES)
    words = f"You said {guessed}. Measured: {effects}"
    return guessed == best, f"{words}. {'Right.' if guessed == best else f'It is {best}.'}"


def speed_answer(pairs: dict[str, tuple[Step, Step]], guessed: str) -> tuple[bool | None, str]:
    """Whether the switch that was guessed slows a step most, and the answer in words.

    A switch slows more than another, or than none, if it does in every turn; where that is so of no switch, the
    measurement cannot tell, and the guess is neither right nor wrong: None.
    """
    slower = {
        SWITCHES[name]: [mine / theirs for mine, theirs in zip(on.rounds, off.rounds, strict=True)]
        for name, (on, off) in pairs.items()
    }
    slower[NONE] = [1.0] * len(next(iter(slower.values())))
    first = max(slower, key=lambda name: statistics.median(slower[name]))
    close = [name for name, turns in slower.items() if name != first and any(map(operator.ge, turns, slower[first]))]
    effects = "; ".join(f"{SWITCHES[name]} {speed_effect(*pair)}" for name, pair in pairs.items())
    words = f"You said {guessed}. Measured: {effects}"
    if close:
        either = f"{', '.join([first, *close[:-1]])} or {close[-1]}"
        return None, (
            f"{words}. This measurement cannot tell whether it is {either}: your guess is neither right nor wrong."
        )
    return guessed == first, f"{words}. {'Right.' if guessed == first else f'It is {first}.'}"


def _say(right: bool | None, words: str) -> None:
    if right:
        st.success(plain(words), icon=":material/check_circle:")
    else:
        st.info(plain(words), icon=":material/help:" if right is None else ":material/lightbulb:")
