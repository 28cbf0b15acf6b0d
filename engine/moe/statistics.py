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
    """What the experts have to do, and how unevenly.

    Args:
        load: tokens that each expert processes, (E,).
        wanted: tokens that chose it, those that its capacity refused included, (E,).
        relative: load ÷ fair share, the mean load; 1 is fair, all 1 if there is no load, (E,).
        entropy: −Σ p·ln p of p = load / Σ load, in nats; ln E without a load.
        entropy_share: entropy ÷ ln E, from 0 (one expert does everything) to 1 (all do the same); 1 if E = 1.
        max_violation: (max − mean) / mean of the load: 0 when balanced, E − 1 when one expert does everything
            (MaxVio of https://arxiv.org/abs/2408.15664).
        dead: indices of the experts without a token; none if there is no load.
        dropped_share: share of the assignments that were refused.
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
) -> Load:
    """The load of E experts from how many tokens each got.

    Args:
        counts: tokens that each expert processes, (E,), E ≥ 1.
        wanted: tokens that chose it; the same as `counts` when left out.
        importance: (E,) or None.
        num_tokens: N or None.

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
    experts, total = load.size, int(load.sum())
    relative = load * experts / total if total else np.ones(experts)
    used = relative[relative > 0] / experts  # p
    entropy = float(-(used * np.log(used)).sum()) + 0.0
    asked = int(wanted.sum())
    return Load(
        load=load,
        wanted=wanted,
        relative=relative,
        entropy=entropy,
        entropy_share=entropy / math.log(experts) if experts > 1 else 1.0,
        max_violation=float(relative.max() - 1),
        dead=tuple(np.flatnonzero(load == 0).tolist()) if total else (),
        dropped_share=1 - total / asked if asked else 0.0,
        importance=None if importance is None else np.asarray(importance, dtype=np.float64),
        num_tokens=num_tokens,
    )


def load_of(routing: Routing) -> Load:
    """The load of a routing's experts."""
    probs = routing.probs.detach()
    importance = (probs if routing.valid is None else probs[routing.valid]).double().sum(0)
    return load_from_counts(
        routing.counts.cpu().numpy(), routing.wanted.cpu().numpy(), importance.cpu().numpy(), routing.num_tokens
    )
