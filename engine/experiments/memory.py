"""Where the memory of training goes, and what fits a card: arithmetic, for models of any size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from engine.experiments._memory import CONTEXTS, PlanParams
from engine.memory_budget import GB, Moment, budget, largest
from engine.training_plan import Method, Plan, Weights

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

LENGTHS = tuple(2**power for power in range(7, 18))
"""For which the largest batch is told."""


class Params(PlanParams):
    """A plan, and the card that it is to fit."""

    card: int = Field(
        24, ge=8, le=141, title="Memory of the card", description="GB of 10⁹ bytes. A card sold as 24 GB has 25.8."
    )


@dataclass(frozen=True)
class Way:
    """One way to use the model, and its memory.

    Args:
        name: what it is called, e.g. ``"QLoRA"``.
        method, weights: what is trained, beside what.
        peak: when most is held, and what.
        paged_bytes: of optimizer state that need not be on the card; not in the peak.
        largest_batch: that fits the card at this length; 0 if none does.
        largest_length: that fits at this batch, in tokens; the model may read fewer.
        fits: whether it fits as it is.
    """

    name: str
    method: Method
    weights: Weights
    peak: Moment
    paged_bytes: int
    largest_batch: int
    largest_length: int
    fits: bool


@dataclass(frozen=True)
class Room:
    """The largest batches of one way to train, by length.

    Args:
        name: of the way.
        checkpointing: whether blocks are computed again.
        batches: for each of `LENGTHS`; 0 where not one text fits.
    """

    name: str
    checkpointing: bool
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """The memory of every way, side by side.

    Args:
        card_bytes: of the card.
        ways: full fine-tuning, LoRA, LoRA on the chosen weights if they are others, and generation.
        chosen: which of them the settings are, as an index.
        moments: of a step of that one, in the order of time.
        rooms: what fits, with and without checkpointing, for every way that trains.
        context: tokens that the model reads at most, whatever the card has room for.
        sentence: which of them fit, and which part is largest.
    """

    card_bytes: int
    ways: tuple[Way, ...]
    chosen: int
    moments: tuple[Moment, ...]
    rooms: tuple[Room, ...]
    context: int
    sentence: str


def run(params: Params, job: Job) -> Result:
    """The arithmetic of `engine.memory_budget`; nothing is built, the device plays no part."""
    return compute(params)


def compute(params: Params) -> Result:
    """What `run` gives, at once."""
    card = params.card * GB
    plans = _plans(params)
    ways = tuple(_way(name, plan, card) for name, plan in plans.items())
    method, weights = params.method, params.trainable_weights if params.method != "LoRA" else params.weights
    chosen = next(index for index, way in enumerate(ways) if (way.method, way.weights) == (method, weights))
    rooms = tuple(
        Room(name, checkpointing, _batches(dataclasses.replace(plan, checkpointing=checkpointing), card))
        for name, plan in plans.items()
        if plan.method != "generation"
        for checkpointing in (False, True)
    )
    moments = budget(params.plan()).moments
    return Result(card, ways, chosen, moments, rooms, CONTEXTS[params.shape], _sentence(ways, chosen, params.card))


def _plans(params: Params) -> dict[str, Plan]:
    whole = params.trainable_weights
    plans = {
        "full fine-tuning": params.plan("full fine-tuning"),
        "LoRA": params.plan("LoRA", whole),
    }
    if params.weights != whole:
        plans["LoRA, 8-bit" if params.weights == "int8" else "QLoRA"] = params.plan("LoRA")
    return plans | {"generating": params.plan("generation")}


def _way(name: str, plan: Plan, card: int) -> Way:
    made = budget(plan)
    return Way(
        name,
        plan.method,
        plan.weights,
        made.peak,
        made.paged,
        largest(plan, card, "batch"),
        largest(plan, card, "length"),
        made.peak.total <= card,
    )


def _batches(plan: Plan, card: int) -> tuple[int, ...]:
    return tuple(largest(dataclasses.replace(plan, length=length), card, "batch") for length in LENGTHS)


def _sentence(ways: tuple[Way, ...], chosen: int, card: int) -> str:
    peaks = ", ".join(f"{way.name} {_number(way.peak.total / GB)}" for way in ways)
    fitting = [way.name for way in ways if way.fits]
    which = " and ".join([", ".join(fitting[:-1]), fitting[-1]] if len(fitting) > 1 else fitting)
    said = {0: "None of them fits", len(ways): "All of them fit"}.get(
        len(fitting), f"{which} {'fits' if len(fitting) == 1 else 'fit'}"
    )
    way = ways[chosen]
    part, size = max(way.peak.parts.items(), key=lambda item: item[1])
    return (
        f"At their peak, in GB: {peaks}. {said[0].upper()}{said[1:]} a card of {card} GB. Of {way.name}, as chosen "
        f"here, {part} {'take' if part.endswith('s') else 'takes'} most: {_number(size / GB)} GB, "
        f"{size / way.peak.total:.0%} of all that is held at the fullest moment, {way.peak.name}."
    )


def _number(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{number:.2f}"
