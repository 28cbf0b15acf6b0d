"""A small model from scratch: what it learns, and when.

Legend: S steps, M checkups, B batch, T tokens of a sample, P period of the probe that is drawn.
"""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from engine.architecture import ModelConfig
from engine.errors import InputError
from engine.experiments import ExperimentParams, _training_text
from engine.experiments._ending import Ending, see_through
from engine.experiments._training_cost import Cost, count_flops, weigh
from engine.experiments._training_diary import Diary, Sample, fixed_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.model import Decoder
    from engine.pretraining.recipe import Recipe
    from engine.runtime.jobs import Job
    from engine.trainer import StepReport

VOCAB_SIZE = 320
"""The bytes, an end token and the 63 commonest pairs: a small head leaves time for many steps."""

BLOCK_SIZE = 64
ARCHIVE_FOLDER = "trained-model"
_CHECKUPS = 25
_PROBE_PERIOD = BLOCK_SIZE // 2
_MIN_PERIOD = 12
"""With shorter ones, looking a fixed way back is right too often for an induction head to be worth having."""


class Params(ExperimentParams):
    """A shape, a text and a way to train."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0  # the largest step of the largest model, then a checkup and a sample
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    num_layers: int = Field(2, ge=1, le=8, title="Depth", description="Layers of the model.")
    d_model: int = Field(
        64,
        ge=32,
        le=256,
        title="Width",
        description="Numbers that stand for a token between the layers.",
        json_schema_extra={"step": 32},
    )
    num_heads: int = Field(2, ge=1, le=16, title="Heads", description="Attention heads of a layer; divides the width.")
    learning_rate: float = Field(
        8e-3, gt=0, le=10, title="Learning rate", description="The highest one: it rises to it, then falls."
    )
    batch_size: int = Field(64, ge=1, le=256, title="Batch", description=f"Samples of {BLOCK_SIZE} tokens a step.")
    steps: int = Field(500, ge=1, le=5000, title="Steps", description="Updates of the weights.")
    random_share: float = Field(
        0.6,
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

    @field_validator("text")
    @classmethod
    def _strip(cls, text: str) -> str:
        return text.strip()  # a last tenth of blanks would be nothing to be tested on

    @model_validator(mode="after")
    def _check(self) -> Params:
        if self.d_model % self.num_heads:
            raise InputError(f"Heads is {self.num_heads}: it must divide Width, which is {self.d_model}.")
        _ = self.architecture  # raises a sentence if the numbers do not fit together
        _training_text.check_length(self.text, BLOCK_SIZE)
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
        """What a step allocates at its peak, which is either where the backward pass begins or where the step ends.

            max(12 P + 4·B·T·(L·(10 D + 4 F + H + 2) + 3 D + 3 V + 3), 16 P + 12 max(D·F, V·D))

        P parameters are held three times, with AdamW's two means, and once more as gradients when the backward pass is
        through. Until it begins there are the activations that it needs, in numbers a token: of a layer what goes into
        its products, norms and attention, with H sums of the softmax; of the ends the embedding, the last norm and its
        input, and logits, their log-softmax and its gradient. AdamW's own update takes three times the largest matrix.
        The checkups' 64 samples, some 16 MB without gradients, are left out: they exceed it only for the smallest runs.
        """
        config = self.architecture
        layer = 10 * config.d_model + 4 * config.ffn_dim + config.num_heads + 2
        activations = config.num_layers * layer + 3 * config.d_model + 3 * config.vocab_size + 3
        largest = max(config.d_model * config.ffn_dim, config.vocab_size * config.d_model)
        return max(
            12 * config.num_parameters + 4 * self.batch_size * BLOCK_SIZE * activations,
            16 * config.num_parameters + 12 * largest,
        )

    def predict(self, samples: int | None = None) -> Cost:
        """What the run will cost, before anything runs.

        Args:
            samples: that the text holds, where that is known: a batch has no more.
        """
        batch_size = self.batch_size if samples is None else min(self.batch_size, samples)
        config = self.architecture
        flops = 3 * self.steps * batch_size * config.forward_flops(BLOCK_SIZE)
        memory = self.model_copy(update={"batch_size": batch_size}).memory_bytes()
        return Cost(config.num_parameters, flops, memory)


@dataclass(frozen=True)
class Result:
    """A run of training, up to where it ended or, while it is running, up to where it is.

    Args:
        step, loss, learning_rate, grad_norm, tokens_per_second: (S,), of each step that was taken; the loss in nats a
            token, before the step's update and random samples included, the norm before clipping.
        checked: (M,) steps after which the model was examined, 0 among them.
        held_out_loss: (M,), in nats a token of text that is never trained on.
        text_loss, random_loss: (M,), the same on fixed samples of the text that it learns from, and on the second round
            of fixed random tokens.
        induction, previous_token: (M,), the best head's score on random tokens said twice, from 0 to 1.
        copied: (M,), share of the tokens of the second round that the model thought the likeliest.
        heads: (M, 2), layer and index of the head whose induction score that is.
        head_maps: (2, 2P, 2P) float16, attention of the latest of them on P random tokens said twice: before the first
            step, and at the last checkup.
        prompt: where the samples begin.
        samples: what it says, over training.
        steps: of the whole run, whether they were taken or not.
        ended: why it ended, or that it has not.
        ending: the same as a sentence.
        predicted, measured: what the steps that were taken cost; `measured` counts a sample's arithmetic with PyTorch's
            FLOP counter and weighs the second step, or the only one, with `engine.measure.peak_memory`.
        seconds: of training, checkups included.
        tokens_per_step: B·T.
        training_tokens, held_out_tokens: of the text.
        characters_per_token: of the held-out text.
        device: where it ran.
        versions: of what took part.
        archive: the trained model as a zip of the folder that `engine.llama.write` makes, in bfloat16; empty while it
            is running.
    """

    step: np.ndarray
    loss: np.ndarray
    learning_rate: np.ndarray
    grad_norm: np.ndarray
    tokens_per_second: np.ndarray
    checked: np.ndarray
    held_out_loss: np.ndarray
    text_loss: np.ndarray
    random_loss: np.ndarray
    induction: np.ndarray
    previous_token: np.ndarray
    copied: np.ndarray
    heads: np.ndarray
    head_maps: np.ndarray
    prompt: str
    samples: list[Sample]
    steps: int
    ended: Ending
    ending: str
    predicted: Cost
    measured: Cost
    seconds: float
    tokens_per_step: int
    training_tokens: int
    held_out_tokens: int
    characters_per_token: float
    device: str
    versions: dict[str, str]
    archive: bytes = b""

    @property
    def samples_to_learn(self) -> int:
        """How many samples the text holds."""
        return self.training_tokens // BLOCK_SIZE


def run(params: Params, job: Job) -> Result:
    """Train until the last step, a divergence, or until it is stopped; whatever was learned by then is returned.

    What has been learned so far is shown on the way.

    Raises:
        InputError: the text is too short to learn from one part of it and to be tested on another.
    """
    import torch

    from engine.data import TokenBlocks
    from engine.measure import device_name, versions
    from engine.model import Decoder
    from engine.pretraining.mixture import RepetitionMixture
    from engine.trainer import Trainer

    corpus = _training_text.read(params.text, VOCAB_SIZE, BLOCK_SIZE)
    learned = corpus.learned.to(job.device)
    dataset = RepetitionMixture(
        learned,
        VOCAB_SIZE,
        BLOCK_SIZE,
        random_share=params.random_share,
        passage_share=0.0,
        min_period=_MIN_PERIOD,
    )
    held_out = TokenBlocks(corpus.tested.unfold(0, BLOCK_SIZE + 1, BLOCK_SIZE).to(job.device))
    recipe = _recipe(params, samples=len(dataset))
    flops, memory_bytes = count_flops(recipe.model, BLOCK_SIZE), 0
    where, software = device_name(job.device), versions()
    torch.manual_seed(params.seed)
    model = Decoder(recipe.model).to(job.device)
    diary = Diary(
        model,
        corpus.tokenizer,
        corpus.prompt,
        held_out,
        text=fixed_batch(learned, recipe, random_share=0.0),
        random=fixed_batch(learned, recipe, random_share=1.0),
        recipe=recipe,
        job=job,
    )

    def result(ended: Ending, ending: str, archive: bytes = b"") -> Result:
        sequences = trainer.step * recipe.options.batch_size
        return Result(
            **diary.curves(),
            prompt=corpus.prompt,
            samples=list(diary.samples),
            steps=params.steps,
            ended=ended,
            ending=ending,
            predicted=params.model_copy(update={"steps": trainer.step}).predict(len(dataset)),
            measured=Cost(sum(parameter.numel() for parameter in model.parameters()), sequences * flops, memory_bytes),
            seconds=time.monotonic() - began,
            tokens_per_step=recipe.options.batch_size * BLOCK_SIZE,
            training_tokens=len(corpus.learned),
            held_out_tokens=len(held_out) * BLOCK_SIZE,
            characters_per_token=corpus.characters_per_token,
            device=where,
            versions=software,
            archive=archive,
        )

    def show() -> None:
        job.show(lambda: result("running", f"{trainer.step} of {params.steps} steps so far."))

    def follow(report: StepReport) -> None:
        diary.follow(report)
        show()

    weighed = min(2, params.steps)  # only from the second on does a step find AdamW's means there
    pause = weighed - 1
    trainer = Trainer(
        model,
        dataset,
        recipe.options,
        held_out=held_out,
        on_step=follow,
        cancelled=lambda: job.cancelled or trainer.step >= pause,
    )
    began = time.monotonic()
    diary.examine(0)
    diary.listen(0)
    show()

    def train() -> None:
        nonlocal pause, memory_bytes
        trainer.train_steps(params.steps)
        pause = weighed
        memory_bytes = weigh(trainer)
        pause = params.steps
        trainer.resume()

    ended, ending = see_through(train, trainer, params, job)
    diary.examine(trainer.step)
    diary.listen(trainer.step)
    return result(ended, ending, _pack(model, corpus.tokenizer))


def _recipe(params: Params, samples: int) -> Recipe:
    from engine.pretraining.recipe import Recipe
    from engine.trainer import TrainerOptions

    return Recipe(
        model=params.architecture,
        options=TrainerOptions(
            learning_rate=params.learning_rate,
            batch_size=min(params.batch_size, samples),  # a short text has fewer
            beta2=0.99,
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


def _pack(model: Decoder, tokenizer: PreTrainedTokenizerFast) -> bytes:
    """A zip of one folder with the model, which our own code and transformers open."""
    import torch

    from engine import llama

    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(llama.write(model, tokenizer, folder, torch.bfloat16).iterdir()):
            archive.write(file, f"{ARCHIVE_FOLDER}/{file.name}")
    return packed.getvalue()
