"""Results as plain values: what an experiment may return, how much it weighs, and how it is kept from changing."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

SCALAR_BYTES = 32  # what a Python number costs, roughly: arrays are what counts
PLAIN = (type(None), bool, int, float, complex, np.generic)


def weigh(result: Any) -> int:
    """Bytes that `result` occupies: its arrays exactly, the rest roughly.

    Raises:
        TypeError: a part is no plain value; such a part would carry its library into the web process.
    """
    return sum(_bytes(leaf, where) for leaf, where in _leaves(result, "result"))


def freeze(result: Any) -> Any:
    """`result` itself, with its arrays made read-only: those who share it cannot change it for each other."""
    for leaf, _ in _leaves(result, "result"):
        if isinstance(leaf, np.ndarray):
            leaf.flags.writeable = False
    return result


def _leaves(value: Any, where: str) -> Iterator[tuple[Any, str]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{where}.{field.name}")
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key, where
            yield from _leaves(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _leaves(item, f"{where}[…]")
    else:
        yield value, where


def _bytes(leaf: Any, where: str) -> int:
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        return leaf.nbytes
    if isinstance(leaf, str | bytes):
        return len(leaf) + SCALAR_BYTES
    if isinstance(leaf, PLAIN):
        return SCALAR_BYTES
    raise TypeError(
        f"{where} is of type {type(leaf).__module__}.{type(leaf).__qualname__}; a result holds numbers, text, "
        "NumPy arrays, and dataclasses, lists and dicts of them."
    )


class ResultCache:
    """Finished results, the least recently used dropped first, bounded in bytes.

    Args:
        capacity: bytes that all results together may weigh.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """The result under `key`, which thereby counts as used; KeyError if there is none."""
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, result: Any, nbytes: int) -> None:
        """Keep `result`, which weighs `nbytes`; one heavier than the whole cache is not kept."""
        if nbytes > self.capacity:
            return
        if key in self._entries:
            self.nbytes -= self._entries.pop(key)[1]
        self._entries[key] = (result, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.capacity:
            _, (_, freed) = self._entries.popitem(last=False)
            self.nbytes -= freed
