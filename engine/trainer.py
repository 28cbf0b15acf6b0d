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
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import processes, training_state
from engine.data import IGNORED, Batch, Dataset, TokenBlocks
from engine.errors import InputError
from engine.model import Decoder, evaluating, in_mode
from engine.optim import PagedAdamW
from engine.training_run import (
    DivergedError,
    Evaluation,
    Precision,
    RunFacts,
    StepReport,
    TrainerOptions,
    out_of_patience,
    since_best,
)
from engine.training_state import DamagedCheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator

_ORDER, _DRAWS, _DROPOUT = 0, 1, 2

_ENOUGH_TO_JUDGE = 64
"""Scored tokens whose mean loss can tell a run that diverged from a token that surprises."""


def summed_loss(model: Decoder, inputs: Tensor, targets: Tensor, precision: Precision = "float32") -> Tensor:
    """−Σ ln p(target) in nats over the scored positions of inputs and targets, (B, T) each."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def evaluate(model: Decoder, blocks: TokenBlocks, batch_size: int = 32, precision: Precision = "float32") -> float:
    """Mean next-token loss of `model` on `blocks`, in nats a token; exp of it is the perplexity."""
    total, count = _evaluate_part(model, blocks, torch.arange(len(blocks)), batch_size, precision)
    return total / count


def _evaluate_part(
    model: Decoder, blocks: TokenBlocks, chosen: Tensor, batch_size: int, precision: Precision
) -> tuple[float, int]:
    """The summed loss of the `chosen` blocks, and over how many tokens."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for indices in chosen.split(batch_size):
            if len(indices):  # an empty share is one empty part
                batch = blocks.batch(indices).to(device)
                total += summed_loss(model, *batch, precision).item()
                count += int((batch.targets != IGNORED).sum())
    return total, count


