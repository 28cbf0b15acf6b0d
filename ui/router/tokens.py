"""A text whose tokens are coloured by their experts, as HTML: it wraps, can be selected, and is read aloud as text."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from ui import theme
from ui.charts.router import colour
from ui.prose import plain

_NAMED = 3  # experts named below a token; expert choice can give it many more
_TINT = 0.26
_STYLE = """<style>
.router-text { line-height: 1.15; margin: 0 0 0.6rem; overflow-wrap: anywhere; }
.router-text .token { display: inline-block; vertical-align: top; margin: 0 1px 3px; padding: 1px 3px 0;
  border-radius: 3px; text-align: center; white-space: pre; }
.router-text .word { display: block; font-size: 0.95rem; padding-bottom: 2px; }
.router-text .who { display: block; font-size: 0.69rem; padding: 1px 0; }
.router-text s { text-decoration-thickness: 2px; }
</style>"""


def by_expert(
    tokens: Sequence[str],
    starts: Sequence[int],
    experts: np.ndarray,
    gates: np.ndarray,
    refused: np.ndarray,
    *,
    mode: theme.Mode,
) -> str:
    """Every token on the tint of its first expert, above a bar in the colours of all of its experts, by their gates.

    Args:
        tokens: N labels.
        starts: index of the first token of each source, which begins a paragraph.
        experts: (N, K) int, the largest gate first, −1 where there is none.
        gates: (N, E).
        refused: (N,) bool; these tokens are struck out.
        mode: light or dark.
    """
    surface = theme.SURFACES[mode]
    parts: list[str] = []
    for place, token in enumerate(tokens):
        if place in starts:
            parts.append("</p><p class='router-text'>" if parts else "<p class='router-text'>")
        own = [int(expert) for expert in experts[place] if expert >= 0]
        word = html.escape(token)
        word = f"<s>{word}</s>" if refused[place] else word
        who = "·".join(str(expert) for expert in own[:_NAMED]) + ("+" if len(own) > _NAMED else "") if own else "none"
        back = _mix(colour(own[0], mode), surface.paper) if own else surface.paper
        bar = _bar([(colour(expert, mode), gates[place, expert]) for expert in own] or [(surface.muted, 1.0)])
        parts.append(
            f"<span class='token' style='background:{back};color:{surface.ink}'>"
            f"<span class='word' style='border-bottom:4px solid;border-image:{bar} 1'>{word}</span>"
            f"<span class='who'>{who}</span></span>"
        )
    return f"{_STYLE}{''.join(parts)}</p>"


def around(tokens: Sequence[str], position: int, reach: int = 12) -> str:
    """The tokens around the followed one, which is marked, as Markdown's badge."""
    first, last = max(0, position - reach), min(len(tokens), position + reach + 1)
    shown = [
        f":primary-badge[{plain(tokens[place])}]" if place == position else plain(tokens[place])
        for place in range(first, last)
    ]
    return ("… " if first else "") + " ".join(shown) + (" …" if last < len(tokens) else "")


def _bar(shares: Sequence[tuple[str, float]]) -> str:
    """A gradient with sharp edges, each colour as wide as its share."""
    total = sum(max(share, 1e-9) for _, share in shares)
    stops, place = [], 0.0
    for tint, share in shares:
        after = place + 100 * max(share, 1e-9) / total
        stops.append(f"{tint} {place:.1f}% {after:.1f}%")
        place = after
    return f"linear-gradient(to right, {', '.join(stops)})"


def _mix(tint: str, paper: str) -> str:
    """`tint` thinned with the page's colour, so that ink on it stays readable."""
    channels = [
        round(_TINT * int(tint[place : place + 2], 16) + (1 - _TINT) * int(paper[place : place + 2], 16))
        for place in (1, 3, 5)
    ]
    return "#" + "".join(f"{channel:02X}" for channel in channels)
