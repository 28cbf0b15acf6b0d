"""Rank against quality: the same fine-tuning with one rank after the other, each point a real run."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from engine.experiments import lora
from engine.experiments._ending import Ending, stopped
from engine.experiments._part import JobPart

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


class Params(lora.TuningParams):
    """The settings of the runs, which differ in rank and, as α stays, in the update's scale s.

    `learning_rate` is the adapters'; full fine-tuning has one of its own, since what suits a small update breaks the
    weights themselves.
    """

    cacheable: ClassVar[bool] = True

    steps: int = Field(
        100,
        ge=1,
        le=2000,
        title="Steps",
        description="Updates in each run: few, to tell the ranks apart.",
    )
    ranks: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        (1, 2, 4, 8, 16, 32, 64), min_length=1, max_length=12, title="Ranks", description="One run each, from 1 to 64."
    )
    with_full: bool = Field(
        True, title="Full fine-tuning too", description="One more run, in which every weight of the model may change."
    )

    @model_validator(mode="after")
    def _check_method(self) -> Params:
        if self.method == "full fine-tuning":
            raise ValueError("Full fine-tuning has no rank to change: choose LoRA or one of its variants.")
        return self


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        rank: of its adapters; None for full fine-tuning.
        trainable: numbers that were trained.
        scaling: s of its adapters; None for full fine-tuning.
        learning_rate: the highest.
        final_loss: mean of the last tenth of its steps, in nats a token of the answers.
        accuracy: share of the training questions answered rightly at the end.
        held_out_accuracy: of the paraphrases that are never trained on.
        seconds: that it took.
        diverged: whether it stopped early because the loss or a gradient was no number any more.
    """

    rank: int | None
    trainable: int
    scaling: float | None
    learning_rate: float
    final_loss: float
    accuracy: float
    held_out_accuracy: float
    seconds: float
    diverged: bool


@dataclass(frozen=True)
class Result:
    """The runs that were made.

    Args:
        points: in the order of the ranks, full fine-tuning last.
        total: how many there are to be.
        ended, ending: whether they all are there, and why not.
        device: where they ran.
        versions: of what took part.
    """

    points: list[Point]
    total: int
    ended: Ending
    ending: str
    device: str
    versions: dict[str, str]


_KEPT = 100
"""Points in memory; the oldest go first."""

_points: OrderedDict[tuple[lora.Params, str], Point] = OrderedDict()


def run(params: Params, job: Job) -> Result:
    """Make one run after the other until the last, or a cancellation.

    Runs that are complete are kept by this process: a sweep that was cancelled, or has a rank more, goes on from them.
    """
    from engine.measure import device_name, versions

    runs = [_run_of(params, rank) for rank in params.ranks] + ([_run_of(params, None)] if params.with_full else [])
    points: list[Point] = []
    where, software = device_name(job.device), versions()

    def result(ended: Ending, ending: str) -> Result:
        return Result(list(points), len(runs), ended, ending, where, software)

    for index, tuning in enumerate(runs):
        leg = _leg(job, index, len(runs))
        if (point := _points.get((tuning, job.device))) is None:
            found = lora.run(tuning, leg)
            if found.ended in ("cancelled", "timed out"):
                ended, words = stopped(params, job)
                return result(ended, f"{words} after {len(points)} of {len(runs)} runs, which are shown.")
            point = _keep(tuning, job.device, _point(tuning, found))
        points.append(point)
        leg.report(params.steps, params.steps, loss=point.final_loss, held_out_accuracy=point.held_out_accuracy)
        job.show(lambda: result("running", f"{len(points)} of {len(runs)} runs so far."))
    return result("finished", f"All {len(runs)} runs were made.")


def _run_of(params: Params, rank: int | None) -> lora.Params:
    """The run of one point; without a rank that of full fine-tuning, at its own learning rate."""
    shared = params.model_dump(include=set(lora.TuningParams.model_fields))
    if rank is None:
        return lora.Params(**shared | {"method": "full fine-tuning", "learning_rate": None})
    return lora.Params(**shared, rank=rank)


def _keep(tuning: lora.Params, device: str, point: Point) -> Point:
    _points[tuning, device] = point
    while len(_points) > _KEPT:
        _points.popitem(last=False)
    return point


def _point(tuning: lora.Params, found: lora.Result) -> Point:
    last = found.loss[-math.ceil(len(found.loss) / 10) :]
    return Point(
        rank=None if tuning.method == "full fine-tuning" else tuning.rank,
        trainable=found.trainable,
        scaling=tuning.scaling,
        learning_rate=found.learning_rate,
        final_loss=last.mean().item(),
        accuracy=found.accuracy[-1].item(),
        held_out_accuracy=found.held_out_accuracy[-1].item(),
        seconds=found.seconds,
        diverged=found.ended == "diverged",
    )


def _leg(job: Job, index: int, runs: int) -> JobPart:
    """The job of the run `index` of `runs`: its steps are a part of the whole job's."""

    def report(step: int, total: int, **numbers: float) -> None:
        job.report(index * total + step, runs * total, **numbers, run=index + 1)

    return JobPart(job, report)
