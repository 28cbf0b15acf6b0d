"""What the pictures of the quantization lab show, in words made from their numbers."""

from __future__ import annotations

import math
import re

import numpy as np

from engine.experiments import quantization, quantization_rates

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
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


def perplexity(value: float) -> str:
    """A perplexity to four digits, large ones to three: ``"5.277"``, ``"42,000"``."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.4g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


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
