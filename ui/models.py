"""The model picker of every lab: the models of `engine.catalogue`, or any other by its name.

The chosen name is in the URL as ``f"{prefix}_model"``. A link may name what the list does not have, an id of the
Hugging Face Hub, a folder or a .gguf file: it opens with that name in a field of its own.
"""

from __future__ import annotations

from collections.abc import Collection

import streamlit as st

from engine import catalogue
from engine.catalogue import Kind
from engine.experiments import ExperimentParams
from ui.prose import plain

OTHER = "another…"
"""What the list has in the place of all models that it does not have."""


def pick(model: type[ExperimentParams], *, prefix: str, kinds: Collection[Kind] = ("decoder",)) -> dict[str, str]:
    """Draw the picker of a lab's model and return what it says.

    Choosing `OTHER` opens a text field; until a name is typed there, the model stays what it was.

    Args:
        model: the experiment's parameters, whose field ``model`` has the title, the help text and the default.
        prefix: the lab's.
        kinds: the kinds of models that the lab accepts.

    Returns:
        ``{"model": name}``, not yet validated, as from `ui.controls.controls`.
    """
    field = model.model_fields["model"]
    offered = {known.name: known for known in catalogue.MODELS if known.kind in kinds}
    address = f"{prefix}_model"
    name = st.query_params.get(address, field.default)
    _follow_address(address, name, offered)
    choice = st.selectbox(
        field.title or "Model",
        [*offered, OTHER],
        key=f"_{address}_chosen",
        format_func=lambda option: offered[option].label if option in offered else option,
        help="\n".join([f"{field.description}", *(f"- **{known.label}** {known.facts}" for known in offered.values())]),
        filter_mode=None,
        on_change=_take_chosen,
        args=(address, field.default),
    )
    if choice == OTHER:
        typed = st.text_input(
            "Hugging Face id, folder or .gguf file",
            key=f"_{address}_typed",
            placeholder="HuggingFaceTB/SmolLM2-360M",
            on_change=_take_typed,
            args=(address, field.default),
        )
        if not typed.strip() and name.strip():
            st.caption(plain(f"Type a name; until then you see {name}."))
    return {"model": name}


def _follow_address(address: str, name: str, offered: Collection[str]) -> None:
    """Let the widgets say what the address says when it has changed: by a link, a button, the browser's way back."""
    state = st.session_state
    if state.get(f"_{address}_seen") == name and f"_{address}_chosen" in state:
        return
    state[f"_{address}_seen"] = name
    state[f"_{address}_chosen"] = name if name in offered else OTHER
    if name not in offered:
        state[f"_{address}_typed"] = state[f"_{address}_other"] = name


def _take_chosen(address: str, default: str) -> None:
    chosen = st.session_state[f"_{address}_chosen"]
    name = st.session_state.get(f"_{address}_other") if chosen == OTHER else chosen
    if name:
        _write(address, name, default)


def _take_typed(address: str, default: str) -> None:
    if name := st.session_state[f"_{address}_typed"].strip():
        _write(address, name, default)


def _write(address: str, name: str, default: str) -> None:
    """Put the model into the URL, where a default is never written."""
    if name == default:
        st.query_params.pop(address, None)
    else:
        st.query_params[address] = name
