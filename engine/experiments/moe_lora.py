"""MoE-LoRA, live: one model learns four tasks with several adapters and picks among them, beside two plain LoRAs.

Legend: S steps, M checkups, J tasks, N adapted projections, E experts, R rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from engine.experiments import _moe_lora
from engine.experiments._ending import Ending, see_through
from engine.experiments._moe_lora import LEARNING_RATES, ROLES, TASK_NAMES, MixtureParams, Role

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

CHECKUPS = 8
"""About so many in each run, besides the one before its first step."""


class Params(MixtureParams):
    """A mixture of adapters, and how it and the LoRAs beside it learn."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 300.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        title="Learning rate",
        description="The highest one of all runs: it rises to it, then falls. Empty takes each run's own: "
        + ", ".join(f"{role} {rate:g}" for role, rate in LEARNING_RATES.items())
        + ".",
    )
    steps: int = Field(64, ge=1, le=1000, title="Steps", description="Updates in each of the three runs.")
    batch_size: int = Field(16, ge=1, le=64, title="Batch", description="Questions a step, of all tasks together.")

    def rate(self, role: Role) -> float:
        """The learning rate that is meant for a run."""
        return LEARNING_RATES[role] if self.learning_rate is None else self.learning_rate

    def memory_bytes(self) -> int:
        """What a run allocates at its peak; a checkup asks all held-out questions at once, but keeps nothing."""
        return _moe_lora.tuning_bytes(self, self.batch_size)


@dataclass(frozen=True)
class Run:
    """One of the three trainings, up to where it is.

    Args:
        role: what it is there for.
        rank: R, of each expert if there are several.
        trainable: numbers that are trained.
        flops: that the adapters add to the forward pass of one token.
        learning_rate: the highest.
        step, loss: (S,), of each step that was taken; nats a token of the answers, before the step's update.
        checked: (M,) steps after which the model was asked, 0 among them.
        task_loss: (M, J), of the questions that are never trained on, in nats a token of the answers.
        task_accuracy: (M, J), share of them that is answered exactly.
        seconds: that it took, checkups included.
    """

    role: Role
    rank: int
    trainable: int
    flops: int
    learning_rate: float
    step: np.ndarray
    loss: np.ndarray
    checked: np.ndarray
    task_loss: np.ndarray
    task_accuracy: np.ndarray
    seconds: float

    @property
    def mean_loss(self) -> np.ndarray:
        """(M,), the tasks counted alike."""
        return self.task_loss.mean(1)

    @property
    def mean_accuracy(self) -> np.ndarray:
        """(M,), the tasks counted alike."""
        return self.task_accuracy.mean(1)


@dataclass(frozen=True)
class Anatomy:
    """What the experts of the trained mixture are, and what becomes of the tasks without them.

    Args:
        spectra: (N, E, R), singular values of each expert's ΔW = s·A·B, largest first.
        similarity: (N, E, E), cosine between the experts' ΔW, ⟨ΔWₑ, ΔWₓ⟩ / (‖ΔWₑ‖·‖ΔWₓ‖); 0 where one is 0.
        loss, accuracy: (J,), of the held-out questions, with all experts.
        off_loss, off_accuracy: (E, J), with expert e of every projection switched off.
        favourite: (J, N), the expert that gets most tokens of a task.
        favourite_off_loss, favourite_off_accuracy: (J, J), with the favourites of task i switched off, of task j.
    """

    spectra: np.ndarray
    similarity: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    off_loss: np.ndarray
    off_accuracy: np.ndarray
    favourite: np.ndarray
    favourite_off_loss: np.ndarray
    favourite_off_accuracy: np.ndarray


@dataclass(frozen=True)
class Answer:
    """What the trained mixture says to a question that it never trained on, up to the full stop."""

    task: str
    question: str
    expected: str
    said: str
    right: bool


