"""The whole model, live: it learns a text with every technique that is switched on, and says something meanwhile.

Legend: S steps, M checkups, N mixtures, E experts.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator

from engine.experiments._ending import Ending, see_through
from engine.experiments._full_model_runs import RunParams, cleaned
from engine.experiments._training_cost import weigh
from engine.experiments._training_diary import Sample

if TYPE_CHECKING:
    from engine.runtime.jobs import Job
    from engine.trainer import StepReport

_CHECKUPS = 12
_SAMPLES = 6
MAX_PROMPT = 300
"""Characters."""


class Params(RunParams):
    """What is on, what is learned, and where samples begin."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    prompt: str = Field(
        "",
        title="Prompt",
        description="Where its samples begin; empty takes one that suits the text.",
    )

    @field_validator("prompt")
    @classmethod
    def _clean_prompt(cls, prompt: str) -> str:
        return cleaned(prompt, "Prompt", MAX_PROMPT)


@dataclass(frozen=True)
class Result:
    """A run, up to where it ended or, while it is running, up to where it is.

    Args:
        step, loss, tokens_per_second: (S,), of each step that was taken; the loss in nats a token, before its update.
        checked: (M,) steps after which the model was examined, 0 among them.
        held_out_loss: (M,), in nats a token of text that is never learned.
        mixtures: names of the matrices that have one; none without MoE-LoRA.
        load: (M, N, E), tokens that an expert gets over its fair share, 1 if all get alike; on the held-out text.
        prompt: where the samples begin.
        samples: what it says, over training.
        guessing: loss of a model that thinks all tokens alike probable, ln V.
        learning: numbers that learn.
        parameters: of the model without adapters.
        model_bytes: of the weights as they are stored, adapters included.
        step_bytes: at the peak of a step, weighed; 0 if that step was not taken.
        learning_rate: the highest.
        steps: of the whole run, whether they were taken or not.
        tokens_per_step: B·T.
        ended: why it ended, or that it has not.
        ending: the same as a sentence.
        seconds: of training, checkups and samples included.
        device: where it ran.
        versions: of what took part.
    """

    step: np.ndarray
    loss: np.ndarray
    tokens_per_second: np.ndarray
    checked: np.ndarray
    held_out_loss: np.ndarray
    mixtures: tuple[str, ...]
    load: np.ndarray
    prompt: str
    samples: tuple[Sample, ...]
    guessing: float
    learning: int
    parameters: int
    model_bytes: int
    step_bytes: int
    learning_rate: float
    steps: int
    tokens_per_step: int
    ended: Ending
    ending: str
    seconds: float
    device: str
    versions: dict[str, str]

    @property
    def violation(self) -> np.ndarray:
        """(M, N), MaxVio: by how much the busiest expert of a mixture exceeds its fair share, relative to that share.

        Source: Wang et al. 2024, Auxiliary-loss-free load balancing, https://arxiv.org/abs/2408.15664.
        """
        return self.load.max(-1, initial=1.0) - 1


def run(params: Params, job: Job) -> Result:
    """Learn until the last step, a divergence, or until it is stopped; whatever was learned by then is returned.

    Raises:
        InputError: the text is too short, or the prompt too long.
    """
    from engine.experiments._on_workers.full_model_training import Ground, persevere
    from engine.measure import device_name, versions
    from engine.moe.injection import moe_lora_layers
    from engine.quantization.production import get_model_memory_mb

    ground = Ground(params, job.device)
    prompt = params.prompt or ground.corpus.prompt
    ground.check_prompt(prompt)
    if params.flash:
        ground.settle_attention()
    model = ground.build(params.seed)
    reports: list[StepReport] = []
    checkups: list[tuple[int, float, np.ndarray]] = []
    samples: list[Sample] = []
    memory_bytes = 0
    where, software, model_bytes = device_name(job.device), versions(), round(1e6 * get_model_memory_mb(model))
    mixtures = tuple(moe_lora_layers(model))
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = math.ceil(params.steps / _CHECKUPS)
    told_after = {math.ceil(params.steps / 2**halvings) for halvings in range(_SAMPLES - 1)}

    def examine() -> None:
        if not checkups or checkups[-1][0] != trainer.step:
            checkups.append((trainer.step, ground.loss(model), ground.loads(model)))

    def listen() -> None:
        if not samples or samples[-1].step != trainer.step:
            samples.append(Sample(trainer.step, ground.speak(model, prompt)))

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            step=np.array([report.step for report in reports], dtype=int),
            loss=np.array([report.loss for report in reports]),
            tokens_per_second=np.array([report.tokens_per_second for report in reports]),
            checked=np.array([step for step, _, _ in checkups]),
            held_out_loss=np.array([loss for _, loss, _ in checkups]),
            mixtures=mixtures,
            load=np.stack([load for _, _, load in checkups]),
            prompt=prompt,
            samples=tuple(samples),
            guessing=math.log(model.config.vocab_size),
            learning=learning,
            parameters=model.config.num_parameters,
            model_bytes=model_bytes,
            step_bytes=memory_bytes,
            learning_rate=params.rate(),
            steps=params.steps,
            tokens_per_step=ground.batch_size * params.length,
            ended=ended,
            ending=ending,
            seconds=time.monotonic() - began,
            device=where,
            versions=software,
        )

    def show() -> None:
        job.show(lambda: result("running", f"{trainer.step} of {params.steps} steps so far."))

    def follow(report: StepReport) -> None:
        reports.append(report)
        if report.step % every == 0:
            examine()
        if report.step in told_after:
            listen()
        job.report(
            report.step,
            params.steps,
            loss=report.loss,
            held_out_loss=checkups[-1][1],
            tokens_per_second=report.tokens_per_second,
        )
        show()

    weighed = min(2, params.steps)  # only from the second on does a step find AdamW's means there
    pause = weighed - 1
    trainer = ground.trainer(
        model,
        params.seed,
        rate=params.rate(),
        on_step=follow,
        cancelled=lambda: job.cancelled or trainer.step >= pause,
    )
    began = time.monotonic()
    examine()
    listen()
    show()

    def conclude() -> None:
        examine()
        listen()

    def train() -> None:
        nonlocal pause, memory_bytes
        persevere(trainer, lambda: trainer.train_steps(params.steps))
        pause = weighed
        memory_bytes = persevere(trainer, lambda: weigh(trainer))
        pause = params.steps
        persevere(trainer, trainer.resume)
        persevere(trainer, conclude)

    ended, ending = see_through(train, trainer, params, job)
    return result(ended, ending)
