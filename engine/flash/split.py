"""Attention to a long cache that is read in parts side by side (split-K, "flash decoding").

One new query has no rows to share among the cores of a device, so the keys are shared instead: each part of the cache
gives a maximum m, a sum ℓ and an output O of its own, and these are merged exactly,

    M = max m,  r = exp(m − M),  output = Σ r O / Σ r ℓ,  logsumexp = M + ln Σ r ℓ.

It is the online softmax's rescaling, done once over all parts instead of one after the other.

Legend: B batch, H query heads, G key/value heads (G divides H), R = H / G, Tq queries, Tk keys, d head width, S parts,
C keys of a part.

Source: Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference",
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import InputError


@dataclass(frozen=True, eq=False)
class Parts:
    """What the parts of a cache give before they are merged; in float32 when the input is half precision.

    A kernel widens half precision on the chip; here keys and values are widened in the device's memory, which costs
    more than reading them.

    Args:
        starts: the first key of each part.
        maximum: (B, H, S, Tq) m, the largest score in the part.
        sum: (B, H, S, Tq) ℓ = Σ exp(score − m).
        output: (B, H, S, Tq, d) Σ exp(score − m) · value, not yet divided by anything.
    """

    starts: tuple[int, ...]
    maximum: Tensor
    sum: Tensor
    output: Tensor


class Merged(NamedTuple):
    """The whole: output (B, H, Tq, d); logsumexp (B, H, Tq); rescale (B, H, S, Tq), the factor r on each part."""

    output: Tensor
    logsumexp: Tensor
    rescale: Tensor


def split_attention(Q: Tensor, K: Tensor, V: Tensor, splits: int, *, scale: float | None = None) -> Tensor:
    """softmax(scale · QKᵀ) · V with the keys in `splits` parts, every query seeing every key.

    Args:
        Q: (B, H, Tq, d).
        K: (B, G, Tk, d); query head h reads key head h // (H / G).
        V: as K.
        splits: S, from 1 to Tk; where it does not divide Tk, one more part has the rest.
        scale: factor on the scores, 1/√d when left out.

    Returns:
        (B, H, Tq, d) in the queries' dtype.

    Raises:
        InputError: the heads do not group, or there are more parts than keys.
    """
    return merge(attend_parts(Q, K, V, splits, scale=scale)).output.to(Q.dtype)


def attend_parts(Q: Tensor, K: Tensor, V: Tensor, splits: int, *, scale: float | None = None) -> Parts:
    """Every part's own maximum, sum and output; arguments and errors as in `split_attention`."""
    B, H, Tq, d = Q.shape
    G, Tk = K.shape[1:3]
    if H % G:
        raise InputError(f"query heads ({H}) must be a multiple of key/value heads ({G})")
    if not 1 <= splits <= Tk:
        raise InputError(f"splits ({splits}) must be from 1 to the number of keys ({Tk})")
    scale = 1 / math.sqrt(d) if scale is None else scale
    if Q.dtype in (torch.float16, torch.bfloat16):  # a score of 500 in bfloat16 is off by up to 1
        Q, K, V = Q.float(), K.float(), V.float()
    rows = (Q * scale).reshape(B, G, 1, H // G * Tq, d)  # the queries that share a key head are rows of one product
    size = Tk // splits  # C
    even = splits * size
    pieces = [_attend(rows, *(tensor[:, :, :even].unflatten(2, (splits, size)) for tensor in (K, V)))]
    if even < Tk:
        pieces.append(_attend(rows, K[:, :, None, even:], V[:, :, None, even:]))
    maximum, total, output = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))  # (B, G, S, R·Tq, …)
    starts = (*range(0, even, size), *([even] if even < Tk else []))

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.unflatten(3, (H // G, Tq)).transpose(2, 3).flatten(1, 2)  # (B, H, S, Tq, …)

    return Parts(starts, by_head(maximum), by_head(total), by_head(output))


def merge(parts: Parts) -> Merged:
    """The parts put together, each rescaled to the largest maximum."""
    largest = parts.maximum.amax(2, keepdim=True)  # (B, H, 1, Tq)
    rescale = torch.exp(parts.maximum - largest)  # (B, H, S, Tq)
    total = (rescale * parts.sum).sum(2)  # (B, H, Tq)
    output = (rescale[..., None] * parts.output).sum(2) / total[..., None]
    return Merged(output, largest.squeeze(2) + total.log(), rescale)


def _attend(rows: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, ℓ and O of each part: rows (B, G, 1, R·Tq, d), K and V (B, G, S, C, d)."""
    scores = rows @ K.mT  # (B, G, S, R·Tq, C)
    maximum = scores.amax(-1)
    exponentials = torch.exp(scores - maximum[..., None])
    return maximum, exponentials.sum(-1), exponentials @ V
