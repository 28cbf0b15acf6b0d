"""How busy a router's experts are, in figures; free of torch but for reading a `Routing`.

Legend: N tokens (padding left out), E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import InputError

if TYPE_CHECKING:
    from engine.moe.routing import Routing


@dataclass(frozen=True)
class Load:
    """What the experts have to do, and how unevenly the router decides.

    `relative`, `entropy`, `max_violation` and `dead` are of what the router wants, before capacity refuses some of it:
    capacity cuts the busiest down, so that what is left looks balanced however the router decides. Only where the
    experts choose are they of the load, for then it is what was decided. NaN if nothing is wanted at all.

    Args:
        load: tokens that each expert processes, (E,).
        wanted: tokens that chose it, those that its capacity refused included, (E,).
        relative: wanted ÷ fair share, the mean of what is wanted; 1 is fair, (E,).
        entropy: −Σ p·ln p of p = wanted / Σ wanted, in nats.
        entropy_share: entropy ÷ ln E, from 0 (one expert gets everything) to 1 (all get the same); 1 if E = 1.
        max_violation: (max − mean) / mean of what is wanted: 0 when balanced, E − 1 when one expert gets everything
            (MaxVio of https://arxiv.org/abs/2408.15664).
        dead: indices of the experts that no token wants; none if nothing is wanted.
        dropped_share: share of what is wanted that was refused; NaN if nothing is wanted.
        importance: the sum of the tokens' probabilities for each expert, (E,), or None if unknown
            (https://arxiv.org/abs/1701.06538).
        num_tokens: N, or None if unknown.
    """

    load: NDArray[np.int64]
    wanted: NDArray[np.int64]
    relative: NDArray[np.float64]
    entropy: float
    entropy_share: float
    max_violation: float
    dead: tuple[int, ...]
    dropped_share: float
    importance: NDArray[np.float64] | None = None
    num_tokens: int | None = None


def load_from_counts(
    counts: ArrayLike,
    wanted: ArrayLike | None = None,
    importance: ArrayLike | None = None,
    num_tokens: int | None = None,
    *,
    experts_choose: bool = False,
) -> Load:
    """The load of E experts from how many tokens each got.

    Args:
        counts: tokens that each expert processes, (E,), E ≥ 1.
        wanted: tokens that chose it; the same as `counts` when left out.
        importance: (E,) or None.
        num_tokens: N or None.
        experts_choose: whether the balance is that of `counts` and not of `wanted`.

    Raises:
        InputError: there is no expert, a count is negative or larger than what was wanted, or the lengths differ.
    """
    load = np.asarray(counts, dtype=np.int64)
    wanted = load if wanted is None else np.asarray(wanted, dtype=np.int64)
    if load.ndim != 1 or load.size == 0 or wanted.shape != load.shape or (load < 0).any() or (wanted < load).any():
        raise InputError(
            f"The load is {load.tolist()} of {wanted.tolist()} wanted: give one count from 0 up for each expert, "
            "and at least as many wanted."
        )
    decided, experts, asked = load if experts_choose else wanted, load.size, int(wanted.sum())
    total = int(decided.sum())
    relative = decided * experts / total if total else np.full(experts, math.nan)
    used = relative[relative != 0] / experts  # p
    entropy = float(-(used * np.log(used)).sum()) + 0.0
    return Load(
        load=load,
        wanted=wanted,
        relative=relative,
        entropy=entropy,
        entropy_share=entropy / math.log(experts) if experts > 1 else float(relative[0]),
        max_violation=float(relative.max() - 1),
        dead=tuple(np.flatnonzero(decided == 0).tolist()) if total else (),
        dropped_share=1 - int(load.sum()) / asked if asked else math.nan,
        importance=None if importance is None else np.asarray(importance, dtype=np.float64),
        num_tokens=num_tokens,
    )


def load_of(routing: Routing) -> Load:
    """The load of a routing's experts."""
    probs = routing.probs.detach()
    importance = (probs if routing.valid is None else probs[routing.valid]).double().sum(0)
    return load_from_counts(
        routing.counts.cpu().numpy(),
        routing.wanted.cpu().numpy(),
        importance.cpu().numpy(),
        routing.num_tokens,
        experts_choose=routing.indices is None,
    )
