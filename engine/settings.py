"""Frozen, bounded settings: a wrong value is one plain sentence."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import InputError

_QUOTED = 40
"""Characters of a wrong value that an error repeats."""


class Settings(BaseModel):
    """A pydantic model that cannot change, knows all its fields, and speaks in sentences.

    Raises:
        InputError: a value is wrong; the message names the field, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(sentence(error)) from error


def sentence(error: ValidationError) -> str:
    """A pydantic error as one plain sentence per wrong field: the field, the value given and what is allowed."""
    parts = []
    for problem in error.errors():
        if problem["type"] == "default_factory_not_called":  # a default that follows from a wrong value
            continue
        field = _shortened(".".join(str(part) for part in problem["loc"])) or "parameters"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":
            parts.append(message)
        else:
            parts.append(f"{field} is {_quoted(problem['input'])}: {message[:1].lower()}{message[1:]}.")
    return " ".join(parts)


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 2]}…{text[-1]}"


def _shortened(name: str) -> str:
    return name if len(name) <= _QUOTED else f"{name[: _QUOTED - 1]}…"
