"""What does a head do? Numbers computed from its attention weights.

All statistics take weights (..., T, S) whose rows sum to 1, row q the distribution of query q over the keys, and
return one number a head, (...). Legend: T queries, S keys, P period of a repeated sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROLE_THRESHOLD = 0.5
"""A head is named after what it does with more than half of its mass."""


def entropy(weights: Tensor) -> Tensor:
    """How spread the attention is: the mean over queries of −Σ_k w_k ln w_k, in nats.

    0 when every query looks at one key; e^entropy is the effective number of keys looked at.

    Source: Clark et al. 2019, "What does BERT look at?", https://arxiv.org/abs/1906.04341.
    """
    return torch.special.entr(weights).sum(-1).mean(-1)


def mean_distance(weights: Tensor) -> Tensor:
    """How far the attention reaches: the mean over queries of Σ_k w_k |q − k|, in tokens.

    Source: Vig and Belinkov 2019, "Analyzing the structure of attention in a transformer language model",
    https://arxiv.org/abs/1906.04284.
    """
    query = torch.arange(weights.shape[-2], device=weights.device)[:, None]
    key = torch.arange(weights.shape[-1], device=weights.device)[None, :]
    return (weights * (query - key).abs()).sum(-1).mean(-1)


def first_token_mass(weights: Tensor) -> Tensor:
    """Attention sink: the mean over queries q ≥ 1 of w[q, 0], from 0 to 1 (query 0 has no choice and is left out).

    Source: Xiao et al. 2023, "Efficient streaming language models with attention sinks",
    https://arxiv.org/abs/2309.17453.
    """
    return _mean_or_zero(weights[..., 1:, 0])


def previous_token_score(weights: Tensor) -> Tensor:
    """The mean over queries q ≥ 1 of w[q, q − 1], from 0 to 1.

    Source: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework/index.html.
    """
    return _mean_or_zero(weights.diagonal(offset=-1, dim1=-2, dim2=-1))


def induction_score(weights: Tensor, period: int) -> Tensor:
    """On a sequence that repeats after P tokens: the mean over queries q ≥ P of w[q, q − P + 1], from 0 to 1.

    In the second round a token has been seen before; an induction head looks at what came after it then.

    Args:
        weights: (..., T, T) on a sequence whose token q equals token q − P for every q ≥ P.
        period: P.

    Raises:
        ValueError: the sequence is not longer than one period.

    Source: Olsson et al. 2022, "In-context learning and induction heads", https://arxiv.org/abs/2209.11895.
    """
    length = weights.shape[-2]
    if not 0 < period < length:
        raise ValueError(f"period ({period}) must be between 1 and the sequence's length ({length}) − 1")
    query = torch.arange(period, length, device=weights.device)
    return weights[..., query, query - period + 1].mean(-1)


def repeated_random_tokens(vocab_size: int, period: int, batch: int, seed: int) -> Tensor:
    """Random tokens, said twice: the probe of `induction_score`.

    Nothing in them can be predicted from language, only from the repetition. No token occurs twice within a period, so
    there is exactly one earlier occurrence to look up.

    Args:
        vocab_size: ids are drawn from 0 … vocab_size − 1.
        period: P, tokens before the repetition.
        batch: number of sequences.
        seed: of the generator; equal seeds give equal tokens.

    Returns:
        int64 (batch, 2·P).

    Raises:
        ValueError: the vocabulary is smaller than the period.
    """
    if vocab_size < period:
        raise ValueError(f"a vocabulary of {vocab_size} tokens cannot fill a period of {period} without repeating")
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([torch.randperm(vocab_size, generator=generator)[:period] for _ in range(batch)])
    return torch.cat([once, once], dim=1)


def probe_periods(longest: int) -> tuple[int, int, int]:
    """Periods to average `induction_score` over: a half, three quarters and all of `longest`.

    On a single period a head that looks equally far back whatever it reads can pass for an induction head; over three
    it scores a third at most.
    """
    return longest // 2, 3 * longest // 4, longest


def head_roles(weights: Tensor, period: int) -> list[list[str]]:
    """A name for every head of a model, from what it does with most of its mass on the repeated probe.

    The more specific name wins: an induction head has nothing to look up in the first round, and rests on the first
    token there.

    Args:
        weights: (L, H, T, T) on a sequence of `repeated_random_tokens`, averaged over its batch.
        period: P of that sequence.

    Returns:
        [layer][head]: "induction", "previous token", "sink", or "" where none exceeds `ROLE_THRESHOLD`.
    """
    scores = {
        "induction": induction_score(weights, period),
        "previous token": previous_token_score(weights),
        "sink": first_token_mass(weights),
    }
    layers, heads = weights.shape[:2]
    return [
        [
            next((name for name, score in scores.items() if score[layer, head] > ROLE_THRESHOLD), "")
            for head in range(heads)
        ]
        for layer in range(layers)
    ]


def _mean_or_zero(values: Tensor) -> Tensor:
    """Mean over the last dimension; 0 for a text of one token, which has no such entry."""
    return values.mean(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
