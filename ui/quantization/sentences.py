"""What the pictures of the quantization lab show, in words made from their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from engine.experiments import (
    _lora,
    _quantization,
    _quantization_perplexity,
    quantization,
    quantization_model,
    quantization_rates,
    quantization_sensitivity,
)

perplexity = _quantization_perplexity.in_words
_SAME = 0.005  # relative: closer perplexities are called the same
_FEWEST_BLOCKS = 8  # of fewer, two standard errors are passed by chance more often than once in ten
_ERRORS = 2


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """Each kind of layers by as few of its last parts as tell it from the others.

    ``["self_attn.q_proj", "attention.output.dense", "intermediate.dense"]`` → ``["q_proj", "output.dense",
    "intermediate.dense"]``
    """
    parts = [kind.split(".") for kind in kinds]
    return [
        ".".join(
            next(
                own[-count:]
                for count in range(1, len(own) + 1)
                if count == len(own) or sum(other[-count:] == own[-count:] for other in parts) == 1
            )
        )
        for own in parts
    ]


def layer_label(block: str, kind: str) -> str:
    """A layer in a few words, from its place in a map: ``"layer 3, q_proj"``, ``"encoder 3, fc1"``, ``"lm_head"``."""
    if block == "outside":
        return kind
    return f"layer {block}, {kind}" if block.isdecimal() else f"{block}, {kind}"


def decibels(value: float) -> str:
    """A ratio in dB with a true minus sign, e.g. ``"20.4 dB"``; ``"exact"`` where nothing was lost."""
    if math.isinf(value):
        return "exact" if value > 0 else "nothing left"
    return f"{value:.1f} dB".replace("-", "−")


def errors_sentence(found: quantization.Result) -> str:
    """How wrong the weights are, in words."""
    lost = found.distortion
    if lost.mse == 0:
        return "No weight changed: each of them is a level already."
    rms = math.sqrt(lost.mse)
    words = f"The typical error is {rms:.2g}"
    if found.standard_deviation > 0:
        words += f", {rms / found.standard_deviation:.1%} of the weights' standard deviation"
    return f"{words}; the largest is {lost.max:.2g}, {lost.max / rms:.1f} times as large."


def outliers_sentence(found: quantization.Result, params: quantization.Params) -> str:
    """How much of the signal the outliers are, and what became of the others; empty where none were drawn.

    The outliers' part of the weights' sum of squares is k·s² / (N·σ²): k of the N weights have the magnitude s, σ is
    the standard deviation of all. The others alone are 10·lg(1 − part) dB nearer to the error.
    """
    count = round(found.count * params.outliers / 100) if params.source == "normal with outliers" else 0
    if count == 0:
        return ""
    share = min(1.0, count * params.outlier_size**2 / (found.count * found.standard_deviation**2))
    rest = found.distortion.sqnr_db + 10 * math.log10(max(1 - share, 1e-30))
    return (
        f"The {count:,} outliers are {share:.0%} of that signal, and larger ones raise it: the signal of the other "
        f"weights alone is {decibels(rest)} above the same error."
    )


def size_sentence(nbytes: int, original_nbytes: int) -> str:
    """That the scales cost more than the codes save; empty where they do not."""
    if nbytes <= original_nbytes:
        return ""
    return f"This is larger than no quantization: {nbytes / original_nbytes:.0%} of bfloat16, for the scales count."


def strip_sentence(found: quantization.Result, noun: str) -> str:
    """How unevenly the error lies on the blocks, in words."""
    middle, most = found.median_error, float(found.block_errors.max())
    words = f"{found.num_blocks:,} {noun}s, each with a scale of its own"
    if found.padded:
        zeros = f"{found.padded:,} zero{'s' * (found.padded > 1)}"
        words += f" (while it is quantized the last one is filled up with {zeros}, which cost no bits)"
    if most == 0:
        return f"{words}: none of them has an error."
    if middle == 0:
        return f"{words}: the worst has a typical error of {most:.2g}, half of them or more have none."
    return f"{words}: the worst has {most / middle:.1f} times the error of the median one."


def rates_sentence(found: quantization_rates.Result) -> str:
    """What the picture of all data types shows, in words."""
    return f"{found.sentence} {found.bound_note}".strip()


def chance_sentence(found: quantization_sensitivity.Result) -> str:
    """How many layers change the perplexity by more than the text explains, in words.

    Every layer's change is measured on the same blocks of text. Where blocks disagree about it by so much that its mean
    is within two standard errors of 0, another text of the kind may give it the other sign.
    """
    parts, total = found.parts, len(found.parts)
    finite = [part for part in parts if math.isfinite(part.increase)]
    if not finite:
        return f"None of the {total} layers leaves a finite perplexity: all are blank."
    unchanged = sum(part.increase == 0 for part in finite)
    raised, lowered = (sum(sign * part.increase > 0 for part in finite) for sign in (1, -1))
    words = f"Of {total} layers {raised} raise the perplexity (blue), {lowered} lower it (orange)"
    if unchanged:
        words += f", {unchanged} leave it as it is"
    if total > len(finite):
        words += f", {total - len(finite)} leave no finite perplexity (blank)"
    if found.text_blocks < _FEWEST_BLOCKS:
        blocks = "one block" if found.text_blocks == 1 else f"{found.text_blocks} blocks"
        return (
            f"{words}. The text has {blocks}, too few to tell a layer's harm from the chance of the text: "
            f"{_FEWEST_BLOCKS} can."
        )
    hurt, helped = (sum(sign * part.increase > _ERRORS * part.error for part in finite) for sign in (1, -1))
    return (
        f"{words}. By more than {_ERRORS} standard errors, which are how much the {found.text_blocks} blocks of the "
        f"text disagree: {hurt} raise it, {helped} lower it. Of the others another text may say the opposite."
    )


def guessing_sentence(found: quantization_model.Result, model: str) -> str:
    """That a perplexity above the size of the vocabulary is worse than guessing; empty where there is none."""
    if model not in get_args(_lora.ModelName):
        return ""
    tokens = _lora.shape_of(model).vocab_size
    if not any(point.perplexity > tokens for point in found.points):
        return ""
    return f"Above {tokens:,}, the tokens of the vocabulary, a perplexity is worse than guessing among all of them."


def two_bits_sentence(found: quantization_model.Result) -> str:
    """What to make of it if the All types view ranks the data types the other way round at the fewest bits."""
    fewest = {point.data_type for point in found.points if point.bits == _quantization.MIN_BITS}
    if not {"Integer", "NormalFloat"} <= fewest:
        return ""
    return (
        f"All types may rank them the other way round at {_quantization.MIN_BITS} bits: it measures the error of the "
        "weights, which is not what the model loses."
    )


def change(before: float, after: float) -> str:
    """How a perplexity changed, in words."""
    if not math.isfinite(before):
        return "has nothing to be compared with"
    if not math.isfinite(after):
        return "is beyond counting"
    part = after / before - 1
    if abs(part) < _SAME:
        return "stays the same"
    if part < 0:
        return f"falls by {-part:.1%}"
    return f"rises by {part:.1%}" if part < 1 else f"is {after / before:.3g} times as high"
