"""The controls of the MoE-LoRA lab, what the training will cost, and the button that starts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from engine.catalogue import SMOLLM2
from engine.experiments import moe_lora, moe_lora_split
from engine.experiments._moe_lora import ROLES
from ui import controls, guess, page, run
from ui.controls import Look
from ui.kept import Kept
from ui.labs import MOE_LORA
from ui.lora.settings import count, size
from ui.prose import plain
from ui.train_button import train_button

PREFIX = MOE_LORA.url_path
SPLIT_PREFIX = f"{PREFIX}_split"
RUN = f"{PREFIX}_run"
VIEW = f"{PREFIX}_view"
TRAINING, EXPERTS, SPLIT, SPEED = "Training", "Experts", "Two inputs", "Speed"
VIEWS = (TRAINING, EXPERTS, SPLIT, SPEED)
WINNER, TOP_SHARE = f"{PREFIX}_winner", f"{PREFIX}_top_share"
KEPT = Kept(PREFIX)
_STARTED = f"_{PREFIX}_started"
_OWN = 0.0  # stands for each run's own learning rate: a list that holds None can be emptied
_RATES = (_OWN, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 8e-3, 1e-2, 2e-2, 0.1, 1.0)
_BIAS_RATES = (0.0, 0.001, 0.005, 0.02, 0.1, 0.5)


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        view: what the Explore tab shows.
        params: of the experiment behind it; of `engine.experiments.moe_lora` in the other tabs.
        started: those that the mixture was last trained with; None before the first run.
    """

    view: str
    params: Any
    started: moe_lora.Params | None


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    KEPT.begin()
    view = _view()
    params = _of_split() if view == SPLIT else _of_training()
    return Settings(view, params, st.session_state.get(_STARTED)) if params else None


def _view() -> str:
    """What is shown: it is drawn after the controls, which depend on it."""
    KEPT.restore(VIEW)
    if st.session_state.get(f"{PREFIX}_tab", page.EXPLORE) != page.EXPLORE:
        return TRAINING
    view = st.session_state.get(VIEW) or st.query_params.get(VIEW)
    return view if view in VIEWS else TRAINING


def _of_split() -> moe_lora_split.Params | None:
    values = KEPT.controls(
        moe_lora_split.Params,
        prefix=SPLIT_PREFIX,
        fields=["bias_rate", "similarity", "kind", "seed", "others", "rounds", "learning_rate"],
        bias_rate=Look(options=_BIAS_RATES, name=_plainly, widget="select"),
        rounds=Look(minimum=10, step=10),
        learning_rate=Look(options=(0.001, 0.003, 0.01, 0.03, 0.1), name=_plainly, widget="select"),
    )
    return controls.validated(moe_lora_split.Params, values)


def _of_training() -> moe_lora.Params | None:
    values = _controls("experts", "rank", "top_k", "kind", kind=Look(widget="select"))
    place = st.container()
    with st.expander("Model, bias, steps, seed", icon=":material/tune:"):
        values |= _controls(
            "model",
            "targets",
            "bias_rate",
            "shared_a",
            "learning_rate",
            "steps",
            "batch_size",
            "seed",
            notes=place,
            targets=Look(widget="select"),
            bias_rate=Look(options=_BIAS_RATES, name=_plainly, widget="select"),
            learning_rate=Look(
                options=_RATES, name=lambda rate: f"{rate:g}" if rate else "each run's own", widget="select", value=_OWN
            ),
            steps=Look(minimum=10, maximum=400, step=10),
        )
    values["learning_rate"] = values["learning_rate"] or None
    with place:
        params = controls.validated(moe_lora.Params, values)
        if params is not None:
            _train(params)
    return params


def _controls(*fields: str, notes: DeltaGenerator | None = None, **looks: Look) -> dict[str, Any]:
    return KEPT.controls(moe_lora.Params, prefix=PREFIX, fields=fields, notes=notes, **looks)


def _plainly(number: float) -> str:
    return f"{number:g}"


def _train(params: moe_lora.Params) -> None:
    """What the runs cost, and the button that starts them; what is under way is never thrown away unasked."""
    st.caption(plain(cost_sentence(params)))
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


def cost_sentence(params: moe_lora.Params) -> str:
    """What is trained, one run after the other."""
    mixture, alike, thrifty = (params.size(role) for role in ROLES)
    return (
        f"Three runs of {params.steps} steps: the mixture trains {count(mixture.trainable)} numbers and adds "
        f"{count(mixture.flops)} FLOPs a token; one LoRA of rank {alike.rank} has about as many numbers, one of rank "
        f"{thrifty.rank} about as many FLOPs. They take about {size(params.memory_bytes())} of memory."
    )


def smollm2_sentence(params: moe_lora.Params) -> str:
    """How long SmolLM2 learns on two CPU cores, by the time that it took on such a machine.

    19 s of processor time a step of 16 questions, all three runs together, and 320 s for checkups and what is done
    with the experts; both cores are taken to be busy three quarters of the time.
    """
    minutes = (320 + 19 * params.steps * params.batch_size / 16) / (0.75 * 2 * 60)
    return f"On two CPU cores SmolLM2 takes about {minutes:.0f} minutes, judged by a step on an AMD EPYC, torch 2.13."


def _start(params: moe_lora.Params) -> None:
    st.session_state[_STARTED] = params
    for key in (WINNER, TOP_SHARE):
        guess.settle(key)
    run.ask("moe_lora", params, key=RUN)
