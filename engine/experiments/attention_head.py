"""One head step by step, under your temperature and mask, with or without a token.

Legend: T tokens, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.experiments import _attention

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


class Params(_attention.HeadParams):
    """A head and what is changed about it."""


@dataclass(frozen=True)
class Result:
    """Every stage of one head.

    Args:
        tokens: T printable labels, the dropped one left out.
        query, key, value: (T, d), position embedding included.
        scores: (T, T) = QKᵀ.
        scaled: (T, T) = scores · scale / temperature.
        masked: (T, T) = scaled, −∞ where forbidden.
        weights: (T, T) = softmax(masked).
        output: (T, d) = weights · value.
        scale: factor on the scores.
        layer_mean: (T, T) weights averaged over all heads of the layer.
        untouched: (U, U) weights of this head without any change, on all U tokens.
        untouched_tokens: U printable labels.
        difference: (U, U) weights less `untouched`; NaN in the row and column of the dropped token.
        num_layers, num_heads: of the model.
        sentence: what the head does, in words.
        note: a sentence if a setting has no effect, else empty.
    """

    tokens: list[str]
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scores: np.ndarray
    scaled: np.ndarray
    masked: np.ndarray
    weights: np.ndarray
    output: np.ndarray
    scale: float
    layer_mean: np.ndarray
    untouched: np.ndarray
    untouched_tokens: list[str]
    difference: np.ndarray
    num_layers: int
    num_heads: int
    sentence: str
    note: str


def run(params: Params, job: Job) -> Result:
    """Take the head's queries, keys and values from the trace and compute its stages with `engine.attention`.

    A change to this head alone does not touch what it reads, so no new pass is needed; a change everywhere, or a
    dropped token, is a new pass through the whole model.
    """
    from engine.attention import attention_stages

    model, all_ids = _attention.read(params, job)
    original = _attention.trace(model, params.weights, all_ids)
    num_layers, num_heads = original.attention.shape[:2]
    _attention.check_head(params, num_layers, num_heads, len(all_ids))
    layer, head = params.layer, params.head
    ids = _attention.without(all_ids, params.drop)
    base = _attention.trace(model, params.weights, ids)
    everywhere = params.changes_attention and params.reach == "every head"
    seen = _attention.changed_trace(model, params, ids) if everywhere else base
    group = head // (num_heads // seen.keys.shape[1])
    query, key, value = seen.queries[layer, head], seen.keys[layer, group], seen.values[layer, group]  # (T, d) each
    stages = attention_stages(
        query[None],
        key[None],
        value[None],
        _attention.mask_matrix(params, base, layer),
        scale=seen.scales[layer],
        temperature=params.temperature,
    )
    scores, scaled, masked, weights, output = (stage[0].float().cpu().numpy() for stage in stages)
    in_layer = seen.attention[layer].float().cpu().numpy()  # (H, T, T)
    layer_mean = in_layer.mean(0) + (weights - in_layer[head]) / num_heads
    untouched = original.attention[layer, head].float().cpu().numpy()
    return Result(
        tokens=seen.tokens,
        query=query.float().cpu().numpy(),
        key=key.float().cpu().numpy(),
        value=value.float().cpu().numpy(),
        scores=scores,
        scaled=scaled,
        masked=masked,
        weights=weights,
        output=output,
        scale=seen.scales[layer],
        layer_mean=layer_mean,
        untouched=untouched,
        untouched_tokens=original.tokens,
        difference=_difference(weights, untouched, params.drop),
        num_layers=num_layers,
        num_heads=num_heads,
        sentence=describe(weights, seen.tokens, f"Head {layer}.{head}"),
        note=_attention.note(params, len(ids)),
    )


def _difference(weights: np.ndarray, untouched: np.ndarray, drop: int) -> np.ndarray:
    """`weights` laid over `untouched`, NaN where the dropped token has no counterpart."""
    kept = np.delete(np.arange(len(untouched)), [drop] if drop >= 0 else [])
    difference = np.full_like(untouched, np.nan)
    difference[np.ix_(kept, kept)] = weights - untouched[np.ix_(kept, kept)]
    return difference


def describe(weights: np.ndarray, tokens: list[str], name: str) -> str:
    """What a head does on this text, from its weights (T, T): where most of its mass goes, and the last token."""
    length = len(tokens)
    if length == 1:
        return f"{name} has one token to look at, and looks at it."
    rows = weights[1:]  # the first query of a causal model has no choice
    index = np.arange(1, length)
    patterns = {
        "on the previous token": rows[index - 1, index - 1].mean(),
        f"on the first token, “{tokens[0]}”": rows[:, 0].mean(),
        "on the token itself": rows[index - 1, index].mean(),
    }
    where, share = max(patterns.items(), key=lambda item: item[1])
    if share >= 0.4:
        first = f"{name} puts {share:.0%} of its mass {where}."
    else:
        entropy = -(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1).mean()
        first = f"{name} spreads its attention over about {np.exp(entropy):.1f} tokens."
    best = int(weights[-1].argmax())
    if weights[-1, best] == 0:
        return f"{first} The last token, “{tokens[-1]}”, may look at nothing."
    return f"{first} The last token, “{tokens[-1]}”, looks most at “{tokens[best]}” ({weights[-1, best]:.0%})."
