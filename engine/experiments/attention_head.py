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
        moved: share of its attention that a token gives elsewhere than before: the total variation distance between
            the rows of `weights` and `untouched`, averaged over the tokens that are left.
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
    moved: float
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
    mask = _attention.mask_matrix(params, base, layer)
    stages = attention_stages(
        query[None],
        key[None],
        value[None],
        mask,
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
        moved=_moved(weights, untouched, params.drop),
        sentence=describe(weights, seen.tokens, f"Layer {layer}, head {head}"),
        note=_attention.note(params, mask, base.masks[layer]),
    )


def _difference(weights: np.ndarray, untouched: np.ndarray, drop: int) -> np.ndarray:
    """`weights` laid over `untouched`, NaN where the dropped token has no counterpart."""
    kept = np.delete(np.arange(len(untouched)), [drop] if drop >= 0 else [])
    difference = np.full_like(untouched, np.nan)
    difference[np.ix_(kept, kept)] = weights - untouched[np.ix_(kept, kept)]
    return difference


def _moved(weights: np.ndarray, untouched: np.ndarray, drop: int) -> float:
    """½ Σ_k |after − before|, averaged over the queries that are left; a dropped token's share counts as moved."""
    before = untouched if drop < 0 else np.delete(untouched, drop, axis=0)
    after = weights if drop < 0 else np.insert(weights, drop, 0.0, axis=1)
    return float(np.abs(after - before).sum(-1).mean() / 2)


def describe(weights: np.ndarray, tokens: list[str], name: str) -> str:
    """What a head does on this text, from its weights (T, T): where most of its mass goes, and the last token."""
    length = len(tokens)
    if length == 1:
        return f"{name} has one token to look at, and looks at it."
    start = 0 if np.triu(weights, 1).any() else 1  # the first query of a causal model has no choice
    rows, index = weights[start:], np.arange(1, length)
    favourite = int(rows.mean(0).argmax())
    place = "the first token" if favourite == 0 else "the last token" if favourite == length - 1 else "one token"
    patterns = {
        "on the previous token": weights[index, index - 1].mean(),
        f"on {place}, “{tokens[favourite]}”": rows[:, favourite].mean(),
        "on the token itself": rows[np.arange(len(rows)), np.arange(start, length)].mean(),
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
