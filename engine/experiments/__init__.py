"""Experiments: the unit that a page, the command line, the cluster, the cache and the export all speak.

One module a lab. It defines

* ``Params(ExperimentParams)``: every knob with its bounds, default and help text,
* ``Result``: a frozen dataclass of plain numbers, strings and NumPy arrays,
* ``run(params, job) -> Result``.

Modules here import neither torch nor transformers at the top: the web process loads them. `run` imports what it needs.

Labs of one's own need not lie in this package: ``WORKBENCH_EXPERIMENTS`` names folders (separated as in ``PATH``) whose
modules are experiments as well. The web process and the workers must see the same folders.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import math
import os
import pkgutil
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import InputError
from engine.settings import sentence

Lane = Literal["short", "long"]

__path__.extend(filter(None, os.environ.get("WORKBENCH_EXPERIMENTS", "").split(os.pathsep)))


class ExperimentParams(BaseModel):
    """The knobs of an experiment: one place for bounds, defaults, help texts and error messages.

    Class attributes say how a run is treated:
        lane: ``"short"`` for what a slider waits for, ``"long"`` for training, sweeps and benchmarks.
        time_limit: seconds after which a run is stopped.
        stop_grace: seconds that a run may take to stop by itself, the step that it is in included, before its worker is
            restarted and what it has is lost.
        cacheable: whether equal parameters give an equal result (False for anything that is timed).
        returns_partial: whether a run that is stopped, for whatever reason, returns what it has so far (a training
            does), which then is its result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    lane: ClassVar[Lane] = "short"
    time_limit: ClassVar[float] = 30.0
    stop_grace: ClassVar[float] = 5.0
    cacheable: ClassVar[bool] = True
    returns_partial: ClassVar[bool] = False

    def memory_bytes(self) -> int:
        """Peak memory that a run takes on its device, in bytes, estimated before the start."""
        return 0

    def cache_token(self) -> str:
        """What a result depends on beside the parameters, such as the state of a file that they name."""
        return ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment by name, with its three parts."""

    name: str
    summary: str
    Params: type[ExperimentParams]
    run: Callable[[Any, Any], Any]


def names() -> list[str]:
    """Names of all experiments, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Experiment:
    """The experiment called `name`.

    Raises:
        InputError: there is none of that name; the message lists those there are.
    """
    if name not in names():
        raise InputError(f"There is no experiment {name!r}; there are: {', '.join(names())}.")
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    summary = next(iter((module.__doc__ or "").strip().splitlines()), "")
    return Experiment(name, summary, module.Params, module.run)


def parse(name: str, values: dict[str, Any]) -> ExperimentParams:
    """Parameters of the experiment `name` from plain values (strings are fine: a URL, a command line).

    A string for a list or tuple is split at its commas.

    Raises:
        InputError: a value is out of bounds, of the wrong kind, or unknown.
    """
    model = get(name).Params
    try:
        return model(**{field: _split(model, field, value) for field, value in values.items()})
    except ValidationError as error:
        raise InputError(sentence(error)) from error


def duration(seconds: float) -> str:
    """A time in the largest unit that it holds a whole number of, e.g. ``"1 h"``, ``"90 s"``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _split(model: type[ExperimentParams], field: str, value: Any) -> Any:
    known = model.model_fields.get(field)
    if known is None or not isinstance(value, str) or typing.get_origin(known.annotation) not in (list, tuple):
        return value
    return [item.strip() for item in value.split(",") if item.strip()]


def to_plain(value: Any) -> Any:
    """`value` as something that `json.dumps` takes, by the strict standard.

    Dataclasses and models become dicts, arrays nested lists, bytes Base64; NaN and infinity, which JSON does not have,
    become None.
    """
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        plain = value.tolist()
        return to_plain(plain) if value.dtype.kind == "f" and not np.isfinite(value).all() else plain
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return to_plain(value.model_dump())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
