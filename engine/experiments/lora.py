"""LoRA fine-tuning, live: how small an update still teaches a model something.

Legend: S steps, M checkups, N adapted layers, K singular values of a layer, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, model_validator

from engine.experiments import ExperimentParams, _lora
from engine.experiments._ending import Ending, see_through
from engine.experiments._lora import Fact, Method, ModelName, Targets

if TYPE_CHECKING:
    from engine.finetuning.diary import Checkup
    from engine.runtime.jobs import Job
    from engine.trainer import StepReport

LEARNING_RATES: dict[Method, float] = {
    "LoRA": 5e-3,
    "rank-stabilized LoRA": 2e-3,
    "DoRA": 5e-3,
    "PiSSA": 5e-3,
    "LoRA+": 1e-3,
    "full fine-tuning": 1e-3,
}
"""Where each method starts: chosen by a few tries on the storyteller, not by a search; with LoRA+ it is A's rate."""

_CHARACTERS_PER_TOKEN = 3.5

_CHECKUPS = 8

_PUBLISHED: dict[ModelName, str] = {
    "storyteller": "storyteller",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",  # as in engine.checkpoints, which needs torch
}
"""What an adapter's file calls the model that it belongs to."""


class TuningParams(ExperimentParams):
    """A model, what to change of it, and how."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0
    returns_partial: ClassVar[bool] = True

    model: ModelName = Field(
        "storyteller",
        title="Model",
        description="storyteller (our own, 5.8 M parameters, a minute) or smollm2-135m (takes much longer on a CPU).",
    )
    method: Method = Field(
        "LoRA",
        title="Method",
        description="How the weights change: by a product of two thin matrices, by one of its variants, or freely.",
    )
    targets: Targets = Field("all", title="Adapted projections", description="Which matrices of every layer change.")
    alpha: float = Field(16.0, ge=1, le=512, title="alpha (α)", description="The update counts α / rank times.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        title="Learning rate",
        description="The highest one: it rises to it, then falls. Empty takes the method's own: "
        + ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
        + ".",
    )
    steps: int = Field(150, ge=1, le=2000, title="Steps", description="Updates of what is trained.")
    batch_size: int = Field(16, ge=1, le=128, title="Batch", description="Questions a step.")
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of A's first values and the questions' order.")

    @property
    def rate(self) -> float:
        """The learning rate that is meant."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class Cost:
    """What a run will take.

    Args:
        trainable: numbers that are trained.
        parameters: of the model without adapters.
        memory_bytes: that a model which learns allocates at its peak, estimated.
    """

    trainable: int
    parameters: int
    memory_bytes: int


class Params(TuningParams):
    """A model, an adapter and facts to learn."""

    cacheable: ClassVar[bool] = False

    rank: int = Field(8, ge=1, le=64, title="Rank", description="Columns of A, rows of B; full fine-tuning has none.")
    facts: str = Field(
        "",
        max_length=20_000,
        title="Your facts",
        description="A line each, “question | answer” or “question? answer”; empty takes those of an invented town.",
        json_schema_extra={"widget": "area"},
    )

    @model_validator(mode="after")
    def _check_facts(self) -> Params:
        _ = self.known  # raises a sentence if a line is no fact
        return self

    @property
    def known(self) -> list[Fact]:
        """The facts that are meant."""
        return _lora.parse_facts(self.facts) if self.facts.strip() else _lora.read_facts()

    @property
    def scaling(self) -> float | None:
        """s, how often the update counts: α / R, for rank-stabilized LoRA α / √R; None for full fine-tuning."""
        if self.method == "full fine-tuning":
            return None
        return self.alpha / (math.sqrt(self.rank) if self.method == "rank-stabilized LoRA" else self.rank)

    def predict(self) -> Cost:
        """What the run will take, before anything runs; how long, it says itself once it has taken a step.

            Q = Σ R·(I + O), with DoRA Σ R·(I + O) + O, over the adapted projections; P for full fine-tuning
            bytes = 4·(P + adapters' numbers + 2 Q + max(Q + W, B·T·(L·saved + D + 3 V)))

        P parameters of the model; each of the Q numbers that are trained has AdamW's two means. Its gradient comes as
        the activations go, so that the larger of both counts: those are what the backward pass needs of each layer and
        of the last norm, and three of the size of the logits. W are AdamW's two copies of the embedding, which is by
        far the largest matrix that can be trained.
        """
        shape = _lora.shape_of(self.model)
        adapter = _lora.adapter_parameters(shape, self.rank, self.targets).total
        if self.method == "DoRA":
            adapter += shape.num_layers * self._adapted_outputs
        full = self.method == "full fine-tuning"
        trainable = shape.config.num_parameters if full else adapter
        beside = 0 if full else 2 * adapter if self.method == "PiSSA" else adapter  # PiSSA keeps where it started
        position = shape.num_layers * self._saved_per_layer() + shape.d_model + 3 * shape.vocab_size
        longest = math.ceil(self._longest / _CHARACTERS_PER_TOKEN) - 1  # the last token is said, not read
        questions = sum(len(fact.training) for fact in self.known)
        activations = min(self.batch_size, questions) * longest * position
        updating = trainable + (2 * shape.vocab_size * shape.d_model if full else 0)
        numbers = shape.config.num_parameters + beside + 2 * trainable + max(updating, activations)
        return Cost(trainable, shape.config.num_parameters, 4 * numbers)

    def _saved_per_layer(self) -> int:
        """Numbers of one position that the backward pass through one layer needs.

        Always: what the two norms receive, queries, keys, values and heads after the rotation, and of the feed-forward
        network gate, silu(gate) and up. What a projection receives is kept only if that or its adapter is trained.
        """
        shape, full = _lora.shape_of(self.model), self.method == "full fine-tuning"
        trained = set(_lora.TARGETS["all" if full else self.targets])
        heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        saved = 2 * shape.d_model + heads + 3 * shape.ffn_dim
        saved += shape.d_model * bool(trained & {"q_proj", "k_proj", "v_proj"})
        saved += shape.d_model * bool(trained & {"gate_proj", "up_proj"})
        saved += shape.ffn_dim * ("down_proj" in trained)
        if full:
            return saved + 2 * shape.d_model  # of the norms, whose gains are trained too
        return saved + self.rank * len(trained) + (self._adapted_outputs if self.method == "DoRA" else 0)

    @property
    def _adapted_outputs(self) -> int:
        """Σ O over the adapted projections of one layer."""
        shapes = _lora.shape_of(self.model).config.projections
        return sum(shapes[name][1] for name in _lora.TARGETS[self.targets])

    @property
    def _longest(self) -> int:
        """Characters of the longest question with its answer."""
        return max(len(question) + len(fact.answer) for fact in self.known for question in fact.training)

    def memory_bytes(self) -> int:
        """What a run allocates at its peak: what `predict` says and twice the weights.

        For the model as it is published stays in memory, and one copy learns while the steps of another are weighed.
        """
        cost = self.predict()
        return cost.memory_bytes + 2 * _lora.BYTES["float32"] * cost.parameters


