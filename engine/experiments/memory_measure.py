"""A training plan carried out on this device: the memory that was predicted beside the memory that was measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.errors import DoesNotFitError
from engine.experiments import Lane
from engine.experiments._memory import PlanParams, describe
from engine.memory_budget import GB, budget, building_bytes, optimizer_bytes, weight_bytes

if TYPE_CHECKING:
    from engine.memory_measurement import MeasuredStep
    from engine.runtime.jobs import Job
    from engine.training_plan import Plan

_MARGIN = 1.1
_SLOW = 2e13
"""FLOPs that two processor cores need some ten minutes for."""
_STEPS = 4


class Params(PlanParams):
    """A plan."""

    lane: ClassVar[Lane] = "long"
    time_limit: ClassVar[float] = 900.0
    cacheable: ClassVar[bool] = False

    def memory_bytes(self) -> int:
        """What is predicted of a step or, if that is more, of building the model, with a margin."""
        plan = self.plan()
        return round(_MARGIN * max(budget(plan).peak.total, building_bytes(plan)))


@dataclass(frozen=True)
class Compared:
    """One category.

    Args:
        name: of it.
        predicted: bytes.
        measured: bytes; None where it cannot be told from the rest.
    """

    name: str
    predicted: int
    measured: int | None

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of what was measured; None if there is nothing to compare."""
        if self.measured is None or (self.measured == 0) != (self.predicted == 0):
            return None
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class Result:
    """What a step of the plan held.

    Args:
        rows: every category, the peak last.
        when: the moment at which the peak was predicted.
        plan: in words.
        loss: of the last step before the weighing, in nats a token.
        seconds: of building and of all steps.
        how: how it was measured, in words.
        device: its name.
        versions: of the libraries.
        sentence: the peak and its error, in words.
    """

    rows: tuple[Compared, ...]
    when: str
    plan: str
    loss: float
    seconds: float
    how: str
    device: str
    versions: dict[str, str]
    sentence: str

    @property
    def peak(self) -> Compared:
        """The whole."""
        return self.rows[-1]


def run(params: Params, job: Job) -> Result:
    """Build the model with random weights, train it for a few steps on random tokens, and weigh them.

    Raises:
        DoesNotFitError: it does not fit, or would take a processor too long.
    """
    import importlib.metadata

    import torch

    from engine.measure import device_name, versions
    from engine.memory_measurement import build, measure_step

    on_cuda = job.device.startswith("cuda")
    plan = params.plan(on_cuda=on_cuda)
    _check_time(plan, on_cuda)
    began = time.monotonic()
    job.report(0, 2)
    try:
        model, optimizer = build(plan, job.device)
    except torch.cuda.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"The GPU ran out of memory while the model was built, for which {building_bytes(plan) / GB:.1f} GB were "
            "predicted: no batch is in it yet, choose a smaller shape, or end what else runs on the GPU."
        ) from error
    job.report(1, 2)
    try:
        found = measure_step(plan, model, optimizer, job.device)
    except torch.cuda.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"The GPU ran out of memory in a training step, for which {budget(plan).peak.total / GB:.1f} GB were "
            "predicted: choose a smaller shape, batch or length."
        ) from error
    job.report(2, 2)
    rows = _compare(plan, found)
    peak = rows[-1]
    how = (
        "the peak of PyTorch's CUDA allocator in the third step"
        if on_cuda
        else "the highest running sum of the allocations that PyTorch's profiler saw in the third step"
    )
    if not on_cuda and (plan.optimizer != "AdamW" or plan.weights == "int8"):
        how += "; on the CPU bitsandbytes unpacks its 8 bits in ways that are not predicted"
    software = versions() | {"bitsandbytes": importlib.metadata.version("bitsandbytes")}
    where = device_name(job.device)
    return Result(
        rows,
        budget(plan).peak.name,
        f"{params.shape}: {describe(plan)}",
        found.loss,
        time.monotonic() - began,
        how,
        where,
        software,
        f"Predicted {peak.predicted / GB:.3f} GB, measured {peak.measured / GB:.3f} on {where}: the prediction is "
        f"{abs(peak.error):.2%} {'above' if peak.error > 0 else 'below'} what was measured.",
    )


def _check_time(plan: Plan, on_cuda: bool) -> None:
    flops = 3 * _STEPS * plan.batch * plan.config.forward_flops(plan.length)
    if not on_cuda and flops > _SLOW:
        raise DoesNotFitError(
            f"Four steps of this are {flops / 1e12:,.0f} TFLOP, too many for a processor: choose a smaller model, "
            f"batch or length, {flops / _SLOW:.1f} times less in all."
        )


def _compare(plan: Plan, found: MeasuredStep) -> tuple[Compared, ...]:
    made = budget(plan)
    on_card, paged = optimizer_bytes(plan)
    return (
        Compared(
            "weights, scales, adapters", sum(weight_bytes(plan)) + made.peak.parts.get("adapters", 0), found.model
        ),
        Compared("optimizer state", on_card, found.optimizer),
        Compared("optimizer state, paged", paged, found.paged),
        Compared("gradients", made.moments[-1].parts.get("gradients", 0), found.gradients),
        Compared("saved by the forward pass", made.saved, found.saved),
        Compared("peak of a step", made.peak.total, found.peak),
    )
