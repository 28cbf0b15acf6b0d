"""A small model from scratch: what it learns, and when.

Legend: S steps, M checkups, B batch, T tokens of a sample.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from engine.architecture import ModelConfig
from engine.errors import InputError
from engine.experiments import ExperimentParams
from engine.experiments._training import SHIPPED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from engine.data import TokenBlocks
    from engine.model import Decoder
    from engine.pretraining.mixture import RepetitionMixture
    from engine.pretraining.recipe import Recipe
    from engine.pretraining.record import Checkup
    from engine.runtime.jobs import Job
    from engine.trainer import StepReport

VOCAB_SIZE = 4096
BLOCK_SIZE = 128
HELD_OUT_SHARE = 0.1
SAMPLE_STEPS = (50, 200, 500, 1000)
_CHECKUPS = 25
_SAMPLE_TOKENS = 40
_PROBE_PERIOD = 50
_MIN_PERIOD = 8

Ending = Literal["finished", "cancelled", "diverged"]


class Params(ExperimentParams):
    """A shape, a text and a way to train."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    num_layers: int = Field(2, ge=1, le=8, title="Depth", description="Layers of the model.")
    d_model: int = Field(
        128,
        ge=32,
        le=256,
        title="Width",
        description="Numbers that stand for a token between the layers.",
        json_schema_extra={"step": 32},
    )
    num_heads: int = Field(4, ge=1, le=16, title="Heads", description="Attention heads of a layer; divides the width.")
    learning_rate: float = Field(
        4e-3, gt=0, le=10, title="Learning rate", description="The highest one: it rises to it, then falls."
    )
    batch_size: int = Field(8, ge=1, le=64, title="Batch", description=f"Samples of {BLOCK_SIZE} tokens a step.")
    steps: int = Field(300, ge=1, le=5000, title="Steps", description="Updates of the weights.")
    random_share: float = Field(
        0.2,
        ge=0,
        le=1,
        title="Random tokens, said twice",
        description="Share of the samples that are no text: they can only be foretold by looking back.",
        json_schema_extra={"step": 0.05},
    )
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of the first weights and of the samples' order.")
    text: str = Field(
        "",
        max_length=20_000,
        title="Your text",
        description="What to learn from; empty takes the stories that come with the workbench.",
        json_schema_extra={"widget": "area"},
    )

    @model_validator(mode="after")
    def _check_shape(self) -> Params:
        _ = self.architecture  # raises a sentence if the numbers do not fit together
        return self

    @property
    def architecture(self) -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            vocab_size=VOCAB_SIZE,
            max_seq_len=BLOCK_SIZE,
        )

    def memory_bytes(self) -> int:
        """What a run allocates at its peak.

            16 P + 4·B·T·(L·(10 D + 4 F) + 3 V)

        P parameters are held four times: weight, gradient and AdamW's two means; of the activations, those that the
        backward pass needs and three of the size of the logits.
        """
        config = self.architecture
        activations = config.num_layers * (10 * config.d_model + 4 * config.ffn_dim) + 3 * config.vocab_size
        return 16 * config.num_parameters + 4 * self.batch_size * BLOCK_SIZE * activations

    def predict(self) -> Cost:
        """What the run will cost, before anything runs."""
        config = self.architecture
        flops = 3 * self.steps * self.batch_size * config.forward_flops(BLOCK_SIZE)
        return Cost(config.num_parameters, flops, self.memory_bytes())


@dataclass(frozen=True)
class Cost:
    """What training takes.

    Args:
        parameters: of the model.
        flops: of all steps together.
        memory_bytes: at the peak.
    """

    parameters: int
    flops: float
    memory_bytes: int


