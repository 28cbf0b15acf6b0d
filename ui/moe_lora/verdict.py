"""What a run answers: who gets most questions right, and whether the experts are told apart by task."""

from __future__ import annotations

import math

from engine.experiments import moe_lora
from engine.experiments._moe_lora import read_tasks

_LATE = 2
"""Checkups before the last one, a quarter of a run of eight, over which a curve is asked whether it still rises."""
_FAINT, _CLEAR = 0.2, 0.6
"""Shares of the task told: below the first experts are hardly told apart by task, from the second on clearly."""

TOLD = (
    "“Of the task told” is the mutual information of expert and task over the entropy of the task: 0% if tokens of "
    "every task go to the experts alike, 100% if the expert gives the task away."
)


def asked() -> int:
    """Questions that are never trained on, of all tasks."""
    return sum(len(task.held_out) for task in read_tasks())


def right_answers(leg: moe_lora.Run, checkup: int = -1) -> int:
    """How many of them a run answers exactly at one of its checkups."""
    return round(leg.mean_accuracy[checkup] * asked())


def standard_error(right: int, of: int) -> float:
    """What chance leaves open in so many right answers: √(n·p·(1 − p)), binomial.

    p = (right + 1) / (n + 2), the rule of succession, so that a count of 0 or of all is not taken for certain.

    Args:
        right: answers.
        of: n, the questions.
    """
    p = (right + 1) / (of + 2)
    return math.sqrt(of * p * (1 - p))


def winner_sentence(found: moe_lora.Result) -> str:
    """Who answers most after how many steps, of three finished runs."""
    ranked = sorted(found.runs, key=right_answers, reverse=True)
    most, of = right_answers(ranked[0]), asked()
    counts = [f"{leg.role} {right_answers(leg)} ± {standard_error(right_answers(leg), of):.0f}" for leg in ranked]
    first = [leg.role for leg in ranked if right_answers(leg) == most]
    who = f"{first[0]} has the most" if len(first) == 1 else f"{' and '.join(first)} have equally many, the most"
    return f"After {found.steps} steps {who} right answers to the {of} questions: {'; '.join(counts)}."


def doubts(found: moe_lora.Result) -> str:
    """How far three finished runs carry: chance, curves that still rise, the other measure, the seed."""
    return " ".join((_chance(found), _convergence(found), _by_loss(found), "It is one seed."))


def _chance(found: moe_lora.Result) -> str:
    mixture, *others = (right_answers(leg) for leg in found.runs)
    return (
        f"± is the standard error that {asked()} questions leave. Between the mixture and the better LoRA lie "
        f"{_decided(mixture, max(others))}; between the two LoRAs {_decided(*others)}."
    )


def _decided(one: int, other: int) -> str:
    """How far two counts are apart, and whether chance can make as much."""
    between = abs(one - other)
    margin = 2 * math.hypot(*(standard_error(right, asked()) for right in (one, other)))
    decided = "more than chance explains" if between > margin else "no more than chance can make"
    return f"{between}, {decided} (two standard errors of a difference: {margin:.0f})"


def _convergence(found: moe_lora.Result) -> str:
    gains = []
    for leg in found.runs:
        early = max(0, len(leg.checked) - 1 - _LATE)
        gains.append((leg.role, int(leg.checked[early]), right_answers(leg) - right_answers(leg, early)))
    since = gains[0][1]
    rising = [f"{role} by {gain}" for role, _, gain in gains if gain > 0]
    if rising:
        return (
            f"Since step {since} right answers still rose ({'; '.join(rising)}): not converged, and more steps may "
            "change the order."
        )
    return f"Since step {since} none of the three has gained a right answer."


def _by_loss(found: moe_lora.Result) -> str:
    by_right = [right_answers(leg) for leg in sorted(found.runs, key=lambda leg: leg.mean_loss[-1])]
    ranked = sorted(found.runs, key=lambda leg: leg.mean_loss[-1])
    losses = "; ".join(f"{leg.role} {leg.mean_loss[-1]:.2f}" for leg in ranked)
    if by_right == sorted(by_right, reverse=True):
        return f"Loss gives the same order ({losses}), which it need not."
    return (
        f"Loss, lowest first, gives another order ({losses}): it counts how sure the model is of every token, "
        "while a right answer needs each to come first, however narrowly."
    )


def told_sentence(found: moe_lora.Result) -> str:
    """Whether experts are told apart by task, in words; before the first step nothing can be said."""
    if found.experts == 1:
        return "There is one expert: nothing tells tasks apart."
    before, after = (float(found.information[checkup].mean()) for checkup in (0, -1))
    how = "hardly" if after < _FAINT else "partly" if after < _CLEAR else "clearly"
    return (
        f"Experts are {how} told apart by task: the expert of a token tells {after:.1%} of its task, {before:.1%} "
        f"before the first step (mean over {len(found.projections)} projections)."
    )
