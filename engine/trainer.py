"""The loop that teaches a decoder to predict the next token, one step after the other, each of them reported.

    trainer = Trainer(model, create_test_dataset(1000))
    print(trainer.evaluate(), trainer.train(epochs=5), trainer.evaluate())

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, Self

import numpy as np
import psutil
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from engine import training_state
from engine.data import IGNORED, Batch, Dataset, TokenBlocks
from engine.errors import InputError, WorkbenchError
from engine.model import Decoder, evaluating, in_mode
from engine.settings import Settings
from engine.training_state import DamagedCheckpointError

Precision = Literal["float32", "bfloat16"]

_ORDER, _DRAWS = 0, 1


class TrainerOptions(Settings):
    """How to train.

    Raises:
        InputError: a value is out of bounds.
    """

    learning_rate: float = Field(1e-3, gt=0, le=100, description="The highest one, after the warm-up.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the run in which the rate rises to its highest.")
    final_rate: float = Field(0.1, ge=0, le=1, description="Share of the highest rate that is left at the end.")
    batch_size: int = Field(32, ge=1, description="B, samples computed at once.")
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


class RunFacts(Settings):
    """What a checkpoint says about its run besides the tensors."""

    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    options: TrainerOptions
    samples: int
    block_size: int
    data: str = Field(description="Fingerprint of a few samples.")

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
        tokens_per_second: of this step; filling after a sample's last scored token is not counted.
        memory_bytes: on CUDA the allocator's peak so far, on the CPU what the process holds now.
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: int


class DivergedError(WorkbenchError):
    """Training went wrong at a step; the message names it, and so does `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def summed_loss(model: Decoder, inputs: Tensor, targets: Tensor, precision: Precision = "float32") -> Tensor:
    """−Σ ln p(target) in nats over the scored positions of inputs and targets, (B, T) each."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def evaluate(model: Decoder, blocks: TokenBlocks, batch_size: int = 32, precision: Precision = "float32") -> float:
    """Mean next-token loss of `model` on `blocks`, in nats a token; exp of it is the perplexity."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for indices in torch.arange(len(blocks)).split(batch_size):
            batch = blocks.batch(indices).to(device)
            total += summed_loss(model, *batch, precision).item()
            count += int((batch.targets != IGNORED).sum())
    return total / count


class Trainer:
    """AdamW on the next-token loss, with a linear warm-up and a cosine decay of the learning rate.

        loss = −mean ln p(next token)
        rate(s) = highest · (s + 1) / w                                       for the first w of S steps, s = 0, 1, …
        rate(s) = highest · (f + (1 − f)·(1 + cos π·(s − w)/(S − w)) / 2)     for the others

    A run is `train` or `train_steps`. A cancelled run keeps what was learned; `resume` goes on with it, in the same
    process or, after `save` and `load`, in another: there it takes the very steps that it would have taken here.

    Args:
        model: learns in place, on the device where it is.
        dataset: what it learns from.
        options: how.
        held_out: what `evaluate` measures on; the last tenth of `dataset`, which is then not learned, if left out.
        on_step: called after every step.
        cancelled: asked before every step; the run ends when it says True.

    Raises:
        InputError: a token that the model does not have, blocks beyond its context, too few blocks, or a dataset that
            cannot be split where `held_out` is left out.

    Source: Loshchilov and Hutter 2019, AdamW; schedule: Radford et al. 2018, GPT.
    """

    def __init__(
        self,
        model: Decoder,
        dataset: Dataset,
        options: TrainerOptions | None = None,
        *,
        held_out: TokenBlocks | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        if held_out is None:
            if not isinstance(dataset, TokenBlocks):
                raise InputError(f"A {type(dataset).__name__} has no part of its own to test on: give held_out.")
            dataset, held_out = dataset.split(0.1)
        self.model, self.dataset, self.held_out = model, dataset, held_out
        self.on_step, self.cancelled = on_step, cancelled
        self.step = self.total_steps = 0
        self._check_blocks(held_out)
        if isinstance(dataset, TokenBlocks):
            self._check_blocks(dataset)
        options = options or TrainerOptions()
        self._configure(options, self._make_optimizer(options))

    def _configure(self, options: TrainerOptions, optimizer: torch.optim.Optimizer) -> None:
        self.options, self._optimizer = options, optimizer
        self.model.gradient_checkpointing = options.gradient_checkpointing
        self._loss = torch.compile(summed_loss) if options.compile else summed_loss

    def _make_optimizer(self, options: TrainerOptions) -> torch.optim.Optimizer:
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            fused=self.device.type == "cuda",
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every sample once; samples that fill no step wait for another epoch's order."""
        return max(1, len(self.dataset) // self._samples_per_step)

    @property
    def _samples_per_step(self) -> int:
        return self.options.batch_size * self.options.accumulate

    def evaluate(self) -> float:
        """Mean next-token loss on the held-out blocks, in nats a token."""
        return evaluate(self.model, self.held_out, self.options.batch_size, self.options.precision)

    def train(self, epochs: int) -> list[float]:
        """Start a run over the dataset.

        Args:
            epochs: how often every sample is seen, at least 1.

        Returns:
            One mean training loss an epoch, in nats a token; fewer if the run was cancelled.

        Raises:
            InputError: no epoch.
            DivergedError: as for `train_steps`.
        """
        if epochs < 1:
            raise InputError(f"epochs is {epochs}: give 1 or more.")
        per_epoch = self.steps_per_epoch
        losses = self.train_steps(epochs * per_epoch)
        return [statistics.fmean(losses[start : start + per_epoch]) for start in range(0, len(losses), per_epoch)]

    def train_steps(self, steps: int) -> list[float]:
        """Start a run of so many steps.

        Returns:
            The loss of each step, in nats a token; fewer if the run was cancelled.

        Raises:
            InputError: no step.
            DivergedError: the loss or its gradient is no finite number, or far worse than guessing; the weights are
                those before that step.
        """
        if steps < 1:
            raise InputError(f"steps is {steps}: give 1 or more.")
        self.step, self.total_steps = 0, steps
        torch.manual_seed(self.options.seed)
        return self.resume()

    def resume(self) -> list[float]:
        """Go on with the run until its last step; returns and raises as `train_steps`."""
        losses = []
        with in_mode(self.model, training=True):
            while self.step < self.total_steps and not (self.cancelled and self.cancelled()):
                report = self._take_step()
                losses.append(report.loss)
                if self.on_step is not None:
                    self.on_step(report)
        return losses

    def save(self, path: str | os.PathLike) -> None:
        """Write weights, optimizer, random generators and the place in the run to a safetensors file."""
        facts = RunFacts(
            step=self.step,
            total_steps=self.total_steps,
            options=self.options,
            samples=len(self.dataset),
            block_size=self.dataset.block_size,
            data=self._fingerprint(),
        )
        training_state.write(path, training_state.collect(self.model, self._optimizer), facts.model_dump())

    def load(self, path: str | os.PathLike) -> None:
        """Take over what `save` wrote, its options included: `resume` then takes the very steps that were left.

        Raises:
            InputError: the file is missing, damaged, of another model or of another dataset; nothing has changed then.
        """
        tensors, header = training_state.read(path)
        try:
            facts = RunFacts(**header)
        except (InputError, TypeError) as error:
            raise DamagedCheckpointError from error
        here = (len(self.dataset), self.dataset.block_size)
        if (facts.samples, facts.block_size) != here:
            raise InputError(
                f"The checkpoint was trained on {facts.samples} samples of {facts.block_size} tokens, here are "
                f"{here[0]} of {here[1]}: give the same text and block size."
            )
        if facts.data != self._fingerprint():
            raise InputError("The checkpoint was trained on other samples of the same sizes: give the same text.")
        optimizer = self._make_optimizer(facts.options)
        training_state.restore(self.model, optimizer, tensors, begun=facts.step > 0)
        self._configure(facts.options, optimizer)
        self.step, self.total_steps = facts.step, facts.total_steps

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 0, as the class describes."""
        options = self.options
        warmup = round(options.warmup * self.total_steps)
        if step < warmup:
            return options.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return options.learning_rate * (options.final_rate + (1 - options.final_rate) * cosine)

    def _take_step(self) -> StepReport:
        began = time.perf_counter()
        rate = self.learning_rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(self.step)
        scored = (batch.targets != IGNORED).sum().clamp(min=1)
        loss = torch.zeros((), device=self.device)
        self._optimizer.zero_grad()
        for inputs, targets in zip(*(part.split(self.options.batch_size) for part in batch), strict=True):
            share = self._loss(self.model, inputs, targets, self.options.precision) / scored
            share.backward()
            loss += share.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self._check_finite(loss.item(), norm.item(), rate)
        self._optimizer.step()
        self.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        return StepReport(
            step=self.step,
            total=self.total_steps,
            loss=loss.item(),
            learning_rate=rate,
            grad_norm=norm.item(),
            tokens_per_second=int(batch.read.sum()) / seconds,
            memory_bytes=self._memory(),
        )

    def _batch(self, step: int) -> Batch:
        """The samples of a step follow from the seed and its number alone: there is no place in the data to save."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.dataset), generator=self._generator(_ORDER, epoch))
        chosen = order[place * self._samples_per_step : (place + 1) * self._samples_per_step]
        return self.dataset.batch(chosen, self._generator(_DRAWS, step)).to(self.device)

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        """One of its own for every seed, purpose and number; PyTorch's reads the lowest 32 bits of a seed alone."""
        mixed = np.random.SeedSequence((self.options.seed, purpose, number)).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    def _fingerprint(self) -> str:
        """Of the first, the middle and the last sample, and of what is random about them."""
        indices = torch.tensor([0, len(self.dataset) // 2, len(self.dataset) - 1])
        batch = self.dataset.batch(indices, torch.Generator().manual_seed(0))
        content = b"".join(part.cpu().long().numpy().tobytes() for part in batch)
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def _check_finite(self, loss: float, norm: float, rate: float) -> None:
        guessing = math.log(self.model.config.vocab_size)
        if not math.isfinite(loss):
            self._stop("the loss is no number any more", rate)
        if not math.isfinite(norm):
            self._stop("the gradient is no number any more", rate)
        if self.step > 0 and loss > 3 * guessing:
            self._stop(f"the loss is {loss:.3g}, guessing would cost {guessing:.3g}", rate)

    def _stop(self, what: str, rate: float) -> NoReturn:
        step, highest = self.step + 1, self.options.learning_rate
        warming = rate < highest and step <= round(self.options.warmup * self.total_steps)
        way = f", in its warm-up, on the way to {highest:.3g}" if warming else f", after at most {highest:.3g}"
        raise DivergedError(
            f"Training diverged at step {step} of {self.total_steps}: {what}; the learning rate was {rate:.3g}"
            f"{way if rate != highest else ''}: try a tenth of what was set, {highest / 10:.2g}.",
            step,
        )

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _check_blocks(self, blocks: TokenBlocks) -> None:
        config = self.model.config
        if blocks.block_size > config.max_seq_len:
            raise InputError(
                f"The blocks have {blocks.block_size} tokens, the model's context holds {config.max_seq_len}: "
                "choose shorter blocks."
            )
        low, high = int(blocks.ids.min()), int(blocks.ids.max())
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"Token {wrong} does not exist: the model has tokens 0 to {config.vocab_size - 1}; "
                "use the tokenizer that it was made for."
            )
