"""The arithmetic of one cell of an attention map, with its numbers filled in."""

from __future__ import annotations

import numpy as np

from engine.experiments.attention_head import Result
from ui.prose import plain

_TERMS = 3


def arithmetic(found: Result, query: int, key: int, temperature: float) -> str:
    """How the weight that `query` gives `key` comes about, as Markdown with formulas.

    Args:
        found: the head.
        query: position of the token that looks.
        key: position of the token that is looked at.
        temperature: the one that the head was computed with.
    """
    q, k = found.query[query], found.key[key]
    score, scaled = found.scores[query, key], found.scaled[query, key]
    terms = " + ".join(f"({a:.2f})({b:.2f})" for a, b in zip(q[:_TERMS], k[:_TERMS], strict=True))
    divided = "" if temperature == 1 else rf"\,/\,{temperature:g}"
    lines = [
        f"How much does “{plain(found.tokens[query])}” look at “{plain(found.tokens[key])}”?",
        rf"$q\cdot k = {terms} + \dots = {score:.2f}$ ({len(q)} terms)",
        rf"$s = {score:.2f}\times{found.scale:.3g}{divided} = {scaled:.2f}$",
    ]
    row = found.masked[query]
    if np.isneginf(row[key]):
        lines.append(r"The mask forbids this key: $s$ becomes $-\infty$, and the weight is exactly $0$.")
    else:
        top = row.max()
        own, total = np.exp(row[key] - top), np.exp(row - top).sum()
        lines.append(
            rf"$w = \dfrac{{e^{{s - {_signed(top)}}}}}{{\sum_j e^{{s_j - {_signed(top)}}}}}"
            rf" = \dfrac{{{_number(own)}}}{{{_number(total)}}} = {found.weights[query, key]:.1%}$".replace("%", r"\%")
        )
        lines.append(
            f"{top:.2f} is the row's largest score: taken off everywhere, it changes nothing and no power overflows."
        )
    return "\n\n".join(lines)


def _number(value: float) -> str:
    """Four digits, with a power of ten where the number is small."""
    if value >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return rf"{mantissa}\times 10^{{{int(exponent)}}}"


def _signed(value: float) -> str:
    return f"{value:.2f}" if value >= 0 else f"({value:.2f})"
