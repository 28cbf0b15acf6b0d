"""Widgets made from an experiment's parameter model, bound to the URL.

Bounds, titles, help texts and defaults come from the model, so that they are written once. What depends on data (the
number of layers, the tokens of a text) is given for the call with `Look`. The browser's limits are a courtesy only:
`validated` has the last word.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import annotated_types
import streamlit as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from streamlit.delta_generator import DeltaGenerator

from engine.experiments import ExperimentParams, sentence
from ui import links
from ui.prose import plain

Params = TypeVar("Params", bound=ExperimentParams)
Number = int | float

_MANY_OPTIONS = 4
_STEPS = 100
_SEED = "seed"
_BIND: dict[str, Any] = {"bind": "query-params"}


@dataclass(frozen=True)
class Look:
    """How a field is drawn in this call, where that differs from its model.

    Args:
        label: the widget's label instead of the field's title.
        help: instead of the field's description.
        minimum, maximum: bounds that depend on data; they narrow those of the model.
        step: the slider's step.
        options: what there is to choose from, for a field whose choices depend on data.
        name: turns an option into what is shown (and written into the URL).
        widget: ``"area"`` for text of several lines, ``"line"`` for one, ``"select"`` for a list instead of buttons,
            ``"number"`` for a number to be typed instead of a slider.
        value: the default instead of the model's.
        placeholder: what an empty line of text shows.
    """

    label: str | None = None
    help: str | None = None
    minimum: Number | None = None
    maximum: Number | None = None
    step: Number | None = None
    options: Sequence[Any] | None = None
    name: Callable[[Any], str] = str
    widget: Literal["area", "line", "select", "number"] | None = None
    value: Any = None
    placeholder: str | None = None


@dataclass(frozen=True)
class _Field:
    """A field as it is drawn: the model's facts with the call's `Look` applied."""

    key: str
    label: str
    help: str | None
    kind: type
    optional: bool
    default: Any
    minimum: Number | None
    maximum: Number | None
    step: Number | None
    options: list[Any] | None
    name: Callable[[Any], str]
    widget: str | None
    placeholder: str | None

    def allowed(self) -> str:
        """What may be given, in words."""
        if self.options is not None:
            return links.one_of([self.name(option) for option in self.options])
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "a text"
        noun = "a whole number" if self.kind is int else "a number"
        match self.minimum, self.maximum:
            case None, None:
                return noun
            case low, None:
                return f"{noun} from {low:g}"
            case None, high:
                return f"{noun} up to {high:g}"
            case low, high:
                return f"{noun} from {low:g} to {high:g}"

    def is_drawn_as(self, text: str, value: Any) -> bool:
        """True if the widget took `text` from the URL as `value`."""
        if self.options is not None:
            return text == self.name(value)
        if value is None:
            return text == ""
        if self.kind is bool:
            return text.lower() == str(value).lower()
        if self.kind is str:
            return text == value
        try:
            return math.isclose(float(text), value)
        except ValueError:
            return False


def controls(
    model: type[ExperimentParams],
    *,
    prefix: str,
    fields: Sequence[str],
    notes: DeltaGenerator | None = None,
    **looks: Look,
) -> dict[str, Any]:
    """Draw a widget for each of `fields` and return what they hold.

    A whole number or a number with bounds becomes a slider, one without a number field, and so does a seed, which is a
    name and no amount; a bool becomes a toggle, a Literal buttons or (when there are many) a list, a str a text field.
    ``json_schema_extra`` of a field may say ``widget``
    (as in `Look`) and ``step``. Values from the URL that make no sense are replaced by the default, and
    a note says which and by what.

    Args:
        model: the experiment's parameters.
        prefix: the lab's; widget keys and URL parameters are ``f"{prefix}_{field}"``.
        fields: what to draw, in this order.
        notes: where notes go, for controls that are folded away; without it each stands below its control.
        looks: by field, what differs from the model in this call.

    Returns:
        The value of each field, by name, not yet validated.
    """
    values = {}
    for field in fields:
        spec = _field(model.model_fields[field], f"{prefix}_{field}", field, looks.get(field, Look()))
        linked = st.query_params.get(spec.key) if spec.key not in st.session_state else None
        _keep_in_bounds(spec)
        values[field] = _draw(spec)
        with notes or nullcontext():
            _note_ignored(spec, linked, values[field])
    return values


def validated(model: type[Params], values: dict[str, Any]) -> Params | None:
    """`values` as parameters, or None after a sentence for each value that is not allowed; what was typed stays."""
    try:
        return model(**values)
    except ValidationError as error:
        st.error(plain(sentence(error)), icon=":material/edit:")
        return None


def _field(info: FieldInfo, key: str, field: str, look: Look) -> _Field:
    kind, optional, literals = _kind(info.annotation)
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    step = look.step or extra.get("step") or (1 if kind is int else None)
    low, high = _bounds(info, step or 0)
    return _Field(
        key=key,
        label=look.label or info.title or field.replace("_", " ").capitalize(),
        help=look.help or info.description,
        kind=kind,
        optional=optional,
        default=info.default if look.value is None else look.value,
        minimum=max((bound for bound in (low, look.minimum) if bound is not None), default=None),
        maximum=min((bound for bound in (high, look.maximum) if bound is not None), default=None),
        step=step,
        options=list(look.options) if look.options is not None else literals,
        name=look.name,
        widget=look.widget or extra.get("widget") or ("number" if field == _SEED else None),
        placeholder=look.placeholder,
    )


def _kind(annotation: Any) -> tuple[type, bool, list[Any] | None]:
    """The type behind an annotation, whether None is allowed, and the values of a Literal."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        optional = len(arms) < len(typing.get_args(annotation))
        annotation = arms[0]
    if typing.get_origin(annotation) is Literal:
        literals = list(typing.get_args(annotation))
        return type(literals[0]), optional, ([None] if optional else []) + literals
    return annotation, optional, None