@dataclass(frozen=True)
class Sample:
    """What the model made of `engine.pretraining.run.PROMPT` after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True)
class Result:
    """A run of training, up to where it ended.

    Args:
        step, loss, learning_rate, grad_norm, tokens_per_second: (S,), of each step that was taken; the loss in nats a
            token, before the step's update and random samples included, the norm before clipping.
        checked: (M,) steps after which the model was examined, 0 among them.
        held_out_loss: (M,), in nats a token of text that is never trained on.
        induction, previous_token: (M,), the best head's score on random tokens said twice, from 0 to 1.
        samples: what it says, over training.
        ended: why it ended.
        ending: the same as a sentence.
        predicted, measured: what the steps that were taken cost; `measured` counts with PyTorch's FLOP counter and
            weighs with `engine.measure.peak_memory`.
        seconds: of training, checkups included.
        tokens_per_step: B·T.
        training_tokens, held_out_tokens: of the text.
        device: where it ran.
        versions: of what took part.
    """

    step: np.ndarray
    loss: np.ndarray
    learning_rate: np.ndarray
    grad_norm: np.ndarray
    tokens_per_second: np.ndarray
    checked: np.ndarray
    held_out_loss: np.ndarray
    induction: np.ndarray
    previous_token: np.ndarray
    samples: list[Sample]
    ended: Ending
    ending: str
    predicted: Cost
    measured: Cost
    seconds: float
    tokens_per_step: int
    training_tokens: int
    held_out_tokens: int
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Train until the last step, a cancellation or a divergence; whatever was learned by then is returned.

    Raises:
        InputError: the text is too short to learn from one part of it and to be tested on another.
    """
    import torch

    from engine.data import TokenBlocks
    from engine.measure import device_name, versions
    from engine.model import Decoder
    from engine.pretraining.mixture import RepetitionMixture
    from engine.trainer import DivergedError, Trainer

    tokenizer = load_tokenizer()
    learned, tested = split(read_text(params.text, tokenizer))
    dataset = RepetitionMixture(
        learned.to(job.device),
        VOCAB_SIZE,
        BLOCK_SIZE,
        random_share=params.random_share,
        passage_share=0.0,
        min_period=_MIN_PERIOD,
    )
    held_out = TokenBlocks(tested.unfold(0, BLOCK_SIZE + 1, BLOCK_SIZE).to(job.device))
    recipe = _recipe(params, samples=len(dataset))
    memory_bytes = _weigh(recipe, dataset, held_out, job.device)
    torch.manual_seed(params.seed)
    model = Decoder(recipe.model).to(job.device)
    diary = _Diary(model, tokenizer, held_out, recipe, job)
    trainer = Trainer(
        model,
        dataset,
        recipe.options,
        held_out=held_out,
        on_step=diary.follow,
        cancelled=lambda: job.cancelled,
    )
    began = time.monotonic()
    diary.examine(0)
    diary.listen(0)
    ended, ending = "finished", f"All {params.steps} steps were taken."
    try:
        trainer.train_steps(params.steps)
        if trainer.step < params.steps:
            ended = "cancelled"
            ending = f"Cancelled after step {trainer.step} of {params.steps}: what was learned until then is shown."
    except DivergedError as error:
        ended, ending = "diverged", f"{error} What was learned until then is shown."
    diary.examine(trainer.step)
    diary.listen(trainer.step)
    seconds = time.monotonic() - began
    taken = trainer.step
    sequences = taken * recipe.options.batch_size
    return Result(
        **diary.curves(),
        samples=diary.samples,
        ended=ended,
        ending=ending,
        predicted=Cost(
            recipe.model.num_parameters,
            3 * sequences * recipe.model.forward_flops(BLOCK_SIZE),
            params.model_copy(update={"batch_size": recipe.options.batch_size}).memory_bytes(),
        ),
        measured=Cost(
            sum(parameter.numel() for parameter in model.parameters()),
            sequences * _count_flops(recipe.model),
            memory_bytes,
        ),
        seconds=seconds,
        tokens_per_step=recipe.options.batch_size * BLOCK_SIZE,
        training_tokens=len(learned),
        held_out_tokens=len(held_out) * BLOCK_SIZE,
        device=device_name(job.device),
        versions=versions(),
    )


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The small model's tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(SHIPPED)


