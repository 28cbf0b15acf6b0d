"""What happens while a decoder is fine-tuned: every step's numbers, and now and then what it knows.

Legend: S steps, M checkups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from engine.finetuning.lessons import Lessons, answered_rightly
from engine.lora.injection import adapted_layers
from engine.model import Decoder
from engine.trainer import DivergedError, StepReport, TrainerOptions

_MUCH = 0.1
"""Nats a token; when all is learned, the gradient may be 0 as well."""


@dataclass(frozen=True)
class Checkup:
    """What the model knew after a step.

    Args:
        step: after which it was asked.
        right: of each training question, whether it was answered rightly.
        held_out_right: of each question that is never trained on.
    """

    step: int
    right: list[bool]
    held_out_right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of the training questions answered rightly."""
        return sum(self.right) / len(self.right)

    @property
    def held_out_accuracy(self) -> float | None:
        """Share of the others; None if there are none."""
        return sum(self.held_out_right) / len(self.held_out_right) if self.held_out_right else None


@dataclass
class Diary:
    """Keeps what is reported of a fine-tuning.

    Args:
        model: that learns.
        asked: training questions that it is asked at a checkup.
        held_out: questions that it is never trained on; None if there are none.
        options: of the training.
        every: steps from a checkup to the next.
    """

    model: Decoder
    asked: Lessons
    held_out: Lessons | None
    options: TrainerOptions
    every: int
    reports: list[StepReport] = field(default_factory=list)
    grad_norms: list[tuple[float, float]] = field(default_factory=list)
    checkups: list[Checkup] = field(default_factory=list)

    def follow(self, report: StepReport) -> None:
        """A step was taken: keep its numbers, and examine the model if it is time to.

        Raises:
            DivergedError: nothing reaches the weights any more, though there is much to learn. One way there is that
                activations overflow and a norm divides by infinity: all logits are 0 then, and no number is strange.
        """
        if report.grad_norm == 0 and report.loss > _MUCH:
            raise DivergedError(
                f"Training diverged at step {report.step} of {report.total}: the loss is {report.loss:.3g}, and no "
                f"gradient reaches the weights any more; the learning rate was {report.learning_rate:.3g}, try "
                f"{self.options.learning_rate / 10:.2g} at most.",
                report.step,
            )
        self.reports.append(report)
        adapters = [layer.adapter for layer in adapted_layers(self.model).values()]
        if adapters:
            shortened = max(1.0, report.grad_norm / self.options.max_grad_norm)  # what is left of it was clipped
            norms = (_grad_norm([adapter.A for adapter in adapters]), _grad_norm([adapter.B for adapter in adapters]))
            self.grad_norms.append((norms[0] * shortened, norms[1] * shortened))
        if report.step % self.every == 0:
            self.examine(report.step)

    def examine(self, step: int) -> None:
        """See what the model knows after `step`; the same step twice: once."""
        if not self.checkups or self.checkups[-1].step != step:
            unknown = answered_rightly(self.model, self.held_out) if self.held_out else []
            self.checkups.append(Checkup(step, answered_rightly(self.model, self.asked), unknown))

    def curves(self) -> dict[str, np.ndarray]:
        """Arrays by name: of the steps (S,), of the checkups (M,)."""
        norms = np.array(self.grad_norms).reshape(-1, 2)
        held_out = [checkup.held_out_accuracy for checkup in self.checkups if checkup.held_out_right]
        return {
            "step": np.array([report.step for report in self.reports], dtype=int),
            "loss": np.array([report.loss for report in self.reports]),
            "tokens_per_second": np.array([report.tokens_per_second for report in self.reports]),
            "grad_norm_a": norms[:, 0],
            "grad_norm_b": norms[:, 1],
            "checked": np.array([checkup.step for checkup in self.checkups], dtype=int),
            "accuracy": np.array([checkup.accuracy for checkup in self.checkups]),
            "held_out_accuracy": np.array(held_out),
        }


def _grad_norm(parameters: list[nn.Parameter]) -> float:
    """√Σ‖gradient‖² over all of them."""
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).item()
