"""The Predict tab of the router lab: say what a bias does to a gate, and how many experts a training starves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st

from engine.experiments import router_collapse, router_token
from engine.experiments.router_collapse import IDLE
from ui import chart, guess, run, theme
from ui.charts import router as router_charts
from ui.charts import router_training as charts
from ui.charts.router import Panel
from ui.prose import plain
from ui.router.settings import IDLE_GUESS, PREFIX, RUN, Settings
from ui.router.tokens import around

_PLAIN_RUN, _BIASED_RUN = f"{PREFIX}_guess_plain", f"{PREFIX}_guess_biased"
_TURN, _ANSWER = f"_{PREFIX}_turn", f"{PREFIX}_gate_guess"
_BIAS = 5.0
_TOKENS = (3, 27, 79, 150)
NOT_CHOSEN, SMALLER, EQUAL, LARGER = "it is not chosen", "the smaller gate", "equal gates", "the larger gate"
_HEIGHT = 400


def predict(given: Settings) -> None:
    """Two guesses: a gate at once, and the end of a training."""
    _guess_gate()
    st.divider()
    _guess_idle(given)


def _guess_gate() -> None:
    """A large bias on the expert that a token likes least: it is chosen, but what counts is its own probability."""
    turn = st.session_state.get(_TURN, 0)
    plain_params = router_token.Params(position=_TOKENS[turn % len(_TOKENS)])
    found: router_token.Result | None = run.run("router_token", plain_params, key=_PLAIN_RUN)
    if found is None or run.params_of(_PLAIN_RUN) != plain_params:
        return
    scores = next(step.values for step in found.stages if step.name == "scores")
    least = int(scores.argmin())
    st.markdown("**What does the selection bias do to a gate?**")
    st.markdown(around(found.tokens, found.position, 6))
    st.markdown(
        plain(
            f"{found.token} goes to two of eight experts. Expert {least} is its last choice, with probability "
            f"{scores[least]:.1%}. Now a bias of +{_BIAS:g} is added to this expert's logit for the choice, as "
            "loss-free balancing does with an idle expert. Which gate does it get?"
        )
    )
    answer = st.segmented_control(
        "Your guess", (NOT_CHOSEN, SMALLER, EQUAL, LARGER), key=f"{_ANSWER}{turn}", label_visibility="collapsed"
    )
    if answer is None:
        return
    biased_params = plain_params.model_copy(update={"tilted": least, "tilt": _BIAS})
    biased: router_token.Result | None = run.run("router_token", biased_params, key=_BIASED_RUN)
    if biased is None or run.params_of(_BIASED_RUN) != biased_params:
        return
    verdict = judge_gate(biased, least)
    if answer == verdict.truth:
        st.success(plain(f"Right: {verdict.words}"), icon=":material/check_circle:")
    else:
        st.info(plain(f"Not quite, you said “{answer}”: {verdict.words}"), icon=":material/lightbulb:")
    shown = [step for step in biased.stages if step.name in ("scores", "bias", "gates")]
    fig = router_charts.way(
        [Panel(step.title, step.formula, step.values, step.note) for step in shown], biased.chosen, mode=theme.mode()
    )
    chart.figure(fig, key=f"{PREFIX}_gate_chart", sentence=biased.sentence)
    st.button("Another token", key=f"_{PREFIX}_next", icon=":material/casino:", on_click=_next_turn, args=(turn,))


@dataclass(frozen=True)
class Verdict:
    """What became of the biased expert.

    Args:
        truth: the right one of the answers.
        words: why.
    """

    truth: str
    words: str


def judge_gate(found: router_token.Result, expert: int) -> Verdict:
    """Which gate the biased `expert` got among the chosen of `found`."""
    if expert not in found.chosen:
        return Verdict(NOT_CHOSEN, f"even so expert {expert} is not among the highest.")
    gates = dict(zip(found.chosen, found.gates, strict=True))
    gate = gates.pop(expert)
    other = max(gates.values(), default=gate)
    truth = EQUAL if np.isclose(gate, other, atol=0.005) else SMALLER if gate < other else LARGER
    return Verdict(
        truth,
        f"expert {expert} is chosen, and its gate is {gate:.3f} beside {other:.3f}. The bias counts for the choice "
        "alone; the gate is made of the probabilities, which do not see it.",
    )


def _next_turn(turn: int) -> None:
    st.session_state[_TURN] = turn + 1


def _guess_idle(given: Settings) -> None:
    asked: router_collapse.Params = given.params
    if asked.experts == 1:
        st.caption("With one expert there is nothing to guess about a training: choose more of them.")
        return
    how = {"none": "nothing to balance them"}.get(asked.balancing, f"the {asked.balancing}")
    st.markdown("**How many experts go short?**")
    st.markdown(
        plain(
            f"{asked.experts} experts, {asked.top_k} for each token, with {how}. After {asked.steps} steps of "
            "training, how many of them get less than a tenth of a fair share of the held-out tokens, or none at all?"
        )
    )
    st.slider(
        "Your guess, experts",
        0,
        asked.experts,
        min(2, asked.experts),
        key=IDLE_GUESS,
        on_change=guess.keep,
        args=(IDLE_GUESS,),
        bind="query-params",
        disabled=run.is_running(RUN),  # what is guessed then would be for no run
    )
    if given.started is None:
        st.caption("Set your guess, then press “Train”.")
        return
    guessed = guess.settled(IDLE_GUESS)

    def draw(found: router_collapse.Result, params: router_collapse.Params) -> None:
        if guessed is None:
            st.caption("Nothing was guessed before this run. Set your guess for another, then press “Train again”.")
            return
        if found.ended != "running" and (run.is_running(RUN) or run.problem(RUN) is not None):
            st.caption("Your guess waits for the training that it was made for.")
            return
        _verdict(found, guessed)
        if found.ended != "running" and params != asked:
            st.caption("The settings have changed since this run: guess again, then press “Train again”.")

    run.watch("router_collapse", given.started, draw, key=RUN, height=_HEIGHT)


def idle_experts(found: router_collapse.Result) -> int:
    """Experts with less than `IDLE` of a fair share at the last checkup, the dead among them; all where no token is."""
    return int((~(found.relative[-1] >= IDLE)).sum())


def _verdict(found: router_collapse.Result, guessed: int) -> None:
    idle = idle_experts(found)
    words = f"You said {guessed}, it is {idle} of {found.experts} after step {found.checked[-1]}"
    if found.ended == "running":
        st.info(plain(f"{words} of {found.steps}."), icon=":material/hourglass_top:")
    elif found.ended != "finished":
        st.info(plain(f"{words}. {guess.unjudged(found.ended, found.steps)}"), icon=":material/info:")
    elif guessed == idle:
        st.success(plain(f"{words}: right."), icon=":material/check_circle:")
    elif abs(guessed - idle) == 1:
        st.success(plain(f"{words}: wrong by one, which is close."), icon=":material/check_circle:")
    else:
        side = "evener" if guessed > idle else "more lopsided"
        st.info(plain(f"{words}: wrong, the load is {side} than you expected."), icon=":material/lightbulb:")
    fig = charts.load_map(found.checked, found.relative, found.steps, mode=theme.mode())
    chart.figure(fig, key=f"{PREFIX}_guess_chart", sentence=f"{found.sentence} {found.course}", height=_HEIGHT)