class Trainer:
    """AdamW on the next-token loss, with a linear warm-up and a cosine decay of the learning rate.

        loss = −mean ln p(next token)
        rate(s) = highest · (s + 1) / w                                       for the first w of S steps, s = 0, 1, …
        rate(s) = highest · (f + (1 − f)·(1 + cos π·(s − w)/(S − w)) / 2)     for the others

    What is frozen stays as it is, and the optimizer keeps nothing of it. With `optimizer="paged AdamW"` what it keeps
    of the others may leave the GPU (`engine.optim.PagedAdamW`).

    A run is `train` or `train_steps`. A cancelled run keeps what was learned; `resume` goes on with it, in the same
    process or, after `save` and `load`, in another: there it takes the very steps that it would have taken here.

    With `evaluate_every` the held-out loss is taken after so many steps, again and again, and after the last step
    (`evaluations`). With `patience` P as well the run ends early once P evaluations in a row were not lower than the
    lowest before them, and however it comes to its end, early or at its last step, the weights of the lowest one are
    put back. A run without `patience` keeps those of its last step, and so does one that is cancelled, with which
    `resume` can go on, or that diverges. Evaluating changes no step.

    What the optimizer remembers belongs to the weights of its last step: it is forgotten where others are put back, and
    where a new run starts.

    Several processes train one model, usually on a GPU each, if they have a process group (or `accelerator`) when the
    trainer is made. Each has the same model, dataset and options, and calls the same methods. `batch_size` stays that
    of all together: every process computes its share of each step's samples, gradients are averaged, weighted by
    scored tokens, and so N processes take the steps of one, but for float rounding and dropout. All of them report the
    same loss, which is that of all samples; the main one writes checkpoints, which any number of processes can load.
    If one is cancelled or fails between steps, all end.

    Args:
        model: learns in place, on the device where it is.
        dataset: what it learns from.
        options: how.
        held_out: what `evaluate` measures on; the last tenth of `dataset`, which is then not learned, if left out.
        on_step: called after every step.
        cancelled: asked before every step; the run ends when it says True.
        accelerator: of the processes that train together, if a process group of theirs is not enough to go by.

    Raises:
        InputError: a token that the model does not have, blocks beyond its context, too few blocks, a dataset that
            cannot be split where `held_out` is left out, fewer samples at once than processes, or an accelerator for
            something else than whole models in float32.

    Source: Loshchilov and Hutter 2019, AdamW; schedule: Radford et al. 2018, GPT; early stopping:
    Goodfellow et al. 2016, "Deep learning", algorithm 7.1; several processes: Li et al. 2020, PyTorch Distributed.
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
        accelerator: Accelerator | None = None,
    ) -> None:
        if held_out is None:
            if not isinstance(dataset, TokenBlocks):
                raise InputError(f"A {type(dataset).__name__} has no part of its own to test on: give held_out.")
            dataset, held_out = dataset.split(0.1)
        self.model, self.dataset, self.held_out = model, dataset, held_out
        self.on_step, self.cancelled = on_step, cancelled
        self.step = self.total_steps = 0
        self.evaluations: list[Evaluation] = []
        """(step, held-out loss in nats a token) of the run so far, where `evaluate_every` asked for it."""
        self._best: dict[str, Tensor] = {}
        self._learner: nn.Module | None = None
        self._unjudged: list[tuple[float, int]] = []
        """Loss and scored tokens of the last steps, until they are enough to judge."""
        self._check_blocks(held_out)
        if isinstance(dataset, TokenBlocks):
            self._check_blocks(dataset)
        options = options or TrainerOptions()
        self._processes = processes.join(model, accelerator)
        self._check_shares(options)
        self._configure(options, self._make_optimizer(options))
        self._processes.align(model)

    def _configure(self, options: TrainerOptions, optimizer: torch.optim.Optimizer) -> None:
        self.options, self._optimizer = options, optimizer
        self.model.gradient_checkpointing = options.gradient_checkpointing
        self._loss = torch.compile(summed_loss) if options.compile else summed_loss

    def _make_optimizer(self, options: TrainerOptions) -> torch.optim.Optimizer:
        groups = self._groups(options)
        chosen = {"lr": options.learning_rate, "betas": (options.beta1, options.beta2)}
        if options.optimizer == "paged AdamW":
            return PagedAdamW(groups, **chosen)
        return torch.optim.AdamW(groups, **chosen, fused=self.device.type == "cuda")

    def _groups(self, options: TrainerOptions) -> list[dict[str, Any]]:
        """What the optimizer changes, and what is peculiar to a part of it."""
        matrices = [parameter for parameter in self._learning if parameter.dim() > 1]
        vectors = [parameter for parameter in self._learning if parameter.dim() <= 1]
        return [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def _learning(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every sample once; samples that fill no step wait for another epoch's order."""
        return max(1, len(self.dataset) // self._samples_per_step)

    @property
    def _samples_per_step(self) -> int:
        return self.options.batch_size * self.options.accumulate

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended because so many evaluations as `patience` says were no better than one before."""
        return out_of_patience(self.evaluations, self.options)

    def evaluate(self) -> float:
        """Mean next-token loss on the held-out blocks, in nats a token."""
        mine = torch.arange(len(self.held_out))[self._processes.share]
        part = _evaluate_part(self.model, self.held_out, mine, self._at_once, self.options.precision)
        total, count = self._processes.sum(*part)
        return total / count

    def train(self, epochs: int) -> list[float]:
        """Start a run over the dataset.

        Args:
            epochs: how often every sample is seen, at least 1.

        Returns:
            One mean training loss an epoch, in nats a token; fewer if the run was cancelled or stopped early, and
            then the last may be that of a part of an epoch.

        Raises:
            InputError: no epoch, or nothing to learn.
            DivergedError: as for `train_steps`.
        """
        if epochs < 1:
            raise InputError(f"epochs is {epochs}: give 1 or more.")
        per_epoch = self.steps_per_epoch
        losses = self.train_steps(epochs * per_epoch)
        return [statistics.fmean(losses[start : start + per_epoch]) for start in range(0, len(losses), per_epoch)]

    def train_steps(self, steps: int) -> list[float]:
        """Start a run of so many steps, with a new schedule and an optimizer that remembers nothing.

        Returns:
            The loss of each step, in nats a token; fewer if the run was cancelled or stopped early.

        Raises:
            InputError: no step, or every weight is frozen.
            DivergedError: the loss or its gradient is no finite number, or far worse than guessing; the weights are
                those before that step.
            OtherProcessError: `on_step` or `cancelled` failed in another process of the run.
        """
        if steps < 1:
            raise InputError(f"steps is {steps}: give 1 or more.")
        if not self._learning:
            raise InputError("Every weight of the model is frozen: give it adapters, or weights that may learn.")
        self.step, self.total_steps = 0, steps
        self.evaluations, self._best, self._unjudged = [], {}, []
        self._optimizer.state.clear()
        self._seed_dropout()
        return self.resume()

    def resume(self) -> list[float]:
        """Go on with the run until its last step; returns and raises as `train_steps`."""
        if self._learner is None:
            self._learner = self._processes.wrap(self.model)
        losses, ended = [], self._processes.any(self._asked_off)
        with in_mode(self.model, training=True):
            while not (ended or self._finished):
                report = self._take_step()
                losses.append(report.loss)
                ended = self._processes.any(partial(self._tell, report))
        return losses

    def save(self, path: str | os.PathLike) -> None:
        """Write weights, optimizer, random generators and the place in the run to a safetensors file.

        Of several processes all call it, and the main one writes.
        """
        facts = RunFacts(
            step=self.step,
            total_steps=self.total_steps,
            options=self.options,
            samples=len(self.dataset),
            block_size=self.dataset.block_size,
            data=self._fingerprint(),
            evaluations=tuple(self.evaluations),
        )
        states = self._processes.gather(training_state.random_states(self.model))

        def write() -> None:
            tensors = training_state.collect(self.model, self._optimizer)
            tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
            training_state.write(path, tensors | training_state.name_random(states), facts.model_dump())

        self._processes.any(lambda: self._processes.rank == 0 and write())

    def load(self, path: str | os.PathLike) -> None:
        """Take over what `save` wrote, its options included: `resume` then takes the very steps that were left.

        Of several processes each reads `path`, and none changes anything before all have found it good.

        Raises:
            InputError: the file is missing, damaged, of another model or of another dataset; nothing has changed then.
            OtherProcessError: it is so in another process; nothing has changed here either.
        """
        tensors, facts = self._processes.complete(partial(self._read, path))
        self._processes.complete(partial(self._take_over, tensors, facts))

    def _read(self, path: str | os.PathLike) -> tuple[dict[str, Tensor], RunFacts]:
        """The tensors and facts of a checkpoint with which this run can go on."""
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
        self._check_shares(facts.options)
        best = training_state.part(tensors, "best.")
        if best or facts.has_best:
            training_state.check_learned(self.model, best)
        remembers = facts.step > 0 and not (facts.finished and facts.has_best)
        training_state.check(self.model, tensors, remembers, self._processes.rank)
        return tensors, facts

    def _take_over(self, tensors: dict[str, Tensor], facts: RunFacts) -> None:
        optimizer = self._make_optimizer(facts.options)
        found_random = training_state.restore(self.model, optimizer, tensors, self._processes.rank)
        self._configure(facts.options, optimizer)
        self.step, self.total_steps = facts.step, facts.total_steps
        self.evaluations, self._best = list(facts.evaluations), training_state.part(tensors, "best.")
        if not found_random:
            self._seed_dropout()

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
        scored = int((batch.targets != IGNORED).sum())
        loss = self._sum_gradients(batch, scored)
        norm = nn.utils.clip_grad_norm_(self._learning, self.options.max_grad_norm).item()
        self._check_sane(loss, norm, rate, scored)
        self._optimizer.step()
        self.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        return StepReport(
            step=self.step,
            total=self.total_steps,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=int(batch.read.sum()) / seconds,
            memory_bytes=self._memory(),
            held_out_loss=self._examine(),
        )

    def _sum_gradients(self, batch: Batch, scored: int) -> float:
        """Leave the gradient of the mean loss of `batch`, of which this process computes its share, in the weights."""
        loss = torch.zeros((), device=self.device)
        self._optimizer.zero_grad()
        parts = self._parts(batch)
        for number, (inputs, targets) in enumerate(parts, start=1):
            last = number == len(parts)
            with nullcontext() if last else self._processes.accumulating(self._learner):
                share = self._loss(self._learner, inputs, targets, self.options.precision) / max(1, scored)
                (share * self._processes.count).backward()  # of which the mean over the processes is taken
            loss += share.detach()
        return self._processes.sum(loss)[0]

    def _parts(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This process's samples of a step, as many at once as fit: in every process the same number of parts."""
        samples, count = len(batch.inputs), self._processes.count
        number = min(math.ceil(samples / self.options.batch_size), samples // count)
        mine = (part[self._processes.share].to(self.device, non_blocking=True) for part in batch)
        return list(zip(*(part.tensor_split(number) for part in mine), strict=True))

    @property
    def _at_once(self) -> int:
        """Samples that one process computes at once."""
        return math.ceil(self.options.batch_size / self._processes.count)

    def _examine(self) -> float | None:
        """Evaluate if it is time for it; keep the weights if they are the best, and put the best back at the end."""
        options, at_end = self.options, self.step == self.total_steps
        if options.evaluate_every is None or (self.step % options.evaluate_every and not at_end):
            return None
        loss = self.evaluate()
        self.evaluations.append((self.step, loss))
        if options.patience is not None and since_best(self.evaluations) == 0:
            self._best = training_state.copy_learned(self.model)
        if self._best and self._finished:
            training_state.put_back(self.model, self._best)
            self._optimizer.state.clear()
        return loss

    @property
    def _finished(self) -> bool:
        return self.step >= self.total_steps or self.stopped_early

    def _asked_off(self) -> bool:
        """Whether the run is to end before its next step."""
        return not self._finished and self.cancelled is not None and self.cancelled()

    def _tell(self, report: StepReport) -> bool:
        """Report a step; returns `_asked_off`, since the processes agree on errors and on that at once."""
        if self.on_step is not None:
            self.on_step(report)
        return self._asked_off()

    def _seed_dropout(self) -> None:
        """Let this process draw numbers of its own from here on; alone, those that the seed names."""
        rank = self._processes.rank
        seed = self.options.seed if rank == 0 else self._generator(_DROPOUT, rank).initial_seed() + self.step
        torch.manual_seed(seed)

    def _batch(self, step: int) -> Batch:
        """The samples of a step follow from the seed and its number alone: there is no place in the data to save."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.dataset), generator=self._generator(_ORDER, epoch))
        chosen = order[place * self._samples_per_step : (place + 1) * self._samples_per_step]
        return self.dataset.batch(chosen, self._generator(_DRAWS, step))

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

    def _check_sane(self, loss: float, norm: float, rate: float, scored: int) -> None:
        guessing = math.log(self.model.config.vocab_size)
        if not math.isfinite(loss):
            self._stop("the loss is no number any more", rate)
        if not math.isfinite(norm):
            self._stop("the gradient is no number any more", rate)
        if self.step == 0:
            return
        self._unjudged.append((loss, scored))
        tokens = sum(count for _, count in self._unjudged)
        if tokens >= _ENOUGH_TO_JUDGE:
            mean = sum(each * count for each, count in self._unjudged) / tokens
            self._unjudged.clear()
            if mean > 3 * guessing:
                self._stop(f"the loss is {mean:.3g}, guessing would cost {guessing:.3g}", rate)

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

    def _check_shares(self, options: TrainerOptions) -> None:
        count, least = self._processes.count, min(options.batch_size, len(self.dataset))
        if least < count:
            raise InputError(f"{count} processes cannot share {least} samples: give at least one for each at once.")