@dataclass(frozen=True)
class Result:
    """Three trainings, up to where they ended or, while they are running, up to where they are.

    What is examined are the tasks' held-out questions, as many of each; weights and biases rest meanwhile.

    Args:
        tasks: J names.
        projections: N names of the adapted projections.
        experts: E.
        top_k: K.
        runs: those that have begun, in the order of `ROLES`.
        routing: (M, J, N, E), share of a task's tokens that each expert gets, at the checkups of the mixture; rows sum
            to 1.
        information: (M, N), what a token's expert tells of its task: mutual information over the tasks' entropy,
            from 0 (nothing) to 1 (everything).
        anatomy: None until the mixture is trained, and if that went wrong or took too long.
        answers: a few of each task; empty until then.
        steps: of each run, whether they were taken or not.
        ended: why it ended, or that it has not.
        ending: the same as a sentence.
        seconds: of all runs.
        parameters: of the model without adapters.
        device: where it ran.
        versions: of what took part.
    """

    tasks: list[str]
    projections: list[str]
    experts: int
    top_k: int
    runs: list[Run]
    routing: np.ndarray
    information: np.ndarray
    anatomy: Anatomy | None
    answers: list[Answer]
    steps: int
    ended: Ending
    ending: str
    seconds: float
    parameters: int
    device: str
    versions: dict[str, str]

    @property
    def mixture(self) -> Run:
        """The run of MoE-LoRA."""
        return self.runs[0]


def run(params: Params, job: Job) -> Result:
    """Train the mixture, then both LoRAs on the same batches, until the end or a cancellation; nothing is lost.

    What has been learned so far is shown on the way. What is published is left untouched: copies learn.
    """
    from engine import pretrained
    from engine.experiments._on_workers.moe_lora_training import Examination, Leg, dissect, speak
    from engine.measure import device_name, versions

    base = pretrained.load(params.model, job.device)
    exam = Examination(base)
    legs: list[Leg] = []
    anatomy, answers = None, []
    where, software, began = device_name(job.device), versions(), time.monotonic()

    def result(ended: Ending, ending: str) -> Result:
        mixture = legs[0]
        return Result(
            tasks=list(TASK_NAMES),
            projections=mixture.projections,
            experts=params.experts,
            top_k=params.top_k,
            runs=[leg.run() for leg in legs],
            routing=np.array([checkup.routing for checkup in mixture.checkups]),
            information=np.array([checkup.information for checkup in mixture.checkups]),
            anatomy=anatomy,
            answers=answers,
            steps=params.steps,
            ended=ended,
            ending=ending,
            seconds=time.monotonic() - began,
            parameters=base.num_parameters,
            device=where,
            versions=software,
        )

    def follow() -> None:
        leg, taken = legs[-1], sum(leg.trainer.step for leg in legs)
        last = leg.checkups[-1]
        job.report(
            taken,
            len(ROLES) * params.steps,
            run=len(legs),
            loss=leg.reports[-1].loss if leg.reports else float(last.loss.mean()),
            held_out_accuracy=float(last.accuracy.mean()),
        )
        told = f"{leg.role}: {leg.trainer.step} of {params.steps} steps so far."
        job.show(lambda: result("running", f"Run {len(legs)} of {len(ROLES)}, {told}"))

    for role in ROLES:
        leg = Leg(role, params, base, exam, follow=follow, cancelled=lambda: job.cancelled)
        legs.append(leg)
        leg.examine()
        follow()
        ended, ending = see_through(leg.train, leg.trainer, params, job)
        leg.end(examine=ended != "diverged")
        if leg is legs[0] and ended in ("finished", "cancelled"):
            anatomy, answers = dissect(leg.model, exam), speak(leg.model, base)
        if ended != "finished":
            return result(ended, f"In run {len(legs)} of {len(ROLES)}, {role}: {ending}")
        follow()
    return result("finished", f"All {len(ROLES)} runs of {params.steps} steps were made.")
