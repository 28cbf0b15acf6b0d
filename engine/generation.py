"""Text from a decoder, one token after the other.

Legend: B batch, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from engine.errors import InputError
from engine.model import Decoder, KVCache, evaluating
from engine.settings import Settings


class Sampling(Settings):
    """How the next token is drawn: p = softmax(logits / temperature), cut by `top_k`, then by `top_p`.

    Raises:
        InputError: a value is out of bounds.
    """

    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the most probable token; above 1 is bolder.")
    top_k: int | None = Field(None, ge=1, description="Only the k most probable tokens.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Only the most probable tokens that together reach probability p."
    )


GREEDY = Sampling(temperature=0)


def next_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that a token is drawn with, (B, V) from logits (B, V); rows sum to 1.

    Source: top-k, Fan et al. 2018; top-p, Holtzman et al. 2019, "The curious case of neural text degeneration".
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    below_best = logits - logits.amax(dim=1, keepdim=True)  # so that no temperature makes ∞ − ∞ of it
    ranked, order = (below_best / sampling.temperature).sort(dim=1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked[:, sampling.top_k :] = -math.inf
    probabilities = ranked.softmax(dim=1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(dim=1) - probabilities  # of the tokens ranked higher
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(1, order, probabilities)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next tokens, (B,), on the CPU: equal seeds draw the same on every device."""
    probabilities = next_distribution(logits.cpu(), sampling)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def generate(
    model: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    end_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `ids`; every token is computed once, its keys and values are kept.

    Args:
        model: the decoder.
        ids: (B, T), prompts of one length, at least one token.
        max_new_tokens: stop after so many.
        sampling: how to choose; greedily when left out.
        end_token: a sequence ends with it, and is filled up with it while others go on.
        generator: of the draws, on the CPU.

    Returns:
        (B, T + n) with the prompt, n ≤ `max_new_tokens`.

    Raises:
        InputError: no prompt, or more tokens than the model's context holds.
    """
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise InputError(f"A prompt of shape {tuple(ids.shape)} cannot be continued: give (batch, tokens), 1 or more.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: give 1 or more.")
    text = ids.cpu()
    ended = torch.zeros(len(text), dtype=torch.bool)
    cache = KVCache(model, len(text), text.shape[1] + max_new_tokens)
    fresh = text
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = model.lm_head(model.hidden(fresh, cache)[:, -1])  # (B, V)
            chosen = draw(logits, sampling, generator)
            if end_token is not None:
                chosen = chosen.masked_fill(ended, end_token)
                ended = chosen == end_token
            fresh = chosen[:, None]
            text = torch.cat([text, fresh], dim=1)
            if ended.all():
                break
    return text.to(ids.device)
