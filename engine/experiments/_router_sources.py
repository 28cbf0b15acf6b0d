"""Who gets what: assignments of a text's sources and tokens to experts, and what an expert's tokens have in common.

Needs no torch.

Legend: A assignments, J sources, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_TYPICAL = 6
FEWEST_TYPICAL = 3
"""A token that occurs less often is typical of no expert: that could be chance."""

_SHUFFLES = 20


class TypicalToken(NamedTuple):
    """A token that an expert gets more often than its share.

    Args:
        label: printable.
        count: how often the expert gets it.
        share: of the token's occurrences in the text; 1 if it always goes to the expert, however many experts compute
            a token.
    """

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class Typical:
    """What one expert gets.

    Args:
        expert: its index.
        load: share of all assignments.
        source: index of the source that most of its tokens are from; −1 if it gets none.
        purity: share of its tokens that are from there.
        tokens: at most `MOST_TYPICAL`, the most typical first.
    """

    expert: int
    load: float
    source: int
    purity: float
    tokens: tuple[TypicalToken, ...]


@dataclass(frozen=True)
class Specialisation:
    """How much an expert says about the source of its tokens.

    Args:
        counts: (J, E) assignments of each source to each expert.
        raw: mutual information Σ p(j, e) ln(p(j, e) / (p(j)·p(e))) of the counts, in nats.
        chance: the mean of the same over random shuffles of the tokens' sources; few tokens alone give more than 0.
        available: entropy of the sources in nats, the most there is to say.
    """

    counts: np.ndarray
    raw: float
    chance: float
    available: float

    @property
    def excess(self) -> float:
        """Beyond chance, in nats; never below 0."""
        return max(0.0, self.raw - self.chance)


def specialise(
    token_source: np.ndarray, tokens: np.ndarray, experts: np.ndarray, num_sources: int, num_experts: int, seed: int = 0
) -> Specialisation:
    """How far the experts go by source.

    Args:
        token_source: (N,), index of the source of each token.
        tokens, experts: (A,) each, the assignments.
        num_sources, num_experts: J, E.
        seed: of the shuffles, in which the assignments of a token stay together.
    """
    counts = count_pairs(token_source[tokens], experts, num_sources, num_experts)
    generator = np.random.default_rng(seed)
    shuffled = [
        mutual_information(count_pairs(generator.permutation(token_source)[tokens], experts, num_sources, num_experts))
        for _ in range(_SHUFFLES)
    ]
    return Specialisation(
        counts, mutual_information(counts), float(np.mean(shuffled)), entropy(np.bincount(token_source))
    )


def count_pairs(rows: np.ndarray, columns: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    """How often each pair occurs, (num_rows, num_columns)."""
    flat = np.bincount(rows * num_columns + columns, minlength=num_rows * num_columns)
    return flat.reshape(num_rows, num_columns)


def entropy(counts: np.ndarray) -> float:
    """−Σ p ln p of p = counts / Σ counts, in nats; 0 if there are none."""
    used = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(used * np.log(used)).sum()) + 0.0


def mutual_information(counts: np.ndarray) -> float:
    """Σ p ln(p / (p_row·p_column)) of a table of counts, in nats: H(rows) + H(columns) − H(both)."""
    return max(0.0, entropy(counts.sum(1)) + entropy(counts.sum(0)) - entropy(counts.ravel()))


def find_typical(
    labels: list[str], token_source: np.ndarray, tokens: np.ndarray, experts: np.ndarray, num_experts: int
) -> tuple[Typical, ...]:
    """What each expert gets, and which tokens it gets more often than its load explains and than a fair share.

    A fair share of a token is A / (N·E). An expert with a small load can exceed that load with next to nothing of the
    token, which is typical of nobody then.
    Tokens that occur at least `FEWEST_TYPICAL` times are ranked by what they add to the mutual information of token and
    expert, n·ln(n·A / (n_token·n_expert)).

    Args:
        labels: of the N tokens.
        token_source: (N,).
        tokens, experts: (A,) each.
        num_experts: E.
    """
    names, kind, occurrences = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    counts = count_pairs(kind[tokens], experts, len(names), num_experts)  # (kinds of token, E)
    sources = count_pairs(token_source[tokens], experts, int(token_source.max()) + 1, num_experts)  # (J, E)
    total = max(counts.sum(), 1)
    fair = total / (len(labels) * num_experts)
    found = []
    for expert in range(num_experts):
        own, mine = counts[:, expert], counts[:, expert].sum()
        everywhere = counts.sum(1)
        some = np.flatnonzero((own > 0) & (occurrences >= FEWEST_TYPICAL))
        lift = own[some] * total / (everywhere[some] * mine) if mine else np.zeros(0)
        order = np.argsort(-own[some] * np.log(lift), kind="stable") if mine else []
        enough = (lift > 1) & (own[some] > fair * occurrences[some])
        best = [some[place] for place in order if enough[place]]
        found.append(
            Typical(
                expert=expert,
                load=float(mine / total),
                source=int(sources[:, expert].argmax()) if mine else -1,
                purity=float(sources[:, expert].max() / mine) if mine else 0.0,
                tokens=tuple(
                    TypicalToken(str(names[index]), int(own[index]), float(own[index] / occurrences[index]))
                    for index in best[:MOST_TYPICAL]
                ),
            )
        )
    return tuple(found)


def describe_information(found: Specialisation, num_sources: int, num_experts: int) -> str:
    """What expert and source have in common, in a sentence."""
    if num_experts == 1:
        return "With one expert there is nothing to specialise on."
    if num_sources == 1:
        return "There is one source, so there is nothing to tell apart."
    if not found.counts.sum():
        return "No token reaches an expert, so there is nothing to tell apart."
    if found.excess < 0.005:
        return (
            f"Which expert a token goes to says no more about its source than chance does ({found.raw:.2f} nats, "
            f"shuffled {found.chance:.2f})."
        )
    shuffled = round(found.raw, 2) - round(found.excess, 2)  # so that the figures add up as they are shown
    return (
        f"Which expert a token goes to says {found.excess:.2f} nats about its source beyond what chance gives "
        f"({found.raw:.2f} as counted, {shuffled:.2f} with shuffled sources), of {found.available:.2f} that there are "
        "to say (the entropy of the sources, each by its number of tokens)."
    )


def list_experts(indices: tuple[int, ...]) -> str:
    """``"expert 3"``, ``"experts 1 and 4"``, ``"experts 0, 2 and 5"``; at most five are named."""
    names = [str(index) for index in indices]
    if len(names) == 1:
        return f"expert {names[0]}"
    if len(names) > 5:
        return f"experts {', '.join(names[:4])} and {len(names) - 4} more"
    return f"experts {', '.join(names[:-1])} and {names[-1]}"
