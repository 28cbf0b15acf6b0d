"""Attention masks as small functions that compose.

A mask answers one question: may the query at position q attend to the key at position k? It is a function
``mask(batch, head, query, key) -> bool`` of index tensors, the convention of PyTorch's FlexAttention, so the same
function can be drawn as a matrix here and be compiled into a fused kernel there.

    causal_window = intersection(causal, sliding_window(4))
    allowed = materialize(causal_window, 16)  # (16, 16), True = may attend

Legend: B batch, H heads, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """No looking ahead: k ≤ q (Vaswani et al. 2017, section 3.2.3, https://arxiv.org/abs/1706.03762)."""
    return key <= query


def bidirectional(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Everybody sees everybody, as in an encoder (Devlin et al. 2018)."""
    return (query >= 0) & (key >= 0)


def sliding_window(window: int) -> Mask:
    """Neighbours only: |q − k| < window, the query itself counted.

    Args:
        window: how many positions on each side, the own one included; at least 1.

    Raises:
        ValueError: the window is smaller than 1.

    Source: Beltagy et al. 2020, https://arxiv.org/abs/2004.05150; with `causal`: Mistral 7B,
    https://arxiv.org/abs/2310.06825.
    """
    if window < 1:
        raise ValueError(f"window ({window}) must be at least 1: a query always sees itself")
    return lambda batch, head, query, key: (query - key).abs() < window


def prefix_lm(prefix: int) -> Mask:
    """A prefix that sees itself in both directions, then causal: k < prefix or k ≤ q.

    Args:
        prefix: number of tokens in the prefix; 0 is plain causal.

    Raises:
        ValueError: the prefix is negative.

    Source: Raffel et al. 2019, figure 4, https://arxiv.org/abs/1910.10683.
    """
    if prefix < 0:
        raise ValueError(f"prefix ({prefix}) must not be negative")
    return lambda batch, head, query, key: (key < prefix) | (key <= query)


def padding(lengths: Tensor) -> Mask:
    """Keys past the end of their own sequence are hidden: k < lengths[b].

    Args:
        lengths: (B,) number of real tokens in every sequence of the batch.
    """
    return lambda batch, head, query, key: (key < lengths[batch]) & (query >= 0)


def from_matrix(matrix: Tensor) -> Mask:
    """Any mask at all, read from a matrix.

    Args:
        matrix: (T, S), non-zero where the query may attend.
    """
    allowed = matrix != 0
    return lambda batch, head, query, key: allowed[query, key]


def intersection(*masks: Mask) -> Mask:
    """Allowed where every one of `masks` allows it."""
    return lambda batch, head, query, key: reduce(torch.logical_and, (mask(batch, head, query, key) for mask in masks))


def union(*masks: Mask) -> Mask:
    """Allowed where at least one of `masks` allows it."""
    return lambda batch, head, query, key: reduce(torch.logical_or, (mask(batch, head, query, key) for mask in masks))


def materialize(
    mask: Mask,
    num_queries: int,
    num_keys: int | None = None,
    *,
    batch: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The matrix of a mask, True where a query may attend.

    Queries are the last `num_queries` of `num_keys` positions, as they are when earlier keys come from a cache.

    Args:
        mask: function of (batch, head, query, key).
        num_queries: T.
        num_keys: S; as many as queries when left out.
        batch: B, for masks that differ from sequence to sequence.
        device: where to build it.

    Returns:
        bool (T, S), or (B, 1, T, S) when `batch` is given.
    """
    num_keys = num_queries if num_keys is None else num_keys
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]  # (T, 1)
    key = torch.arange(num_keys, device=device)[None, :]  # (1, S)
    head = torch.zeros((), dtype=torch.long, device=device)
    if batch is None:
        return mask(head, head, query, key)
    sequence = torch.arange(batch, device=device)[:, None, None, None]  # (B, 1, 1, 1)
    return mask(sequence, head, query, key)
