"""The controls of the LoRA lab, what the training will cost, and the button that starts it."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from engine.catalogue import SMOLLM2
from engine.experiments import lora
from ui import controls, run
from ui.controls import Look
from ui.labs import LORA
from ui.train_button import train_button
from ui.training.settings import amount

PREFIX = LORA.url_path
RUN = f"{PREFIX}_run"
FULL = "full fine-tuning"
SIZE, FINE_TUNE, INSIDE, SWEEP, ADAPTER = "Size", "Fine-tune", "Inside the update", "Sweep", "Your adapter"
VIEW = f"{PREFIX}_view"
_JOINED = "\u00a0"
_STARTED = f"_{PREFIX}_started"
_OWN = 0.0  # stands for the method's own learning rate: a list that holds None can be emptied
_RATES = (_OWN, 1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        params: the settings now.
        started: those that were last trained with; None before the first run.
    """

    params: lora.Params
    started: lora.Params | None


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
    with st.expander("Your own facts, α, steps, seed", icon=":material/tune:"):
        values |= controls.controls(
            lora.Params,
            prefix=PREFIX,
            fields=["facts", "alpha", "steps", "batch_size", "seed"],
            alpha=Look(minimum=1, maximum=128, step=1),
            steps=Look(minimum=10, maximum=1000, step=10),
        )
    params = controls.validated(lora.Params, values)
    if params is None:
        return None
    _train(params)
    return Settings(params, st.session_state.get(_STARTED))


def _train(params: lora.Params) -> None:
    """What a run costs, and the button that starts it; one that is under way is never thrown away unasked."""
    cost = params.predict()
    st.caption(
        f"Trains {count(cost.trainable)} of {count(cost.parameters)} numbers "
        f"({share(cost.trainable / cost.parameters)}), in about {size(cost.memory_bytes)} of memory."
    )
    if params.model == SMOLLM2:
        st.caption(
            f"On two CPU cores SmolLM2 takes about {smollm2_minutes(params):.0f} minutes, going by an AMD "
            "EPYC with torch 2.13, where it was recorded."
        )
    train_button(params, st.session_state.get(_STARTED), _start, running=run.is_running(RUN), prefix=PREFIX)


def smollm2_minutes(params: lora.Params) -> float:
    """How long SmolLM2 learns on two CPU cores: processor time that was recorded, with both busy three quarters of it.

    2.3 s a step of 16 questions, and 120 s for the rehearsal and the examinations.
    """
    return (120 + 2.3 * params.steps * params.batch_size / 16) / (0.75 * 2 * 60)


def share(part: float) -> str:
    """A share in per cent with two digits, e.g. ``"0.021%"``."""
    return f"{100 * part:.2g}%" if part < 0.995 else "100%"


def count(number: float) -> str:
    """How many, as models are called by their size, on one line: ``"233 k"``, ``"70.6 B"``."""
    return amount(number).strip().replace("G", "B").replace(" ", _JOINED)


def size(number: float) -> str:
    """Bytes with an SI prefix on one line, e.g. ``"934 kB"``."""
    return f"{amount(number)}B".replace(" ", _JOINED)


def _start(params: lora.Params) -> None:
    st.session_state[_STARTED] = params
    if st.session_state.get(VIEW) not in (FINE_TUNE, INSIDE):
        st.session_state[VIEW] = FINE_TUNE
    run.ask("lora", params, key=RUN)
