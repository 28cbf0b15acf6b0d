"""The paged optimizer's run: a model that leaves no room for AdamW's state, trained with plain and with paged AdamW."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from engine.experiments import ExperimentParams, Lane
from engine.memory_budget import GB

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from engine.optim import LargeTestModel
    from engine.runtime.jobs import Job

_STEPS = 3
_NAMES = ("AdamW", "paged AdamW")


class Params(ExperimentParams):
    """How much is computed."""

    lane: ClassVar[Lane] = "long"
    time_limit: ClassVar[float] = 120.0
    cacheable: ClassVar[bool] = False

    budget: int = Field(
        24,
        ge=1,
        le=141,
        title="Budget",
        description="GB of 10⁹ bytes for weights, gradients, activations and state; half of what the GPU has free, "
        "where that is less.",
    )
    large_batch: bool = Field(False, title="Large batch", description="256 samples a step instead of 8.")


@dataclass(frozen=True)
class Attempt:
    """One optimizer on the model.

    Args:
        optimizer: its name.
        completed: whether all steps were taken.
        message: why not, as PyTorch says it; empty if they were.
        peak_bytes: that the allocator held at most, failed steps included; 0 on the CPU, where it does not count.
        paged_bytes: of the state that lies in paged memory.
        losses: of the steps that were taken.
        seconds: of all of it.
    """

    optimizer: str
    completed: bool
    message: str
    peak_bytes: int
    paged_bytes: int
    losses: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Result:
    """Both attempts, plain first.

    Args:
        attempts: in that order.
        weight_bytes: of the model; its gradients take as much, AdamW's state twice as much.
        budget_bytes: that the run allowed itself beside what its process held; 0 on the CPU, where nothing is limited.
        limit_bytes: that the allocator may hold, both together; 0 likewise.
        device: its name.
        versions: of the libraries.
        sentence: what happened, in words.
    """

    attempts: tuple[Attempt, ...]
    weight_bytes: int
    budget_bytes: int
    limit_bytes: int
    device: str
    versions: dict[str, str]
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Take three steps with each optimizer, on the same model.

    Raises:
        DoesNotFitError: the GPU has no room for the test model.
    """
    import importlib.metadata

    import torch

    from engine.measure import device_name, exclusive, versions
    from engine.optim import PagedAdamW, create_large_test_model

    with exclusive(job.device):
        model = create_large_test_model(params.budget * GB)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        device = next(model.parameters()).device
        limit = 0
        if device.type == "cuda":
            limit = round(torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1])
        attempts = []
        for number, (optimizer, make) in enumerate(zip(_NAMES, (torch.optim.AdamW, PagedAdamW), strict=True)):
            job.report(number, len(_NAMES))
            attempts.append(_attempt(optimizer, make, model, params.large_batch))
        job.report(len(_NAMES), len(_NAMES))
        name = device_name(str(device))
        sentence = _sentence(attempts, weights, model, params.budget)
        given = model.budget
        del model
        gc.collect()  # the allocator's limit goes with the model
        if limit:
            torch.cuda.empty_cache()
    software = versions() | {"bitsandbytes": importlib.metadata.version("bitsandbytes")}
    return Result(tuple(attempts), weights, given, limit, name, software, sentence)


def _attempt(name: str, make: Callable[..., torch.optim.Optimizer], model: nn.Module, large_batch: bool) -> Attempt:
    import torch

    from engine.optim import simulate_training_step

    on_cuda = next(model.parameters()).is_cuda
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    began, losses, message = time.perf_counter(), [], ""
    optimizer = make(model.parameters())
    try:
        for _ in range(_STEPS):
            losses.append(simulate_training_step(model, optimizer, large_batch))
    except torch.cuda.OutOfMemoryError as error:
        message = str(error).partition("\n")[0]
    tensors = [value for state in optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")]
    paged = sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))
    peak = torch.cuda.max_memory_allocated() if on_cuda else 0
    optimizer.zero_grad()
    optimizer.state.clear()
    return Attempt(name, not message, message, peak, paged, tuple(losses), time.perf_counter() - began)


def _sentence(attempts: list[Attempt], weights: int, model: LargeTestModel, asked: int) -> str:
    plain, paged = attempts
    if not model.budget:
        return (
            f"Nothing runs out here, with {asked} GB or any budget: there is no GPU, so that the model is a small one, "
            f"and paged AdamW is plain AdamW. Both took their {len(plain.losses)} steps."
        )
    given = f"{model.budget / GB:.2f} are allowed"
    if model.budget == asked * GB:
        given += ", the budget"
    else:
        given += f", {model.limit}, which is less than the budget of {asked} GB"
    needed = f"Weights, gradients and AdamW's state need {4 * weights / GB:.2f} GB; {given}."
    first = "Plain AdamW completed all the same" if plain.completed else "Plain AdamW ran out of memory"
    second = (
        f"paged AdamW took its {len(paged.losses)} steps with {paged.paged_bytes / GB:.2f} GB of its state paged"
        if paged.completed
        else "paged AdamW ran out as well"
    )
    return f"{needed} {first}; {second}."
