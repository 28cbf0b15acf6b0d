"""What the pictures of the quantization lab show, in words made from their numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import get_args

import numpy as np

from engine.experiments import (
    _lora,
    _quantization,
    _quantization_perplexity,
    quantization,
    quantization_model,
    quantization_rates,
)

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
perplexity = _quantization_perplexity.in_words
_SAME = 0.005  # relative: closer perplexities are called the same


def layer_label(name: str) -> str:
    """A layer in a few words: ``"layers.3.self_attn.q_proj"`` → ``"layer 3, q_proj"``, ``"lm_head"`` as it is."""
    number = _NUMBER.search(name)
    last = name.rpartition(".")[2]
    return f"layer {number[1]}, {last}" if number else last


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
    middle, most = float(np.median(found.block_errors)), float(found.block_errors.max())
    words = f"{found.num_blocks:,} {noun}s, each with a scale of its own"
    if most == 0:
        return f"{words}: none of them has an error."
    if middle == 0:
        return f"{words}: the worst has a typical error of {most:.2g}, most have none."
    return f"{words}: the worst has {most / middle:.1f} times the error of the median one."


def rates_sentence(found: quantization_rates.Result) -> str:
    """What the picture of all data types shows, in words."""
    return f"{found.sentence} {found.bound_note}".strip()


def chance_sentence(increases: Sequence[float]) -> str:
    """How many parts of a model hurt more than chance explains, in words.

    Quantizing cannot be expected to help, so that the largest fall shows how far chance alone moves the perplexity of
    this text: a rise that is no larger may be chance as well. Where no finite perplexity is left, nothing is chance.
    """
    total, finite = len(increases), [increase for increase in increases if math.isfinite(increase)]
    blank = total - len(finite)
    if not finite:
        return f"None of the {total} layers leaves a finite perplexity: all are blank."
    lowered = sum(increase < 0 for increase in finite)
    if not lowered:
        if not blank:
            return f"Blue layers raise the perplexity: all {total}."
        return (
            f"Blue layers raise the perplexity: {len(finite)} of {total}. Clearly hurt: {blank}, left blank: "
            "no finite perplexity."
        )
    chance = -min(finite)
    hurt = sum(increase > chance for increase in finite)
    return (
        f"Orange layers lower the perplexity of this text, which is chance: {lowered} of {total}, by up to "
        f"{chance:.2%}. Blue ones that raise it by no more cannot be told from chance: "
        f"{len(finite) - lowered - hurt}. Clearly hurt: {hurt + blank}"
        + (f", {blank} of them blank: no finite perplexity." if blank else ".")
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
    if not math.isfinite(after):
        return "is beyond counting"
    part = after / before - 1
    if abs(part) < _SAME:
        return "stays the same"
    if part < 0:
        return f"falls by {-part:.1%}"
    return f"rises by {part:.1%}" if part < 1 else f"is {after / before:.3g} times as high"
