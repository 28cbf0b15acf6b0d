"""What is written down while the training lab's model learns.

Legend: M checkups, B batch, T tokens of a sample, P period of the probe, L layers, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from engine.data import Batch, TokenBlocks
    from engine.model import Decoder
    from engine.pretraining.recipe import Recipe
    from engine.pretraining.record import Checkup
    from engine.runtime.jobs import Job
    from engine.trainer import StepReport

MAP_PERIOD = 24
"""P of the probe whose attention is drawn; said twice it fits the model's context."""

SAMPLE_STEPS = (50, 200, 500, 1000)
SAMPLE_TOKENS = 40
_FIXED_SAMPLES = 64


@dataclass(frozen=True)
class Sample:
    """What the model made of the run's prompt after `step` steps."""

    step: int
    text: str


@dataclass
class Diary:
    """Keeps what happens in a run, and tells the job.

    Args:
        model: that learns.
        tokenizer: of the samples.
        prompt: where they begin.
        held_out: what it is tested on.
        text, random: fixed samples of either kind that it learns from, on which the two losses are told apart.
        recipe: of the run.
        job: is told.
    """

    model: Decoder
    tokenizer: PreTrainedTokenizerFast
    prompt: str
    held_out: TokenBlocks
    text: Batch
    random: Batch
    recipe: Recipe
    job: Job
    reports: list[StepReport] = field(default_factory=list)
    checkups: list[Checkup] = field(default_factory=list)
    text_loss: list[float] = field(default_factory=list)
    random_loss: list[float] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)  # (L, H, 2P, 2P) of the first checkup, and of the latest
    samples: list[Sample] = field(default_factory=list)

    def follow(self, report: StepReport) -> None:
        """A step was taken."""
        self.reports.append(report)
        if report.step % self.recipe.evaluate_every == 0:
            self.examine(report.step)
        if report.step in SAMPLE_STEPS:
            self.listen(report.step)
        checkup = self.checkups[-1]
        self.job.report(
            report.step,
            self.recipe.steps,
            loss=report.loss,
            held_out_loss=checkup.held_out_loss,
            learning_rate=report.learning_rate,
            gradient_norm=report.grad_norm,
            tokens_per_second=report.tokens_per_second,
            induction_score=checkup.induction.score,
        )

    def examine(self, step: int) -> None:
        """See how the model does after `step`."""
        from engine.head_statistics import repeated_random_tokens
        from engine.pretraining.run import examine

        if self.checkups and self.checkups[-1].step == step:
            return
        self.checkups.append(examine(self.model, self.held_out, self.recipe, step))
        self.text_loss.append(_mean_loss(self.model, self.text))
        self.random_loss.append(_mean_loss(self.model, self.random))
        probe = repeated_random_tokens(self.recipe.model.vocab_size, MAP_PERIOD, 1, seed=2)  # (1, 2P)
        self.maps[1:] = [self.model.attention_maps(probe)[:, 0].cpu()]

    def listen(self, step: int) -> None:
        """Hear what the model says after `step`."""
        from engine.pretraining.run import tell

        if not self.samples or self.samples[-1].step != step:
            self.samples.append(Sample(step, tell(self.model, self.tokenizer, self.prompt, SAMPLE_TOKENS)))

    def curves(self) -> dict[str, np.ndarray]:
        """The arrays of an `engine.experiments.training.Result`."""
        taken = {
            name: np.array([getattr(report, name) for report in self.reports])
            for name in ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
        }
        best = self.checkups[-1].induction
        return taken | {
            "checked": np.array([checkup.step for checkup in self.checkups]),
            "held_out_loss": np.array([checkup.held_out_loss for checkup in self.checkups]),
            "text_loss": np.array(self.text_loss),
            "random_loss": np.array(self.random_loss),
            "induction": np.array([checkup.induction.score for checkup in self.checkups]),
            "previous_token": np.array([checkup.previous_token.score for checkup in self.checkups]),
            "copied": np.array([checkup.copied for checkup in self.checkups]),
            "heads": np.array([(checkup.induction.layer, checkup.induction.head) for checkup in self.checkups]),
            "head_maps": np.stack(
                [maps[best.layer, best.head].numpy() for maps in (self.maps[0], self.maps[-1])]
            ).astype(np.float16),
        }


def fixed_batch(tokens: Tensor, recipe: Recipe, random_share: float) -> Batch:
    """The same few samples at every call: windows of `tokens` if `random_share` is 0, random tokens if it is 1."""
    import torch

    from engine.pretraining.mixture import RepetitionMixture

    mixture = RepetitionMixture(
        tokens,
        recipe.model.vocab_size,
        recipe.block_size,
        random_share=random_share,
        passage_share=0.0,
        min_period=recipe.min_period,
    )
    places = torch.linspace(0, len(mixture) - 1, _FIXED_SAMPLES).long()
    return mixture.batch(places, torch.Generator().manual_seed(1))


def _mean_loss(model: Decoder, batch: Batch) -> float:
    """Mean loss of the scored tokens of a batch, in nats a token."""
    from engine.data import IGNORED
    from engine.model import evaluating
    from engine.trainer import summed_loss

    with evaluating(model):
        return (summed_loss(model, *batch) / (batch.targets != IGNORED).sum()).item()
