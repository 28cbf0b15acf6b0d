"""The controls of the router lab: those of the experiment behind the view that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from engine.experiments import ExperimentParams, router_collapse, router_cost, router_text, router_token
from engine.experiments._router import MAX_TOKENS
from ui import controls, guess, models, page, run
from ui.controls import Look
from ui.kept import Kept
from ui.labs import ROUTER
from ui.train_button import train_button

PREFIX = ROUTER.url_path
VIEW = f"{PREFIX}_view"
WAY, TEXT, COLLAPSE, LEARNED, COST = "One token's way", "A text", "Collapse", "What experts learned", "Cost"
KEPT = Kept(PREFIX)

TRAINED, YOURS = "the model trained here", "your text (untrained router)"
LEARNED_FROM = f"{PREFIX}_learned_from"
"""The key of what the view `LEARNED` looks at."""

COLLAPSE_PREFIX, COST_PREFIX = f"{PREFIX}_collapse", f"{PREFIX}_cost"
WAY_RUN, TEXT_RUN, RUN = f"{PREFIX}_way_run", f"{PREFIX}_text_run", f"{PREFIX}_run"
IDLE_GUESS = f"{PREFIX}_idle_guess"
_STARTED = f"_{PREFIX}_started"
_RATES = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 3e-3, 5e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)
_BIASED = ("softmax", "sigmoid", "noisy")


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Args:
        view: what the Explore tab shows.
        params: of the experiment behind it; of `engine.experiments.router_collapse` in the Predict tab, of
            `engine.experiments.router_text` in the Tests tab.
        started: what was last trained with; None before the first training of the session.
    """

    view: str
    params: Any
    started: router_collapse.Params | None


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    KEPT.begin()
    view = _view()
    model, draw = _CONTROLS[_subject(view)]
    params = controls.validated(model, draw())
    if model is router_collapse.Params:
        _train(params)
    return Settings(view, params, st.session_state.get(_STARTED)) if params else None


def start(params: router_collapse.Params) -> None:
    """Train with `params`, whatever was trained before; a guess that stands now counts for it."""
    st.session_state[_STARTED] = params
    guess.settle(IDLE_GUESS)
    run.ask("router_collapse", params, key=RUN)


def _view() -> str:
    """What is shown: it is drawn after the controls, which depend on it."""
    KEPT.restore(VIEW)
    tab = st.session_state.get(f"{PREFIX}_tab", page.EXPLORE)
    if tab != page.EXPLORE:
        return COLLAPSE if tab == page.PREDICT else TEXT
    view = st.session_state.get(VIEW) or st.query_params.get(VIEW)
    return view if view in _CONTROLS or view == LEARNED else WAY


def _subject(view: str) -> str:
    """The view whose controls are drawn: what experts learned is seen in a training or in a text."""
    if view != LEARNED:
        return view
    KEPT.restore(LEARNED_FROM)
    chosen = st.session_state.get(LEARNED_FROM) or st.query_params.get(LEARNED_FROM)
    return TEXT if chosen == YOURS else COLLAPSE


def _train(params: router_collapse.Params | None) -> None:
    """The button; a training that is under way is never thrown away unasked."""
    train_button(
        params,
        st.session_state.get(_STARTED),
        start,
        running=run.is_running(RUN),
        waiting=run.is_waiting(RUN),
        prefix=PREFIX,
    )


def _controls(model: type[ExperimentParams], prefix: str, fields: Sequence[str], **looks: Look) -> dict[str, Any]:
    return KEPT.controls(model, prefix=prefix, fields=fields, **looks)


def _of_way() -> dict[str, Any]:
    model = router_token.Params
    known = run.latest(WAY_RUN)
    last = (len(known.tokens) if known else MAX_TOKENS) - 1
    # Not a slider: a new end makes it another widget, which forgets the move with which the end was learned.
    values = _controls(model, PREFIX, ["position"], position=Look(maximum=last, widget="number"))
    return values | _of_router(model) | _of_reading(model, known)


def _of_text() -> dict[str, Any]:
    model = router_text.Params
    return _of_router(model) | _of_reading(model, run.latest(TEXT_RUN))


