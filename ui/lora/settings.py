"""The controls of the LoRA lab, what the training will cost, and the button that starts it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import streamlit as st

from engine.catalogue import SMOLLM2
from engine.experiments import lora
from ui import controls, guess, run
from ui.controls import Look
from ui.labs import LORA
from ui.page import PREDICT
from ui.prose import plain
from ui.train_button import train_button
from ui.training.settings import STEPS_HELP, amount

PREFIX = LORA.url_path
RUN = f"{PREFIX}_run"
FULL = "full fine-tuning"
SIZE, FINE_TUNE, INSIDE, SWEEP, ADAPTER = "Size", "Fine-tune", "Inside the update", "Sweep", "Your adapter"
VIEW = f"{PREFIX}_view"
GUESS, SHARE_GUESS = f"{PREFIX}_guess", f"{PREFIX}_share"
_JOINED = "\u00a0"
_STARTED = f"_{PREFIX}_started"
_OWN = 0.0  # stands for the method's own learning rate: a list that holds None can be emptied
_ALPHA_HELP = "The update is A·B times s: s = α / rank or, for rank-stabilized LoRA, α / √rank."
_RATES = (_OWN, 1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        params: the settings now.
        started: those that were last trained with; None before the first run.
        guess: of the answers that will be right, in per cent, if one was made before that run.
    """

    params: lora.Params
    started: lora.Params | None
    guess: int | None


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    values = controls.controls(
        lora.Params,
        prefix=PREFIX,
        fields=["rank", "model", "method", "targets", "learning_rate"],
        method=Look(widget="select"),
        targets=Look(widget="select"),
        learning_rate=Look(
            options=_RATES, name=lambda rate: f"{rate:g}" if rate else "the method's own", widget="select", value=_OWN
        ),
    )
    values["learning_rate"] = values["learning_rate"] or None
    place = st.container()  # what is wrong with the facts is said above them, so that it is seen while they are folded
    with st.expander("Your own facts, α, steps, seed", icon=":material/tune:"):
        values |= controls.controls(lora.Params, prefix=PREFIX, fields=["facts"])
        values |= controls.controls(
            lora.Params,
            prefix=PREFIX,
            fields=["alpha", "steps", "batch_size", "seed"],
            alpha=Look(minimum=1, maximum=128, step=1, help=_ALPHA_HELP),
            steps=Look(minimum=10, maximum=1000, step=10, help=STEPS_HELP),
        )
    with place:
        params = controls.validated(lora.Params, values)
    if params is None:
        return None
    _train(params)
    return Settings(params, st.session_state.get(_STARTED), guess.settled(GUESS))


def _train(params: lora.Params) -> None:
    """What a run costs, and the button that starts it; one that is under way is never thrown away unasked."""
    cost = params.predict()
    if _asks_for_share():
        words = "How many numbers it trains is the question here."
    else:
        part = share(cost.trainable / cost.parameters)
        words = f"Trains {count(cost.trainable)} of {count(cost.parameters)} numbers ({part})."
    own = ", the method's own" if params.learning_rate is None else ""
    words += f" It takes about {size(cost.memory_bytes)} of memory; its learning rate rises to {params.rate:g}{own}."
    st.caption(plain(words))
    if params.model == SMOLLM2:
        st.caption(smollm2_sentence(params))
    train_button(
        params,
        st.session_state.get(_STARTED),
        _start,
        running=run.is_running(RUN),
        waiting=run.is_waiting(RUN),
        prefix=PREFIX,
    )


def _asks_for_share() -> bool:
    """Whether the page asks how many numbers are trained and has no answer yet: then nothing may tell."""
    state = st.session_state
    guessed = state.get(SHARE_GUESS) is not None or SHARE_GUESS in st.query_params
    return state.get(f"{PREFIX}_tab") == PREDICT and not guessed


def smollm2_sentence(params: lora.Params) -> str:
    """How long SmolLM2 learns on two CPU cores, by the time that the invented town took on such a machine.

    2.3 s of processor time a step of 16 questions, and 120 s for the rehearsal and the examinations; both cores were
    busy three quarters of the time.
    """
    if params.facts.strip():
        return "SmolLM2 takes minutes on a CPU, longer with longer facts: it says how long once it has taken a step."
    minutes = (120 + 2.3 * params.steps * params.batch_size / 16) / (0.75 * 2 * 60)
    return f"On two CPU cores SmolLM2 takes about {minutes:.0f} minutes, as it did on an AMD EPYC with torch 2.13."


def share(part: float) -> str:
    """A share in per cent, with two digits or as many as tell it from all, e.g. ``"0.021%"``, ``"99.7%"``."""
    if 0.9995 <= part < 1:
        return "> 99.9%"
    return f"{100 * part:.{3 if part >= 0.99 else 2}g}%"


def probability(loss: float) -> str:
    """What a loss in nats gives the right token, exp(−loss), in per cent; a softmax never gives all, nor nothing."""
    part = math.exp(-loss)
    return "< 0.01%" if part < 1e-4 else share(min(part, 1 - 1e-9))


def count(number: float) -> str:
    """How many, as models are called by their size, on one line: ``"233 k"``, ``"70.6 B"``."""
    return amount(number).strip().replace("G", "B").replace(" ", _JOINED)


def size(number: float) -> str:
    """Bytes with an SI prefix on one line, e.g. ``"934 kB"``."""
    return f"{amount(number)}B".replace(" ", _JOINED)


def _start(params: lora.Params) -> None:
    st.session_state[_STARTED] = params
    guess.settle(GUESS)
    if st.session_state.get(VIEW) not in (FINE_TUNE, INSIDE):
        st.session_state[VIEW] = FINE_TUNE
    run.ask("lora", params, key=RUN)