@dataclass(frozen=True)
class Answer:
    """A question and what the model says, before training and after; while it is running, `after` is empty.

    Args:
        question: that it is asked.
        expected: the answer.
        before, after: what it says, greedily, up to the answer's full stop.
        held_out: whether the question was never trained on in these words.
        right_before, right_after: whether it begins with exactly the answer and a full stop.
    """

    question: str
    expected: str
    before: str
    after: str
    held_out: bool
    right_before: bool
    right_after: bool


@dataclass(frozen=True)
class Result:
    """A fine-tuning, up to where it ended or, while it is running, up to where it is.

    Args:
        step, loss, tokens_per_second: (S,), of each step that was taken; the loss in nats a token of the answers,
            before the step's update.
        grad_norm_a, grad_norm_b: (S,), of all As and of all Bs, before clipping; (0,) for full fine-tuning.
        checked: (M,) steps after which the model was asked, 0 among them.
        accuracy: (M,), share of the training questions that it answers rightly.
        held_out_accuracy: (M,), of the paraphrases that are never trained on; (0,) if there are none, as for a
            learner's own facts.
        answers: a training question of every fact, then the paraphrases of every fact.
        layers: N names of the layers that changed; for full fine-tuning those that an adapter would have had. They
            and what follows are empty while it is running.
        spectra: (N, K), singular values of each ΔW, largest first. K is R for LoRA, 2 R for PiSSA, whose update starts
            inside the weight, and the most that a layer has for DoRA and full fine-tuning; fewer are filled up with 0.
        effective_rank: (N,), exp of the entropy of a layer's singular values.
        relative_norm: (N,), ‖ΔW‖ / ‖W‖.
        delta_maps: by layer, |ΔW| with O rows and I columns, pooled to at most 64 × 64 by the maximum of each block.
        merged_difference: largest |logit of the merged model − logit of the unmerged|; 0 for full fine-tuning.
        logit_scale: largest |logit| of the same questions.
        trainable: numbers that are trained.
        parameters: of the model without adapters.
        adapter_bytes: of what was learned, as a file in float32.
        steps: of the whole run, whether they were taken or not.
        learning_rate: the highest.
        ended: why it ended, or that it has not.
        ending: the same as a sentence.
        seconds: of training, checkups included.
        seconds_left: estimated.
        peak_memory_bytes: that the model, gradients, AdamW's means and two steps allocate, weighed before the start.
        device: where it ran.
        versions: of what took part.
        archive: the adapter as a zip of a folder in PEFT's format; empty while it is running, and for full fine-tuning.
    """

    step: np.ndarray
    loss: np.ndarray
    tokens_per_second: np.ndarray
    grad_norm_a: np.ndarray
    grad_norm_b: np.ndarray
    checked: np.ndarray
    accuracy: np.ndarray
    held_out_accuracy: np.ndarray
    answers: list[Answer]
    layers: list[str]
    spectra: np.ndarray
    effective_rank: np.ndarray
    relative_norm: np.ndarray
    delta_maps: dict[str, np.ndarray]
    merged_difference: float
    logit_scale: float
    trainable: int
    parameters: int
    adapter_bytes: int
    steps: int
    learning_rate: float
    ended: Ending
    ending: str
    seconds: float
    seconds_left: float
    peak_memory_bytes: int
    device: str
    versions: dict[str, str]
    archive: bytes = b""


