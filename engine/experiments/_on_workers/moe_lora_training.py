"""How the three models of the MoE-LoRA lab learn, and what they are asked meanwhile.

Legend: N adapted projections, J tasks, E experts, R rank, B lessons, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import llama
from engine.data import IGNORED
from engine.errors import InputError
from engine.experiments import _lora
from engine.experiments._moe_lora import SCALING, MixtureParams, Role
from engine.experiments._router_sources import count_pairs, mutual_information
from engine.experiments.moe_lora import CHECKUPS, Anatomy, Answer, Params, Run
from engine.finetuning.lessons import Lessons, answer
from engine.lora.injection import inject_lora
from engine.lora.spectrum import singular_values
from engine.model import Decoder, evaluating
from engine.moe.injection import inject_moe_lora, moe_lora_layers, without_expert
from engine.moe.lora import MoELoRALayer
from engine.moe.observation import observing
from engine.moe.tasks import read_tasks
from engine.pretrained import Pretrained
from engine.trainer import DivergedError, StepReport, Trainer, TrainerOptions

FILLER = 0
"""The token with which `Lessons` fills up; no lesson holds it, as it is the models' end token."""

_SPOKEN = 3
"""Answers of each task that are shown."""


def adapt(role: Role, params: MixtureParams, base: Pretrained) -> Decoder:
    """A copy of the model with fresh adapters, which alone learn."""
    torch.manual_seed(params.seed)
    model = llama.from_transformers(base.model)
    targets, rank = _lora.TARGETS[params.targets], params.size(role).rank
    if role != "MoE-LoRA":
        inject_lora(model, rank, SCALING * rank, targets)
        return model
    inject_moe_lora(
        model, params.experts, rank, params.top_k, targets, alpha=SCALING * rank, shared_a=params.shared_a,
        kind=params.kind, bias_rate=params.bias_rate,
    )  # fmt: skip
    ignore_filling(model)
    return model


def ignore_filling(model: Decoder) -> None:
    """Tell every mixture in `model` which positions are filled up: they go to no expert and balance nothing."""
    filling: list[Tensor | None] = [None]

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        filled = args[0] == FILLER  # (B, T)
        filling[0] = filled if filled.any() else None

    def tell(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict]:
        return args, named | {"padding": filling[0]}

    model.embed_tokens.register_forward_pre_hook(look)
    for layer in moe_lora_layers(model).values():
        layer.register_forward_pre_hook(tell, with_kwargs=True)


@dataclass(frozen=True)
class Checkup:
    """What a model knew after a step.

    Args:
        step: after which it was asked.
        loss: (J,), nats a token of the answers.
        accuracy: (J,), share of the questions answered exactly.
        routing: (J, N, E), share of a task's tokens that each expert gets; N is 0 without a mixture.
        information: (N,), mutual information of expert and task over the entropy of the tasks.
    """

    step: int
    loss: np.ndarray
    accuracy: np.ndarray
    routing: np.ndarray
    information: np.ndarray


