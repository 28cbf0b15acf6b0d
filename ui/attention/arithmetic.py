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
            rf" = \dfrac{{{own:.3g}}}{{{total:.3g}}} = {found.weights[query, key]:.1%}$".replace("%", r"\%")
        )
    return "\n\n".join(lines)


def _signed(value: float) -> str:
    return f"{value:.2f}" if value >= 0 else f"({value:.2f})"