def _bounds(info: FieldInfo, step: Number) -> tuple[Number | None, Number | None]:
    """The smallest and the largest value that the model takes; an open bound is moved inwards by `step`."""
    low = high = None
    for constraint in info.metadata:
        match constraint:
            case annotated_types.Ge(ge=bound):
                low = bound
            case annotated_types.Gt(gt=bound):
                low = bound + step
            case annotated_types.Le(le=bound):
                high = bound
            case annotated_types.Lt(lt=bound):
                high = bound - step
    return low, high


def _keep_in_bounds(spec: _Field) -> None:
    """Bring a value that was right for other data (a longer text, a deeper model) back to what there is now."""
    held = st.session_state.get(spec.key)
    if held is None:
        return
    if spec.options is not None:
        if held not in spec.options:
            st.session_state[spec.key] = _first_value(spec)
    elif spec.kind in (int, float):
        inside = held
        if spec.minimum is not None:
            inside = max(inside, spec.minimum)
        if spec.maximum is not None:
            inside = min(inside, spec.maximum)
        if inside != held:
            st.session_state[spec.key] = inside


def _first_value(spec: _Field) -> Any:
    """The default, moved into what the data allows."""
    value = spec.default
    if spec.options is not None:
        return value if value in spec.options else spec.options[0]
    if value is not None and spec.kind in (int, float):
        if spec.minimum is not None:
            value = max(value, spec.minimum)
        if spec.maximum is not None:
            value = min(value, spec.maximum)
    return value


def _draw(spec: _Field) -> Any:
    value = _first_value(spec)
    common: dict[str, Any] = {"label": spec.label, "key": spec.key, "help": spec.help, **_BIND}
    if spec.options is not None:
        if spec.widget == "select" or len(spec.options) > _MANY_OPTIONS:
            return st.selectbox(options=spec.options, index=spec.options.index(value), format_func=spec.name, **common)
        return st.segmented_control(options=spec.options, default=value, required=True, format_func=spec.name, **common)
    if spec.kind is bool:
        return st.toggle(value=value, **common)
    if spec.kind is str:
        if spec.widget == "area":
            return st.text_area(value=value, height=110, **common)
        return st.text_input(value=value, placeholder=spec.placeholder, **common)
    return _draw_number(spec, value, common)


def _draw_number(spec: _Field, value: Number | None, common: dict[str, Any]) -> Number | None:
    low, high, kind = spec.minimum, spec.maximum, spec.kind
    if spec.optional or low is None or high is None or spec.widget == "number":
        if low is not None:
            common["min_value"] = kind(low)
        if high is not None:
            common["max_value"] = kind(high)
        if spec.step is not None:
            common["step"] = kind(spec.step)
        return st.number_input(value=None if value is None else kind(value), **common)
    if low >= high:
        return st.number_input(value=kind(low), disabled=True, **common)
    step = spec.step or _round_step((high - low) / _STEPS)
    return st.slider(min_value=kind(low), max_value=kind(high), value=kind(value), step=kind(step), **common)


def _round_step(width: float) -> float:
    """The largest power of ten that is at most `width`."""
    return 10.0 ** math.floor(math.log10(width))


def _note_ignored(spec: _Field, linked: str | None, value: Any) -> None:
    """Say so when the link held a value that the widget could not take, until the learner sets another one."""
    memory = f"_{spec.key}_ignored"
    if linked is not None and not spec.is_drawn_as(linked, value):
        st.session_state[memory] = (linked, value)
    if memory not in st.session_state:
        return
    given, instead = st.session_state[memory]
    if value != instead:
        del st.session_state[memory]
        return
    links.ignored(spec.label, given, spec.allowed(), spec.name(instead) if spec.options is not None else str(instead))
