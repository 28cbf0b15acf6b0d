"""The controls of the attention lab: few, the interesting ones first; what they can say depends on model and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from engine.experiments import attention, attention_head
from engine.experiments._attention import MAX_TOKENS
from ui import controls, models, run
from ui.controls import Look
from ui.labs import ATTENTION
from ui.prose import plain

PREFIX = ATTENTION.url_path


@dataclass(frozen=True)
class Settings:
    """What the controls say, with what is known of the model and the text.

    Args:
        params: the head and the changes to it, of the model and the text that `overview` is of.
        overview: the maps of all heads, the previous ones while new ones are under way; None until there are any.
        below: a place under the controls, for what must always be seen.
    """

    params: attention_head.Params
    overview: attention.Result | None
    below: DeltaGenerator


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    values = controls.controls(attention.Params, prefix=PREFIX, fields=["text"])
    if len(values["text"].encode()) > MAX_TOKENS:  # a token has at least one byte: shorter texts never need it
        values |= controls.controls(attention.Params, prefix=PREFIX, fields=["cut"])
    values |= models.pick(attention.Params, prefix=PREFIX, kinds=("decoder", "encoder"))
    source_place, head_place = st.container(), st.container()
    more = st.expander("Weights, mask, drop a token", icon=":material/tune:")
    with more:
        values |= controls.controls(attention.Params, prefix=PREFIX, fields=["weights"])
    text = controls.validated(attention.Params, values)
    key = f"{PREFIX}_overview"
    with source_place:
        overview = run.run("attention", text, key=key) if text else None
    seen = run.params_of(key)
    if overview and seen.model != text.model and _link_goes_beyond(overview):
        overview = seen = None  # a link's layer is to be read with the link's model, and there is another one's result
    known = overview or (None if text else run.latest(key))
    knobs = _head_controls(known, head_place, more) if known else {}
    if text is None:
        return None
    if overview and seen.model == text.model and text.weights == "trained":
        source_place.caption(plain(overview.source))
    # Nothing is asked of a model before its layers, heads and tokens are known: until then it all is of the last one.
    params = controls.validated(attention_head.Params, (seen or text).model_dump() | knobs)
    return Settings(params, overview, st.container()) if params else None


def waiting(given: Settings) -> bool:
    """True while there are no maps: draws what stands in their place until they come, or where they cannot come."""
    if given.overview is not None:
        return False
    if run.is_running(f"{PREFIX}_overview"):
        st.skeleton(height=460)
    else:
        st.caption("There are no maps to show: the note beside the controls says why.")
    return True


def _link_goes_beyond(overview: attention.Result) -> bool:
    """Whether the address names a layer or a head that the model of `overview` does not have."""
    sizes = dict(zip(("layer", "head"), overview.attention.shape[:2], strict=True))
    named = {name: st.query_params.get(f"{PREFIX}_{name}", "") for name in sizes}
    return any(number.isdecimal() and int(number) >= sizes[name] for name, number in named.items())


def _head_controls(overview: attention.Result, place: DeltaGenerator, more: DeltaGenerator) -> dict[str, Any]:
    model = attention_head.Params
    layers, heads = overview.attention.shape[:2]
    tokens = overview.tokens
    looks = {
        "layer": Look(maximum=layers - 1),
        "head": Look(maximum=heads - 1),
        "drop": Look(
            options=range(-1, len(tokens)), name=lambda i: "none" if i < 0 else f"{i} · {tokens[i]}", widget="select"
        ),
    }
    with place:
        knobs = controls.controls(model, prefix=PREFIX, fields=["layer", "head", "temperature"], **looks)
    with more:
        knobs |= controls.controls(model, prefix=PREFIX, fields=["mask"], mask=Look(widget="select"))
        if knobs["mask"] == "sliding window":
            knobs |= controls.controls(model, prefix=PREFIX, fields=["window"])
        if knobs["mask"] == "prefix LM":
            knobs |= controls.controls(model, prefix=PREFIX, fields=["prefix"])
        knobs |= controls.controls(model, prefix=PREFIX, fields=["reach", "drop"], **looks)
    return knobs
