"""Which weights share a scale: all of a tensor, those of one output channel, or a block of neighbours.

Legend: N weights of a tensor, O output channels (rows), I inputs, G groups, S weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Literal

from torch import Size, Tensor
from torch.nn import functional as F

from engine.errors import InputError


@dataclass(frozen=True)
class Grouping:
    """How a tensor falls into groups; made by `per_tensor`, `per_channel` and `per_block`.

    Args:
        kind: what a group is.
        size: S of a block, None for the others.

    A block is S neighbours of the flattened tensor, across the ends of rows as in bitsandbytes (``"block"``), or of one
    row (``"row block"``), as error compensation along the inputs needs it. Where S does not divide, the last block is
    filled up with zeros, which have no part in a scale and are not stored; where there are fewer than S weights in all,
    they are one block.
    """

    kind: Literal["tensor", "channel", "block", "row block"]
    size: int | None = None

    def __str__(self) -> str:
        """In words, e.g. ``"per block of 64"``."""
        return f"per {self.kind}" + (f" of {self.size}" if self.size else "")

    def split(self, values: Tensor) -> Tensor:
        """Values of any shape as groups (G, S), filled up with zeros."""
        rows, length = self._lines(values.shape)
        size = self._group_size(length)
        return F.pad(values.reshape(rows, length), (0, -length % size)).reshape(-1, size)

    def join(self, groups: Tensor, shape: Size) -> Tensor:
        """The tensor of `shape` whose groups are `groups` (G, S): undoes `split` to the last number."""
        rows, length = self._lines(shape)
        return groups.reshape(rows, -1)[:, :length].reshape(shape)

    def within_rows(self) -> Grouping:
        """The grouping with the same groups that does not cross a row's end, or with blocks cut there."""
        return per_block(self.size, within_rows=True) if self.kind == "block" else self

    def _lines(self, shape: Size) -> tuple[int, int]:
        if self.kind in ("tensor", "block") or len(shape) < 2:
            return 1, prod(shape)
        return shape[0], prod(shape[1:])

    def _group_size(self, length: int) -> int:
        return length if self.size is None else min(self.size, length)


def per_tensor() -> Grouping:
    """One scale for all weights."""
    return Grouping("tensor")


def per_channel() -> Grouping:
    """One scale for each index of the first dimension: for a linear layer's weight (O, I), an output's."""
    return Grouping("channel")


def per_block(size: int = 64, within_rows: bool = False) -> Grouping:
    """One scale for every `size` weights in a row.

    Args:
        size: S, at least 2.
        within_rows: whether a block ends with its row, or goes on with the next.

    Raises:
        InputError: a block of fewer than 2 weights, or of a fraction.
    """
    if not isinstance(size, Integral):
        raise InputError(f"The block size is {size!r}: give a whole number of weights, 2 or more.")
    if size < 2:
        raise InputError(f"The block size is {size}: give 2 or more, a scale for every weight would save nothing.")
    return Grouping("row block" if within_rows else "block", int(size))