def read_text(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """`text`, or the shipped stories if it is empty, as one row of tokens (tokens,)."""
    from engine.data import stream
    from engine.pretraining.run import read_stories

    return stream([text] if text.strip() else read_stories(SHIPPED / "heldout.txt"), tokenizer)


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The part to learn from, and the last tenth, at least one block, to be tested on.

    Raises:
        InputError: there are not enough tokens for a block of each.
    """
    needed = 2 * (BLOCK_SIZE + 1)
    if len(tokens) < needed:
        raise InputError(
            f"The text has {len(tokens)} tokens, training needs {needed}, one block to learn from and one to be tested "
            "on: paste more text, or leave it empty for the stories."
        )
    held_out = max(BLOCK_SIZE + 1, round(HELD_OUT_SHARE * len(tokens)))
    return tokens[:-held_out], tokens[-held_out:]


def _recipe(params: Params, samples: int) -> Recipe:
    from engine.pretraining.recipe import Recipe
    from engine.trainer import TrainerOptions

    return Recipe(
        model=params.architecture,
        options=TrainerOptions(
            learning_rate=params.learning_rate,
            batch_size=min(params.batch_size, samples),  # a short text has fewer
            seed=params.seed,
        ),
        steps=params.steps,
        block_size=BLOCK_SIZE,
        random_share=params.random_share,
        passage_share=0.0,
        min_period=_MIN_PERIOD,
        evaluate_every=max(1, params.steps // _CHECKUPS),
        probe_period=_PROBE_PERIOD,
    )


@dataclass
class _Diary:
    """Keeps what happens in a run, and tells the job.

    Args:
        model: that learns.
        tokenizer: of the samples.
        held_out: what it is tested on.
        recipe: of the run.
        job: is told.
    """

    model: Decoder
    tokenizer: PreTrainedTokenizerFast
    held_out: TokenBlocks
    recipe: Recipe
    job: Job
    reports: list[StepReport] = field(default_factory=list)
    checkups: list[Checkup] = field(default_factory=list)
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
        from engine.pretraining.run import examine

        if not self.checkups or self.checkups[-1].step != step:
            self.checkups.append(examine(self.model, self.held_out, self.recipe, step))

    def listen(self, step: int) -> None:
        """Hear what the model says after `step`."""
        from engine.pretraining.run import PROMPT, tell

        if not self.samples or self.samples[-1].step != step:
            self.samples.append(Sample(step, tell(self.model, self.tokenizer, PROMPT, _SAMPLE_TOKENS)))

    def curves(self) -> dict[str, np.ndarray]:
        """The arrays of a `Result`."""
        taken = {
            name: np.array([getattr(report, name) for report in self.reports])
            for name in ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
        }
        return taken | {
            "checked": np.array([checkup.step for checkup in self.checkups]),
            "held_out_loss": np.array([checkup.held_out_loss for checkup in self.checkups]),
            "induction": np.array([checkup.induction.score for checkup in self.checkups]),
            "previous_token": np.array([checkup.previous_token.score for checkup in self.checkups]),
        }


def _weigh(recipe: Recipe, dataset: RepetitionMixture, held_out: TokenBlocks, device: str) -> int:
    """Bytes that a model, its gradients, AdamW's means and two steps allocate at their peak."""
    from engine.measure import peak_memory
    from engine.model import Decoder
    from engine.trainer import Trainer

    calm = recipe.options.model_copy(update={"learning_rate": 1e-6})  # it is not to diverge

    def rehearse() -> None:
        Trainer(Decoder(recipe.model).to(device), dataset, calm, held_out=held_out).train_steps(2)

    return peak_memory(rehearse, device)


def _count_flops(config: ModelConfig) -> int:
    """FLOPs of a forward and a backward pass over one sample, as PyTorch counts its own operators.

    The counter does not know every fused attention, so that the weights are spelled out; forbidden pairs count too.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.model import Decoder, Parts, visible_attention
    from engine.trainer import summed_loss

    ids = torch.zeros(1, BLOCK_SIZE, dtype=torch.long)
    twin = Decoder(config, Parts(attention=visible_attention))
    with FlopCounterMode(display=False) as counter:
        summed_loss(twin, ids, ids).backward()
    return counter.get_total_flops()
