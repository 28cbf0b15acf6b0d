"""The controls of the quantization lab: those that matter for what is shown, the others keep their values unseen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st
from pydantic import BaseModel

from engine.experiments import (
    ExperimentParams,
    _quantization,
    quantization,
    quantization_map,
    quantization_model,
    quantization_sensitivity,
    quantization_side_by_side,
)
from ui import controls, models, page, run
from ui.controls import Look
from ui.kept import Kept
from ui.labs import QUANTIZATION
from ui.prose import plain


class _Memory(Kept):
    """The memory of this lab, which is also asked what a hidden widget holds."""

    def remembered(self, key: str) -> Any:
        """What a widget was left with; None if that is not known."""
        return st.session_state[self._values].get(key, (None, None))[0]


PREFIX = QUANTIZATION.url_path
RUN = f"{PREFIX}_run"
VIEW = f"{PREFIX}_view"
WEIGHTS, RATES, MAP = "Weights", "All types", "Layer map"
MODEL, SENSITIVITY, SIDE, SPEED = "Model", "Sensitivity", "Side by side", "Speed"
KEPT = _Memory(PREFIX)
BLOCK, LAYER = f"{PREFIX}_block", f"{PREFIX}_layer"
SIZES = tuple(2**power for power in range(1, 13))
"""Block sizes that the slider offers; a link may bring another one."""

_ASKED: dict[str, type[ExperimentParams]] = {
    MAP: quantization_map.Params,
    MODEL: quantization_model.Params,
    SENSITIVITY: quantization_sensitivity.Params,
    SIDE: quantization_side_by_side.Params,
}
_IGNORED_SIZE = f"_{PREFIX}_ignored_size"
_GROUPED_BY = f"_{PREFIX}_grouped_by"
_MODEL_OF_LAYER = f"_{PREFIX}_model_of_layer"
_SCALE = f"{PREFIX}_scale"  # the one control that every view has
_HEAD = f"{PREFIX}_attention_layer", f"{PREFIX}_attention_head"
_HEAD_CHOSEN, _NEXT_HEAD = f"_{PREFIX}_head_chosen", f"_{PREFIX}_next_head"
_SOURCE = f"{PREFIX}_source"
_FIRST = "first down projection"


@dataclass(frozen=True)
class Settings:
    """What the controls say, and what is known of the weights.

    Args:
        view: what the Explore tab shows.
        params: of the experiment behind the view; of `engine.experiments.quantization` where the view is of weights,
            and in the other tabs.
        found: the weights before and after; None in views of whole models, and until there is something.
        found_params: what `found` belongs to, which may be the settings of a moment ago.
    """

    view: str
    params: Any
    found: quantization.Result | None = None
    found_params: quantization.Params | None = None


def shared(model: type[ExperimentParams], params: BaseModel) -> dict[str, Any]:
    """The fields of `params` that `model` has as well."""
    return params.model_dump(include=set(model.model_fields))


def settings() -> Settings | None:
    """Draw the controls; None if what they say makes no sense (the sentence is then on the page)."""
    if _SCALE not in st.session_state:  # the page has just been opened
        st.session_state.pop(_IGNORED_SIZE, None)
    KEPT.begin()
    view = _view()
    if view in _ASKED:
        return _of_model(view)
    return _of_weights(view)


def _view() -> str:
    """What is shown: it is drawn after the controls, which depend on it."""
    if st.session_state.get(f"{PREFIX}_tab", page.EXPLORE) != page.EXPLORE:
        return WEIGHTS
    KEPT.restore(VIEW)
    view = st.session_state.get(VIEW) or st.query_params.get(VIEW)
    return view if view in (*_ASKED, RATES, SPEED) else WEIGHTS


def choose(key: str, value: Any, text: str | None = None) -> None:
    """Give a hidden widget a value, for a click elsewhere on the page; arguments as of `Kept.keep`.

    It may still be in the session's state with what it held when it was drawn last.
    """
    KEPT.keep(key, value, text)
    st.session_state[key] = value
    if text is None:
        st.query_params.pop(key, None)
    else:
        st.query_params[key] = text


def held(key: str) -> Any:
    """What a widget holds or, if it is hidden, held; None if that is not known."""
    return st.session_state[key] if key in st.session_state else KEPT.remembered(key)


def _controls(model: type[ExperimentParams], *fields: str, **looks: Look) -> dict[str, Any]:
    return KEPT.controls(model, prefix=PREFIX, fields=fields, **looks)


def _format() -> dict[str, Any]:
    """Data type, and bits and symmetry where it has a choice of them."""
    model = quantization.Params
    values = _controls(model, "data_type", data_type=Look(widget="select"))
    if _quantization.FORMATS[values["data_type"]][1] is None:
        values |= _controls(model, "bits")
    if values["data_type"] == "Integer":
        values |= _controls(model, "symmetric")
    return values


def _scale() -> dict[str, Any]:
    """Which weights share a scale."""
    model = quantization.Params
    values = _controls(model, "scale", scale=Look(name=lambda scale: scale.removeprefix("per ")))
    if values["scale"] == "per block":
        values |= {"block_size": _block_size()}
    if values["scale"] != "per tensor":
        values |= _controls(model, "double_quantization")
    return values


def _block_size() -> int:
    """A slider over powers of two, and over what a link says beside them."""
    key = f"{PREFIX}_block_size"
    KEPT.restore(key)
    state, field = st.session_state, quantization.Params.model_fields["block_size"]
    sizes = {*SIZES, state.get(key, field.default)}
    if key not in state and (linked := st.query_params.get(key)) is not None:
        if linked.isdecimal() and len(linked) <= 4 and SIZES[0] <= int(linked) <= SIZES[-1]:
            sizes.add(int(linked))
        else:
            state[_IGNORED_SIZE] = linked[:40]
    size = st.select_slider(
        field.title, sorted(sizes), field.default, key=key, help=field.description, bind="query-params"
    )
    if size != field.default:
        state.pop(_IGNORED_SIZE, None)
    if _IGNORED_SIZE in state:
        st.warning(
            plain(
                f"The link sets the block size to “{state[_IGNORED_SIZE]}”, but it must be a whole number from "
                f"{SIZES[0]} to {SIZES[-1]}. {field.default} is used instead."
            ),
            icon=":material/link_off:",
        )
    KEPT.keep(key, size, None if size == field.default else str(size))
    return size


def _of_model(view: str) -> Settings | None:
    """The controls of a view of a whole model."""
    asked = _ASKED[view]
    fields = {
        MAP: (),
        MODEL: ("tokens", "text"),
        SENSITIVITY: ("unit", "tokens", "text"),
        SIDE: ("prompt", "method", "new_tokens", "attention_layer", "attention_head"),
    }[view]
    if view == SIDE and _NEXT_HEAD in st.session_state:
        st.session_state.update(zip(_HEAD, st.session_state.pop(_NEXT_HEAD), strict=True))
    first = [field for field in ("prompt", "method", "unit") if field in fields]
    values = models.pick(asked, prefix=PREFIX)
    values |= _controls(asked, *first)
    values |= _format() if view != MODEL else {}
    values |= _scale()
    rest = [field for field in fields if field not in first]
    if view == MODEL:
        values |= _controls(asked, "symmetric", symmetric=Look(label="Symmetric integers"))
    if rest:
        with st.expander("Head, length" if view == SIDE else "Your text, tokens", icon=":material/tune:"):
            values |= _controls(
                asked,
                *rest,
                tokens=Look(minimum=256, maximum=16_384, step=256),
                attention_layer=Look(label="Layer of the map", maximum=None),
                attention_head=Look(label="Head of the map"),
            )
    params = controls.validated(asked, values)
    return Settings(view, params) if params else None


def _of_weights(view: str) -> Settings | None:
    """The controls of a view of weights, and the weights themselves: they say which layers there are to choose from."""
    model = quantization.Params
    values = _format()
    values |= _controls(model, "source", source=Look(widget="select"))
    layer_place, run_place = st.container(), st.container()
    if values["source"] == "model layer":
        with layer_place:
            values |= models.pick(model, prefix=PREFIX)
        _forget_layer_of_another(values["model"])
        KEPT.restore(LAYER)
        values["layer"] = chosen_layer()
    elif values["source"] == "normal with outliers":
        values |= _controls(model, "outliers", "outlier_size", outlier_size=Look(step=1))
    values |= _scale()
    if values["source"] != "model layer":
        values |= _controls(model, "seed", seed=Look(maximum=99))
    values["block"] = _block(values)
    params = controls.validated(model, values)
    if params is None:
        return None
    with run_place:
        found = run.run("quantization", params, key=RUN)
        if run.problem(RUN) and values["block"] >= 0:
            st.button("Go to the largest weight", icon=":material/undo:", on_click=choose_block, args=(None,))
    found_params = run.params_of(RUN)
    if params.source == "model layer":
        with layer_place:
            _layer(params, found if found and found_params.model == params.model else None)
    return Settings(view, params, found, found_params)


def chosen_layer() -> str:
    """The dotted name of the layer that is the source of weights, or will be; "" for the first down projection."""
    layer = held(LAYER)
    return st.query_params.get(LAYER, "") if layer is None else layer


def has_chosen_head(params: quantization_side_by_side.Params) -> bool:
    """Whether the learner, a link or the page has chosen the head whose attention is shown."""
    is_first = params.attention_layer == params.attention_head == 0
    return not is_first or held(_HEAD_CHOSEN) is True


def choose_head(layer: int, head: int) -> None:
    """Look at the attention of this head from the next drawing on."""
    KEPT.keep(_HEAD_CHOSEN, True, None)
    st.session_state[_NEXT_HEAD] = layer, head


def choose_layer(name: str, model: str) -> None:
    """Take a layer of a model as the source of weights from the next drawing on."""
    st.session_state[_MODEL_OF_LAYER] = model
    choose(LAYER, name, name)
    choose(_SOURCE, "model layer")


def choose_block(number: int | None) -> None:
    """Look at another block from the next drawing on; None is the one with the largest weight."""
    st.session_state[BLOCK] = number


def _block(values: dict[str, Any]) -> int:
    """The chosen block; one that was chosen among other blocks is forgotten."""
    grouped_by = tuple(str(values.get(name)) for name in ("source", "model", "layer", "scale", "block_size"))
    before, st.session_state[_GROUPED_BY] = st.session_state.get(_GROUPED_BY), grouped_by
    if before not in (None, grouped_by):
        choose_block(None)
        KEPT.keep(BLOCK, None, None)
    KEPT.restore(BLOCK)
    chosen = st.session_state.get(BLOCK)
    if chosen is None and BLOCK not in st.session_state:
        linked = st.query_params.get(BLOCK, "")
        chosen = int(linked) if linked.isdecimal() and len(linked) < 10 else None
    return -1 if chosen is None else chosen


def _forget_layer_of_another(model: str) -> None:
    before, st.session_state[_MODEL_OF_LAYER] = st.session_state.get(_MODEL_OF_LAYER), model
    if before not in (None, model):
        st.session_state[LAYER] = ""


def _layer(params: quantization.Params, found: quantization.Result | None) -> None:
    layers = found.layers if found else [params.layer] * bool(params.layer)
    _controls(
        quantization.Params,
        "layer",
        layer=Look(options=["", *layers], name=lambda name: name or _FIRST, widget="select"),
    )
