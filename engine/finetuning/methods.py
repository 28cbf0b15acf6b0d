"""The ways to fine-tune: which weights may change, from where they start, and at which rates.

model = prepare(decoder, "DoRA", rank=8, alpha=16, targets=("q_proj", "v_proj"))
make_trainer(model, "DoRA", lessons, options).train_steps(150)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.finetuning import Method
from engine.finetuning.lessons import Lessons
from engine.lora.injection import inject_lora, lora_parameter_groups
from engine.lora.layer import rank_stabilized_scaling
from engine.lora.linear import DoRALinear, pissa_start
from engine.measure import peak_memory
from engine.model import Decoder
from engine.trainer import StepReport, Trainer, TrainerOptions

RATE_RATIO = 16.0
"""λ of LoRA+: how much faster B learns than A."""

_ADAPTERS: dict[Method, dict[str, Any]] = {
    "LoRA": {},
    "rank-stabilized LoRA": {"scaling_rule": rank_stabilized_scaling},
    "DoRA": {"layer": DoRALinear},
    "PiSSA": {"start": pissa_start},
    "LoRA+": {},
}


def prepare(model: Decoder, method: Method, rank: int, alpha: float, targets: Sequence[str]) -> Decoder:
    """Make trainable what the method trains, in place.

    Args:
        model: a plain decoder.
        method: a way to fine-tune.
        rank: R of the adapters.
        alpha: α.
        targets: patterns of the layers' names, as in `inject_lora`.

    Raises:
        InputError: as `inject_lora`.
    """
    if method == "full fine-tuning":
        return model.requires_grad_(True)
    inject_lora(model, rank, alpha, targets, **_ADAPTERS[method])
    return model


class _TwoRates(Trainer):
    """A trainer whose rate is A's; B learns `RATE_RATIO` times faster (LoRA+)."""

    def _groups(self, options: TrainerOptions) -> list[dict[str, Any]]:
        groups = lora_parameter_groups(self.model, options.learning_rate, RATE_RATIO)
        return [{**group, "weight_decay": options.weight_decay} for group in groups]

    def _make_optimizer(self, options: TrainerOptions) -> torch.optim.Optimizer:
        optimizer = super()._make_optimizer(options)
        ratios = [group["lr"] / options.learning_rate for group in optimizer.param_groups]

        def spread(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] *= ratio  # the schedule gives every group the same rate before each step

        optimizer.register_step_pre_hook(spread)
        return optimizer


def make_trainer(
    model: Decoder,
    method: Method,
    lessons: Lessons,
    options: TrainerOptions,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Trainer:
    """A trainer for a model that `prepare` has made ready for the same method."""
    kind = _TwoRates if method == "LoRA+" else Trainer
    return kind(model, lessons, options, held_out=lessons, on_step=on_step, cancelled=cancelled)


def rehearse(model: Decoder, method: Method, lessons: Lessons, options: TrainerOptions) -> tuple[int, float]:
    """Two steps of a twin with the longest lessons, so that no step of a run takes more.

    Returns:
        The bytes that it allocates at its peak, its weights included, and the seconds of the second step.
    """
    calm = options.model_copy(update={"learning_rate": 1e-6})  # it is not to diverge
    longest, ends = lessons.longest(options.batch_size), []

    def end(report: StepReport) -> None:
        ends.append(time.perf_counter())

    def practise() -> None:
        make_trainer(copy.deepcopy(model), method, longest, calm, on_step=end).train_steps(2)

    nbytes = peak_memory(practise, str(next(model.parameters()).device))
    return nbytes, ends[1] - ends[0]