class Examination:
    """The held-out questions of all tasks, asked in one pass.

    Args:
        base: whose tokenizer is used.
    """

    def __init__(self, base: Pretrained) -> None:
        tasks = read_tasks()
        lessons = Lessons([pair for task in tasks for pair in task.held_out], base.tokenizer, base.max_tokens)
        self.inputs, self.targets = lessons.batch(torch.arange(len(lessons))).to(base.device)
        self.task = torch.tensor([index for index, task in enumerate(tasks) for _ in task.held_out])  # (B,)
        self.tasks = len(tasks)

    def take(self, model: Decoder, step: int = 0) -> Checkup:
        """Ask everything."""
        scored = self.targets != IGNORED  # (B, T)
        with evaluating(model), observing(model) as seen:
            logits = model.lm_head(model.hidden(self.inputs)[scored]).float()  # (scored, V)
        wrong = logits.argmax(-1) != self.targets[scored]
        lesson = scored.nonzero()[:, 0].cpu()
        task = self.task[lesson]  # (scored,)
        nats = F.cross_entropy(logits, self.targets[scored], reduction="none").cpu()
        loss = torch.zeros(self.tasks).index_add(0, task, nats) / torch.bincount(task, minlength=self.tasks)
        missed = torch.zeros(len(self.task)).index_add(0, lesson, wrong.float().cpu()) > 0  # (B,)
        accuracy = [(~missed[self.task == index]).float().mean().item() for index in range(self.tasks)]
        counts = [self._counts(routing.tokens, routing.experts, routing.logits.shape[1]) for _, routing in seen]
        available = math.log(self.tasks)
        return Checkup(
            step=step,
            loss=loss.numpy(),
            accuracy=np.array(accuracy),
            routing=_shares(counts, self.tasks),
            information=np.array([mutual_information(table) / available for table in counts]),
        )

    def _counts(self, tokens: Tensor, experts: Tensor, num_experts: int) -> np.ndarray:
        """(J, E), tokens of each task that each expert gets, each task with the weight of the others."""
        task = self.task[tokens.cpu() // self.inputs.shape[1]]
        counts = count_pairs(task.numpy(), experts.cpu().numpy(), self.tasks, num_experts)
        return counts / counts.sum(1, keepdims=True)


def _shares(counts: list[np.ndarray], tasks: int) -> np.ndarray:
    return np.stack(counts, axis=1) if counts else np.zeros((tasks, 0, 0))


class Leg:
    """One of the trainings.

    Args:
        role: what it is there for.
        params: of the whole.
        base: what is adapted.
        exam: that it takes now and then.
        follow: called after every step.
        cancelled: asked before every step.
    """

    def __init__(
        self,
        role: Role,
        params: Params,
        base: Pretrained,
        exam: Examination,
        *,
        follow: Callable[[], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.role, self.params, self.exam = role, params, exam
        self.model = adapt(role, params, base)
        self.projections = list(moe_lora_layers(self.model))
        self.reports: list[StepReport] = []
        self.checkups: list[Checkup] = []
        self._follow, self._began, self._seconds = follow, time.monotonic(), None
        self._every = math.ceil(params.steps / CHECKUPS)
        pairs = [pair for task in read_tasks() for pair in task.training]
        lessons = Lessons(pairs, base.tokenizer, base.max_tokens)
        options = TrainerOptions(
            learning_rate=params.rate(role), batch_size=params.batch_size, weight_decay=0.0, seed=params.seed
        )
        self.trainer = Trainer(
            self.model, lessons, options, held_out=lessons, on_step=self._note, cancelled=cancelled
        )  # fmt: skip

    def _note(self, report: StepReport) -> None:
        self.reports.append(report)
        if report.step % self._every == 0:
            self.examine()
        self._follow()

    def train(self) -> None:
        """Take all steps, or as many as it is let.

        Raises:
            DivergedError: as `Trainer.train_steps`, or a router was given or has numbers that are not finite.
        """
        try:
            self.trainer.train_steps(self.params.steps)
        except InputError as error:
            step = self.trainer.step + 1
            raise DivergedError(f"Training diverged at step {step} of {self.params.steps}. {error}", step) from error

    def examine(self) -> None:
        """See what the model knows now; the same step twice: once."""
        if not self.checkups or self.checkups[-1].step != self.trainer.step:
            self.checkups.append(self.exam.take(self.model, self.trainer.step))

    def end(self, examine: bool) -> None:
        """Stop the clock, after a last examination if the model is in a state for it."""
        if examine:
            self.examine()
        self._seconds = time.monotonic() - self._began

    def run(self) -> Run:
        """What is known so far."""
        size = self.params.size(self.role)
        return Run(
            role=self.role,
            rank=size.rank,
            trainable=size.trainable,
            flops=size.flops,
            learning_rate=self.params.rate(self.role),
            step=np.array([report.step for report in self.reports], dtype=int),
            loss=np.array([report.loss for report in self.reports]),
            checked=np.array([checkup.step for checkup in self.checkups], dtype=int),
            task_loss=np.array([checkup.loss for checkup in self.checkups]),
            task_accuracy=np.array([checkup.accuracy for checkup in self.checkups]),
            seconds=time.monotonic() - self._began if self._seconds is None else self._seconds,
        )


@torch.no_grad()
def dissect(model: Decoder, exam: Examination) -> Anatomy:
    """What the experts are, and what becomes of the tasks without them."""
    layers = list(moe_lora_layers(model).values())
    whole = exam.take(model)
    favourite = whole.routing.argmax(-1)  # (J, N)
    off = []
    for index in range(layers[0].num_experts):
        with without_expert(model, index):
            off.append(exam.take(model))
    missed = []
    for chosen in favourite:
        with ExitStack() as switched:
            for layer, index in zip(layers, chosen.tolist(), strict=True):
                switched.enter_context(without_expert(layer, index))
            missed.append(exam.take(model))
    return Anatomy(
        spectra=np.stack([_spectra(layer) for layer in layers]),
        similarity=np.stack([similarity(layer) for layer in layers]),
        loss=whole.loss,
        accuracy=whole.accuracy,
        off_loss=np.stack([checkup.loss for checkup in off]),
        off_accuracy=np.stack([checkup.accuracy for checkup in off]),
        favourite=favourite,
        favourite_off_loss=np.stack([checkup.loss for checkup in missed]),
        favourite_off_accuracy=np.stack([checkup.accuracy for checkup in missed]),
    )


def _spectra(layer: MoELoRALayer) -> np.ndarray:
    """(E, R)."""
    return torch.stack([singular_values(expert.A, expert.B, layer.scaling) for expert in layer.experts]).cpu().numpy()


@torch.no_grad()
def similarity(layer: MoELoRALayer) -> np.ndarray:
    """Cosine between the experts' updates, (E, E), through the factors: ⟨AᵢBᵢ, AⱼBⱼ⟩ = Σ (AᵢᵀAⱼ) ⊙ (BᵢBⱼᵀ).

    An expert that is still 0 has no direction: its row and column are 0.
    """
    A = torch.stack([expert.A for expert in layer.experts]).double()  # (E, I, R)
    B = torch.stack([expert.B for expert in layer.experts]).double()  # (E, R, O)
    read = torch.einsum("eir,fis->efrs", A, A)  # (E, E, R, R)
    inner = (read * torch.einsum("ero,fso->efrs", B, B)).sum((-2, -1))  # (E, E)
    norms = inner.diagonal().clamp_min(0).sqrt()  # (E,)
    scale = norms[:, None] * norms
    return torch.where(scale > 0, inner / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0).cpu().numpy()


def speak(model: Decoder, base: Pretrained) -> list[Answer]:
    """What the model says to a few held-out questions of each task."""
    asked = [
        (task.name, *pair)
        for task in read_tasks()
        for pair in task.held_out[:: max(1, len(task.held_out) // _SPOKEN)][:_SPOKEN]
    ]
    said = answer(model, Lessons([(question, right) for _, question, right in asked], base.tokenizer, base.max_tokens))
    return [
        Answer(name, question, right, words, words == f"{right}.")
        for (name, question, right), words in zip(asked, said, strict=True)
    ]
