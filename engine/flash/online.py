"""Softmax in one pass: scores arrive in pieces, and what was summed before is rescaled when a larger one comes.

A softmax in low precision needs the largest score before it can sum anything: exp(12) is already beyond float16. The
online form starts summing at once, relative to the largest score so far, and corrects the sum with one factor whenever
that changes. `absorb` is this step; FlashAttention is the step applied to the rows of a tile.

Legend: T scores, C scores of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import InputError


class Absorbed(NamedTuple):
    """What one step of the online softmax leaves behind.

    maximum (...): largest score so far; rescale (...): exp(maximum before − maximum), 0 as long as nothing was seen;
    exponentials (..., C): exp(scores − maximum); sum (...): of all exponentials so far, relative to `maximum`.
    """

    maximum: Tensor
    rescale: Tensor
    exponentials: Tensor
    sum: Tensor


def absorb(scores: Tensor, maximum_before: Tensor, sum_before: Tensor) -> Absorbed:
    """One step of the online softmax, along the last axis.

    m = max(m_before, max(x)),  r = exp(m_before − m),  ℓ = r · ℓ_before + Σ exp(x − m)

    Args:
        scores: (..., C), −∞ where forbidden; C is at least 1.
        maximum_before: (...), −∞ at the start.
        sum_before: (...), 0 at the start.

    Returns:
        `Absorbed`, in the scores' dtype. Where every score so far is −∞, the sum and the exponentials are 0.

    Source: Milakov and Gimelshein 2018, algorithm 3, https://arxiv.org/abs/1805.02867.
    """
    maximum = torch.maximum(maximum_before, scores.amax(-1))  # (...)
    anchor = finite_anchor(maximum)
    rescale = torch.exp(maximum_before - anchor)
    exponentials = torch.exp(scores - anchor[..., None])  # (..., C)
    return Absorbed(maximum, rescale, exponentials, rescale * sum_before + exponentials.sum(-1))


def finite_anchor(maximum: Tensor) -> Tensor:
    """`maximum`, or 0 where it is −∞: exp(−∞ − 0) is 0, whereas −∞ − (−∞) is NaN."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


@dataclass(frozen=True, eq=False)
class ChunkState:
    """The online softmax after one chunk; all scalars are 0-dimensional tensors in the scores' dtype.

    Args:
        columns: which scores the chunk is.
        scores: (C,) the chunk itself.
        maximum_before, maximum: largest score before and after the chunk.
        rescale: exp(maximum_before − maximum), the factor on `sum_before`; 0 as long as nothing was seen.
        sum_before, sum: Σ exp(score − maximum), each relative to its own maximum.
    """

    columns: slice
    scores: Tensor
    maximum_before: Tensor
    maximum: Tensor
    rescale: Tensor
    sum_before: Tensor
    sum: Tensor


def stream_softmax(scores: Tensor, chunk: int) -> Iterator[ChunkState]:
    """The online softmax of a row, one state per chunk, computed in the row's own dtype.

    Args:
        scores: (T,), −∞ where forbidden.
        chunk: scores taken at a time; the last chunk may be shorter.

    Raises:
        InputError: the scores are no row of floating-point numbers, or the chunk is smaller than 1.

    Source: Milakov and Gimelshein 2018, algorithm 3, https://arxiv.org/abs/1805.02867.
    """
    _check_row(scores)
    if chunk < 1:
        raise InputError(f"chunk ({chunk}) must be at least 1: that many scores are taken at a time")
    return _chunks(scores, chunk)


def _chunks(scores: Tensor, chunk: int) -> Iterator[ChunkState]:
    maximum, total = scores.new_tensor(-math.inf), scores.new_tensor(0.0)
    for start in range(0, len(scores), chunk):
        columns = slice(start, min(start + chunk, len(scores)))
        after = absorb(scores[columns], maximum, total)
        yield ChunkState(columns, scores[columns], maximum, after.maximum, after.rescale, total, after.sum)
        maximum, total = after.maximum, after.sum


def softmax_of(states: Iterable[ChunkState]) -> Tensor:
    """The softmax that a stream of states amounts to: exp(x − m) / ℓ with the last state's m and ℓ.

    Args:
        states: all states of one row, in order.

    Returns:
        (T,), in the scores' dtype; 0 throughout where every score is −∞.

    Raises:
        InputError: there is no state.
    """
    states = list(states)
    if not states:
        raise InputError("a softmax needs at least one score, there is none")
    scores, last = torch.cat([state.scores for state in states]), states[-1]
    total = last.sum.masked_fill(last.sum == 0, 1.0)
    return torch.exp(scores - finite_anchor(last.maximum)) / total


def naive_softmax(scores: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) to the letter and in the scores' own dtype: what overflows is inf, and inf / inf is NaN.

    Args:
        scores: (T,).

    Raises:
        InputError: the scores are no row of floating-point numbers.
    """
    _check_row(scores)
    exponentials = torch.exp(scores)
    return exponentials / exponentials.sum()


def _check_row(scores: Tensor) -> None:
    if scores.dim() != 1 or not scores.is_floating_point():
        raise InputError(f"scores must be one row of floating-point numbers, not {scores.dtype} {tuple(scores.shape)}")
