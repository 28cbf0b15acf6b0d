"""A training run: what it is set to, where it is, what it says about each step, and how it goes wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from engine.errors import WorkbenchError
from engine.settings import Settings

Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["AdamW", "paged AdamW"]

Evaluation = tuple[int, float]
"""The step after which, and the mean next-token loss on the held-out blocks, in nats a token."""


class TrainerOptions(Settings):
    """How to train.

    Raises:
        InputError: a value is out of bounds.
    """

    learning_rate: float = Field(1e-3, gt=0, le=100, description="The highest one, after the warm-up.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the run in which the rate rises to its highest.")
    final_rate: float = Field(0.1, ge=0, le=1, description="Share of the highest rate that is left at the end.")
    batch_size: int = Field(32, ge=1, description="B, samples computed at once, by all processes together.")
    optimizer: Optimizer = Field("AdamW", description="The paged one keeps its state where the GPU's memory is not.")
    accumulate: int = Field(1, ge=1, description="Batches whose gradients make one step.")
    weight_decay: float = Field(0.1, ge=0, lt=10, description="Of the matrices; gains and biases have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are shortened to this norm.")
    precision: Precision = Field(
        "float32", description="bfloat16 computes in it where that is safe (autocast); weights stay float32."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory for a second forward pass.")
    compile: bool = Field(False, description="Let torch.compile fuse the computation; the first step takes longer.")
    seed: int = Field(0, ge=0, lt=2**30, description="Of the samples' order, of dropout and of random samples.")
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps from one evaluation to the next; the last step has one too. None for none."
    )
    patience: int | None = Field(
        None, ge=1, description="Evaluations without a lower loss that end the run; None for going on regardless."
    )

    @model_validator(mode="after")
    def _check_patience(self) -> Self:
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError(f"patience is {self.patience} evaluations, and there are none: set evaluate_every.")
        return self


class RunFacts(Settings):
    """What a checkpoint says about its run besides the tensors."""

    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    options: TrainerOptions
    samples: int
    block_size: int
    data: str = Field(description="Fingerprint of a few samples.")
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def has_best(self) -> bool:
        """Whether the run keeps the weights of its best evaluation."""
        return self.options.patience is not None and since_best(self.evaluations) < len(self.evaluations)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step == self.total_steps or out_of_patience(self.evaluations, self.options)

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.step > self.total_steps:
            raise ValueError(f"step is {self.step}: it must be at most total_steps, which is {self.total_steps}.")
        return self


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Args:
        step: steps done, from 1 to `total`.
        total: steps of the run.
        loss: mean cross-entropy of the step's samples before its update, in nats a token.
        learning_rate: of this step.
        grad_norm: before clipping.
        tokens_per_second: of this step, by all processes; filling after a sample's last scored token is not counted.
        memory_bytes: on CUDA the allocator's peak so far, on the CPU what the process holds now; of this process.
        held_out_loss: mean next-token loss on the held-out blocks after the step, where it was evaluated.
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: int
    held_out_loss: float | None = None


class DivergedError(WorkbenchError):
    """Training went wrong at a step; the message names it, and so does `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def since_best(evaluations: Sequence[Evaluation]) -> int:
    """How many evaluations there were since the lowest loss, the first of equals; all of them if none is a number."""
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in evaluations]
    lowest = min(losses, default=math.inf)
    return len(losses) - (losses.index(lowest) + 1 if lowest < math.inf else 0)


def out_of_patience(evaluations: Sequence[Evaluation], options: TrainerOptions) -> bool:
    """Whether so many evaluations as `options.patience` says, the last ones, were no better than one before."""
    return options.patience is not None and since_best(evaluations) >= options.patience
