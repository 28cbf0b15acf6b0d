"""What was measured of the whole model in this session, by the settings that it was measured with."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from engine.experiments import full_model_step, full_model_switches
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments.full_model_step import Step
from ui import guess, run
from ui.full_model.settings import GUESSES, PREFIX

ONE, ALL = f"{PREFIX}_step", f"{PREFIX}_switches"
_STEPS = f"_{PREFIX}_steps"
_STARTED = f"_{PREFIX}_switches_params"
_COLLECTED = f"_{PREFIX}_switches_result"
_MOST = 100


def settings_of(params: SwitchParams, **switches: bool) -> SwitchParams:
    """Switches and sizes alone, for comparing what was measured by several experiments."""
    return SwitchParams(**{name: getattr(params, name) for name in SwitchParams.model_fields} | switches)


def known(params: SwitchParams, **switches: bool) -> Step | None:
    """What was measured with these settings, but for `switches`; None if nothing was."""
    return st.session_state.get(_STEPS, {}).get(settings_of(params, **switches))


def measured(params: SwitchParams) -> Step | None:
    """The step of these settings: as it is known, or measured now."""
    if (step := known(params)) is not None:
        return step
    asked = full_model_step.Params(**settings_of(params).model_dump())
    found = run.run("full_model_step", asked, key=ONE)
    if found is not None:
        _remember(params, found)
        run.forget(ONE)  # else it would be told to be on the page while the next one is under way
    return found


def measure_again(params: SwitchParams) -> None:
    """Forget what is known of these settings: `measured` measures them anew."""
    st.session_state.get(_STEPS, {}).pop(settings_of(params), None)
    run.ask_again(ONE)


def measure_switches(params: SwitchParams) -> None:
    """Have every switch flipped alone and measured; guesses that were made until now count."""
    asked = full_model_switches.Params(**settings_of(params).model_dump())
    st.session_state[_STARTED] = asked
    for key in GUESSES:
        guess.settle(key)
    run.ask("full_model_switches", asked, key=ALL)


def started() -> full_model_switches.Params | None:
    """The settings that all switches were last measured with; None before the first time."""
    return st.session_state.get(_STARTED)


def follow(draw: Callable[[full_model_switches.Result, full_model_switches.Params], None] | None = None) -> None:
    """Progress of measuring all switches, if that is under way; what has come of it is remembered, and drawn."""
    params = started()
    if params is None:
        return

    def show(found: full_model_switches.Result, asked: full_model_switches.Params) -> None:
        _collect(found, asked)
        if draw is not None:
            draw(found, asked)

    run.watch("full_model_switches", params, show, key=ALL, height=1)


def _collect(found: full_model_switches.Result, params: full_model_switches.Params) -> None:
    """Remember each step, once: what was measured again since is newer."""
    if not found.is_complete or st.session_state.get(_COLLECTED) is found:
        return
    st.session_state[_COLLECTED] = found
    _remember(params, found.chosen)
    _remember(params, found.off, **dict.fromkeys(SWITCHES, False))
    for name, step in found.flipped.items():
        _remember(params, step, **{name: not getattr(params, name)})


def _remember(params: SwitchParams, step: Step, **switches: bool) -> None:
    steps = st.session_state.setdefault(_STEPS, {})
    steps.pop(settings_of(params, **switches), None)
    steps[settings_of(params, **switches)] = step
    while len(steps) > _MOST:
        steps.pop(next(iter(steps)))


def flips(params: SwitchParams) -> dict[str, dict[str, bool]]:
    """For each switch what turns it the other way."""
    return {name: {name: not getattr(params, name)} for name in SWITCHES}
