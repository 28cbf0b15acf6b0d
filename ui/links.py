"""What a link sets and a choice on the page cannot be: said in a sentence, as for the numbers of `ui.controls`.

Streamlit drops such a value from the address without a word. The sentence stands until the learner chooses something
else, or leaves the view that has the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.scriptrunner import get_script_run_ctx

from ui.prose import plain

_QUOTED = 40
_LISTED = 12


def one_of(names: Sequence[str]) -> str:
    """``"one of …"``; of very many the first and the last."""
    if len(names) > _LISTED:
        return f"one of {len(names)} choices, {names[0]}, {names[1]} … {names[-1]}"
    return "one of " + ", ".join(names)


def ignored(what: str, given: str, allowed: str, *used: str) -> None:
    """Say that a link's value is not taken, what may be given, and what is used instead, which may be nothing."""
    shown = given if len(given) <= _QUOTED else given[:_QUOTED] + "…"
    match used:
        case ():
            instead = "Nothing is chosen."
        case (one,):
            instead = f"{one} is used instead."
        case several:
            instead = f"{several[0]} and {len(several) - 1} more are used instead."
    st.warning(
        plain(f"The link sets {what} to “{shown}”, but it must be {allowed}. {instead}"), icon=":material/link_off:"
    )


@contextmanager
def noting(place: DeltaGenerator, *, memory: str, prefix: str) -> Iterator[None]:
    """Say in `place` which values of the link the choices drawn meanwhile cannot be.

    Args:
        place: above what is drawn.
        memory: key of the session's state for what was said.
        prefix: the lab's; ``f"{prefix}_view"`` is called “the view”.
    """
    linked = {key: st.query_params.get_all(key) for key in st.query_params if key not in st.session_state}
    try:
        yield
    finally:  # a tab may ask to be drawn again before it ends
        said = st.session_state.setdefault(memory, {})
        drawn = {key: choice for key in {*said, *linked} if (choice := _drawn(key)) is not None}
        for key, choice in drawn.items():
            wrong = [value for value in linked.get(key, ()) if value not in choice.allowed]
            if wrong and f"_{key}_ignored" not in st.session_state:  # where it is in there, `ui.controls` says it
                said[key] = (wrong[0], choice.value)
        for key in [*said]:
            if key not in drawn or drawn[key].value != said[key][1]:
                del said[key]
        with place:
            for key, (given, _) in said.items():
                ignored(_name(key, prefix), given, one_of(drawn[key].options), *drawn[key].value)


@dataclass(frozen=True)
class _Choice:
    """A choice that this run has drawn.

    Args:
        options: as the address has them.
        allowed: the same, and the empty word where nothing may be chosen.
        value: those that are chosen.
    """

    options: list[str]
    allowed: list[str]
    value: list[str]


def _drawn(key: str) -> _Choice | None:
    """The choice bound to the URL parameter `key`, if this run has drawn one.

    Streamlit has no public way to ask for it, and looking here leaves the labs free to draw their choices as they like.
    A slider over options is left out: what draws it says what it ignores.
    """
    context = get_script_run_ctx()
    with context.session_state.query_params() as params:
        binding = params.get_binding_for_param(key)
    if binding is None or binding.widget_id not in context.shared.widget_ids_this_run:
        return None
    about = context.session_state._state._new_widget_state.widget_metadata[binding.widget_id]
    if about.formatted_options is None or about.allow_url_duplicates:
        return None
    value = about.serializer(st.session_state[key])
    return _Choice(
        options=list(about.formatted_options),
        allowed=[*about.formatted_options, *([""] if about.clearable else [])],
        value=[value] if isinstance(value, str) else list(value or ()),
    )


def _name(key: str, prefix: str) -> str:
    """What a parameter is called: the view and the tab by these words, any other as it stands in the address."""
    name = key.removeprefix(f"{prefix}_")
    return f"the {name}" if name in ("view", "tab") else key