def _with_top_k(model: type[ExperimentParams], prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, in which the number of experts is, with that of a token; of one expert there is nothing to choose."""
    if values["experts"] == 1:
        return values | {"top_k": 1}
    return values | _controls(model, prefix, ["top_k"], top_k=Look(maximum=values["experts"]))


def _of_router(model: type[ExperimentParams]) -> dict[str, Any]:
    """How the router decides: the same in both views of a text."""
    values = _with_top_k(model, PREFIX, _controls(model, PREFIX, ["experts"]))
    values |= _controls(model, PREFIX, ["kind", "capacity_factor"], kind=Look(widget="select"))
    if values["kind"] == "noisy":
        values |= _controls(model, PREFIX, ["noise"])
    if values["kind"] in _BIASED:
        values |= _controls(
            model, PREFIX, ["tilt", "tilted"], tilted=Look(maximum=values["experts"] - 1, widget="number")
        )
    return values


def _of_reading(model: type[ExperimentParams], known: Any) -> dict[str, Any]:
    """What is routed: the text as a layer of a model receives it."""
    values = _controls(model, PREFIX, ["router"])
    with st.expander("Text, model, layer, seed", icon=":material/tune:"):
        values |= _controls(model, PREFIX, ["text"])
        values |= models.pick(model, prefix=PREFIX)
        deepest = known.num_layers - 1 if known is not None and known.model == values["model"] else None
        values |= _controls(model, PREFIX, ["layer", "seed"], layer=Look(maximum=deepest, widget="number"))
    return values


def _of_training() -> dict[str, Any]:
    model = router_collapse.Params
    values = _controls(model, COLLAPSE_PREFIX, ["balancing"], balancing=Look(widget="select"))
    if values["balancing"] == "auxiliary loss":
        values |= _controls(model, COLLAPSE_PREFIX, ["aux_weight"], aux_weight=Look(widget="number"))
    if values["balancing"] == "loss-free bias":
        values |= _controls(model, COLLAPSE_PREFIX, ["bias_rate"], bias_rate=Look(widget="number"))
    values |= _with_top_k(model, COLLAPSE_PREFIX, _controls(model, COLLAPSE_PREFIX, ["experts"]))
    values |= _controls(model, COLLAPSE_PREFIX, ["steps"], steps=Look(minimum=10, step=10))
    with st.expander("Frozen router, learning rate, seed", icon=":material/tune:"):
        values |= _controls(
            model,
            COLLAPSE_PREFIX,
            ["freeze_router", "learning_rate", "seed"],
            learning_rate=Look(options=_RATES, name=lambda rate: f"{rate:g}", widget="select"),
        )
    return values


def _of_cost() -> dict[str, Any]:
    model = router_cost.Params
    values = _controls(
        model,
        COST_PREFIX,
        ["tokens", "experts"],
        tokens=Look(options=_doubling(16, 65_536), name=_thousands, widget="select"),
        experts=Look(options=_doubling(1, 64), widget="select"),
    )
    values = _with_top_k(model, COST_PREFIX, values)
    values |= _controls(
        model,
        COST_PREFIX,
        ["most_experts", "direction"],
        most_experts=Look(
            options=[count for count in _doubling(1, 128) if count >= values["experts"]], widget="select"
        ),
        direction=Look(widget="select"),
    )
    with st.expander("Widths, number format, runs", icon=":material/tune:"):
        values |= _controls(
            model,
            COST_PREFIX,
            ["d_model", "ffn_dim", "dtype", "runs", "seed"],
            d_model=Look(options=_doubling(32, 4096), widget="select"),
            ffn_dim=Look(options=_doubling(32, 8192), widget="select"),
            dtype=Look(widget="select"),
        )
    return values


def _doubling(first: int, last: int) -> list[int]:
    """`first`, twice that, … up to `last`."""
    return [first << step for step in range((last // first).bit_length())]


def _thousands(number: int) -> str:
    return f"{number:,}"


_CONTROLS = {
    WAY: (router_token.Params, _of_way),
    TEXT: (router_text.Params, _of_text),
    COLLAPSE: (router_collapse.Params, _of_training),
    COST: (router_cost.Params, _of_cost),
}
