"""Pin run A, go on with B, and see both: what is pinned is in the URL, so that a link reopens the pair."""

from __future__ import annotations

import json
from typing import TypeVar

import streamlit as st
from pydantic import ValidationError

from engine.experiments import ExperimentParams, sentence
from ui.prose import plain

MAX_LENGTH = 50_000  # characters of a pinned run in the URL: the longest text that a lab takes, with its quotes escaped

Params = TypeVar("Params", bound=ExperimentParams)


def pin(params: Params, *, prefix: str) -> Params | None:
    """Draw the button that pins `params` as A (or unpins it), and return what is pinned.

    Args:
        params: the settings on the page, B.
        prefix: the lab's; the URL parameter is ``f"{prefix}_pin"`` and holds, as compact JSON, the fields of A that
            differ from their defaults.

    Returns:
        A's parameters, or None if nothing is pinned. Their result comes from `ui.run.run` with a key of its own.
    """
    name = f"{prefix}_pin"
    pinned = _read(type(params), name)
    with st.container(horizontal=True, vertical_alignment="center"):
        if pinned is None:
            st.button(
                "Pin as A",
                key=f"_{name}_set",
                icon=":material/push_pin:",
                help="Keep this run, change a setting, and see both.",
                on_click=_write,
                args=(name, params),
            )
        else:
            st.button("Unpin A", key=f"_{name}_clear", icon=":material/keep_off:", on_click=_clear, args=(name,))
            st.caption(plain(difference(pinned, params)))
    return pinned


def difference(pinned: ExperimentParams, current: ExperimentParams) -> str:
    """In what A and B differ, e.g. ``"A: temperature 1.0, B: temperature 0.5"``."""
    a, b = pinned.model_dump(), current.model_dump()
    changed = [name for name in a if a[name] != b[name]]
    if not changed:
        return "A and B are the same; change a setting to compare."
    sides = (
        f"{side}: " + ", ".join(f"{name.replace('_', ' ')} {_in_words(values[name])}" for name in changed)
        for side, values in (("A", a), ("B", b))
    )
    return " · ".join(sides)


def _in_words(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _read(model: type[Params], name: str) -> Params | None:
    text = st.query_params.get(name)
    if text is None:
        return None
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError("a link of ours is never that long")
        return model(**json.loads(text))
    except ValidationError as error:
        reason = sentence(error)
    except (TypeError, ValueError, RecursionError):
        reason = "It is not readable."
    st.warning(plain(f"The link's pinned run A is ignored. {reason}"), icon=":material/link_off:")
    return None


def _write(name: str, params: ExperimentParams) -> None:
    st.query_params[name] = json.dumps(
        params.model_dump(mode="json", exclude_defaults=True), separators=(",", ":"), ensure_ascii=False
    )


def _clear(name: str) -> None:
    st.query_params.pop(name, None)
