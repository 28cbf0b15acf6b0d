"""Losses that keep a router's experts equally busy, and the room that each expert has.

Legend: N tokens (padding left out), E experts, K chosen per token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.errors import InputError

if TYPE_CHECKING:
    from engine.moe.routing import Routing

_ROUNDING = 1e-9
"""So that 1.1·10 is 11 and not a little more."""


def auxiliary_loss(routing: Routing) -> Tensor:
    """E·Σₑ fₑ·Pₑ: the share of the assignments that go to expert e, times its mean probability.

    fₑ is the share of all N·K assignments before capacity, so that Σ f = 1 for every K, and Pₑ the mean of the
    probabilities over the tokens. If both are uniform the loss is 1, if one expert gets everything with probability 1
    it is E. The gradient flows through P only. Mixtral in transformers takes f as the share of the tokens, which is
    K times as much.

    Args:
        routing: from `ExpertRouter.route`.

    Returns:
        a scalar; 0 if there are no tokens.

    Source: Fedus et al. 2021, equation 4, https://arxiv.org/abs/2101.03961.
    """
    f = routing.wanted.to(routing.probs.dtype) / routing.wanted.sum().clamp_min(1)  # (E,)
    P = _sum_over_tokens(routing, routing.probs) / max(routing.num_tokens, 1)  # (E,)
    return routing.wanted.numel() * (f * P).sum()


def z_loss(routing: Routing) -> Tensor:
    """The mean over the tokens of (ln Σₑ exp logitₑ)²: keeps the logits small, where softmax rounds little.

    Args:
        routing: from `ExpertRouter.route`.

    Returns:
        a scalar; 0 if there are no tokens.

    Source: Zoph et al. 2022, ST-MoE, equation 5, https://arxiv.org/abs/2202.08906.
    """
    z = torch.logsumexp(routing.logits, dim=-1).square()  # (N,)
    return _sum_over_tokens(routing, z) / max(routing.num_tokens, 1)


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """⌊factor·N·K / E⌋: how many tokens an expert takes; at least 1 if there is a token and the factor is at least 1.

    So a single token, as in generation, is never refused by a capacity that promises the fair share. A smaller factor
    may refuse everything.

    Raises:
        InputError: the factor is negative or not finite.

    Source: Fedus et al. 2021, equation 3, which says nothing of shares below one token.
    """
    check_capacity_factor(factor)
    share = math.floor(factor * num_tokens * top_k / num_experts + _ROUNDING)
    return max(share, 1) if factor >= 1 and num_tokens else share


def admit(choices: Tensor, capacity: int) -> Tensor:
    """Which choices an expert has room for: all first choices come before any second one, and then by token.

    Args:
        choices: the experts of each token, best first, one number for all padding, (N, K).
        capacity: of each expert.

    Returns:
        (N, K) bool.

    Source: Lepikhin et al. 2020, GShard, algorithm 1, https://arxiv.org/abs/2006.16668.
    """
    experts, order = choices.T.flatten().sort(stable=True)  # (K·N,)
    places = torch.arange(len(experts), device=experts.device) - torch.searchsorted(experts, experts)
    admitted = torch.empty_like(experts, dtype=torch.bool).index_copy(0, order, places < capacity)
    return admitted.view(choices.shape[1], -1).T


def check_capacity_factor(factor: float) -> None:
    """Raise `InputError` unless the factor is a number from 0 up."""
    if not 0 <= factor < math.inf:
        raise InputError(f"The capacity factor is {factor}: it must be at least 0 and finite; 1 is the fair share.")


def _sum_over_tokens(routing: Routing, values: Tensor) -> Tensor:
    """Σ of `values` (N, …) over the tokens that are not padding."""
    return (values if routing.valid is None else values[routing.valid]).sum(0)