def run(params: Params, job: Job) -> Result:
    """Fine-tune until the last step, a cancellation or a divergence; whatever was learned by then is returned.

    What has been learned so far is shown on the way. What is published is left untouched: a copy learns.

    Raises:
        InputError: a fact is longer than the model's context.
    """
    import torch

    from engine import llama, pretrained
    from engine.finetuning import changes, methods
    from engine.finetuning.diary import Diary
    from engine.finetuning.lessons import Lessons, answer
    from engine.measure import device_name, versions
    from engine.trainer import TrainerOptions

    base = pretrained.load(params.model, job.device)
    facts = params.known

    def lessons(pairs: list[tuple[str, str]]) -> Lessons:
        return Lessons(pairs, base.tokenizer, base.max_tokens)

    learned = lessons([(question, fact.answer) for fact in facts for question in fact.training])
    asked = lessons([(fact.question, fact.answer) for fact in facts])
    unseen = [(question, fact.answer) for fact in facts for question in fact.paraphrases]
    held_out = lessons(unseen) if unseen else None
    options = TrainerOptions(
        learning_rate=params.rate,
        batch_size=min(params.batch_size, len(learned)),
        weight_decay=0.0,
        seed=params.seed,
    )
    torch.manual_seed(params.seed)
    targets = _lora.TARGETS[params.targets]
    model = methods.prepare(llama.from_transformers(base.model), params.method, params.rank, params.alpha, targets)
    peak_memory_bytes, seconds_a_step = methods.rehearse(model, params.method, learned, options)
    diary = Diary(model, asked, held_out, options, every=math.ceil(params.steps / _CHECKUPS))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    where, software = device_name(job.device), versions()

    def ask() -> list[str]:
        return [said for questions in (asked, held_out) if questions for said in answer(model, questions)]

    def seconds_left() -> float:
        taken = len(diary.reports)
        each = (time.monotonic() - began) / taken if taken else seconds_a_step
        return each * (params.steps - taken)

    def result(ended: Ending, ending: str) -> Result:
        over = ended != "running"
        found = changes.examine(model, base.model.base_model, targets) if over else changes.NO_CHANGES
        difference, scale = changes.merged_difference(model, asked) if over else (0.0, 0.0)
        return Result(
            **diary.curves(),
            **vars(found),
            answers=_answers(facts, before, ask() if over else None, diary.checkups),
            merged_difference=difference,
            logit_scale=scale,
            trainable=trainable,
            parameters=base.num_parameters,
            adapter_bytes=_lora.BYTES["float32"] * trainable,
            steps=params.steps,
            learning_rate=params.rate,
            ended=ended,
            ending=ending,
            seconds=time.monotonic() - began,
            seconds_left=0.0 if over else seconds_left(),
            peak_memory_bytes=peak_memory_bytes,
            device=where,
            versions=software,
            archive=changes.pack(model, _PUBLISHED[params.model]) if over else b"",
        )

    def show() -> None:
        job.show(lambda: result("running", f"{trainer.step} of {params.steps} steps so far."))

    def follow(report: StepReport) -> None:
        diary.follow(report)
        last = diary.checkups[-1]
        held_out_accuracy = {} if held_out is None else {"held_out_accuracy": last.held_out_accuracy}
        job.report(
            report.step,
            params.steps,
            loss=report.loss,
            accuracy=last.accuracy,
            **held_out_accuracy,
            tokens_per_second=report.tokens_per_second,
            seconds_left=seconds_left(),
        )
        show()

    trainer = methods.make_trainer(
        model, params.method, learned, options, on_step=follow, cancelled=lambda: job.cancelled
    )
    before = ask()
    began = time.monotonic()
    diary.examine(0)
    show()
    ended, ending = see_through(lambda: trainer.train_steps(params.steps), trainer, params, job)
    diary.examine(trainer.step)
    return result(ended, ending)


def _answers(facts: list[Fact], before: list[str], after: list[str] | None, checkups: list[Checkup]) -> list[Answer]:
    """First every fact's own question, then its paraphrases, in the order in which the model was asked."""
    questions = [(fact.question, fact.answer, False) for fact in facts]
    questions += [(question, fact.answer, True) for fact in facts for question in fact.paraphrases]
    first, last = ([*checkup.right, *checkup.held_out_right] for checkup in (checkups[0], checkups[-1]))
    if after is None:
        after, last = [""] * len(questions), [False] * len(questions)
    return [
        Answer(question, expected, said, says, held_out, right_before, right_after)
        for (question, expected, held_out), said, says, right_before, right_after in zip(
            questions, before, after, first, last, strict=True
        )
    ]
