"""Watch a router collapse, and cure it: a small mixture-of-experts language model, trained live on five languages.

Nothing is rigged: router, experts and learning rate start as in any model. What brings the collapse about can be tried
out, one thing at a time. After 120 steps of the defaults (seed 0, float32 on a CPU) 10 of 16 experts are without a
held-out token; with a frozen router it is 4, with two experts a token none.

What is called balanced is MaxVio below 0.1 on the tokens of the last steps of training: the bias is moved by these. On
held-out text, which is other text, it can be more.

Legend: S steps taken, M checkups, E experts, J sources, K experts a token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from engine.experiments import ExperimentParams, _router, _router_languages
from engine.experiments._ending import Ending, see_through
from engine.experiments._router_sources import Typical, describe_information, list_experts

if TYPE_CHECKING:
    from engine.experiments._on_workers.router_training import Diary
    from engine.model import Decoder
    from engine.runtime.jobs import Job
    from engine.trainer import StepReport

Balancing = Literal["none", "auxiliary loss", "loss-free bias"]

VOCAB_SIZE = 512
BLOCK_SIZE = 64
D_MODEL = 64
FFN_DIM = 128
"""Of the dense layer and of each expert: one expert computes as much as a dense layer would."""

IDLE = 0.1
"""Below this share of a fair load an expert goes short."""

SEED_NOISE = 0.014
"""Standard deviation of the held-out loss, in nats a token, between seeds of the default run with one balancing.

Measured on a CPU with seeds 0 to 7.
"""

_BATCH_SIZE = 40
_HELD_OUT_BLOCKS = 40
_CHECKUPS = 25
_SOURCES = len(_router_languages.NAMES)


class Params(ExperimentParams):
    """A router, a way to keep it balanced or none, and how to train."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 900.0
    stop_grace: ClassVar[float] = 30.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    balancing: Balancing = Field(
        "none",
        title="Balancing",
        description="None: the loss alone decides. Auxiliary loss: E·Σ f·P is added to it. Loss-free bias: after each "
        "step experts with too many tokens become a little harder to choose.",
    )
    experts: int = Field(16, ge=1, le=32, title="Experts", description="Feed-forward networks of the second layer.")
    top_k: int = Field(1, ge=1, le=32, title="Experts a token (K)", description="How many of them compute each token.")
    aux_weight: float = Field(
        0.05,
        ge=0,
        le=10,
        title="Auxiliary weight",
        description="What the auxiliary loss is multiplied by; only with that balancing.",
        json_schema_extra={"step": 0.001},
    )
    bias_rate: float = Field(
        0.03,
        ge=0,
        le=1,
        title="Bias rate",
        description="What the bias moves by after each step; only with that balancing.",
        json_schema_extra={"step": 0.001},
    )
    learning_rate: float = Field(
        1.5e-3, gt=0, le=10, title="Learning rate", description="The highest one: it rises to it, then falls."
    )
    freeze_router: bool = Field(
        False,
        title="Frozen router",
        description="Keeps its directions as they were drawn, to see whether the load collapses without its learning.",
    )
    steps: int = Field(400, ge=1, le=3000, title="Steps", description="Updates of the weights.")
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of the first weights and of the samples' order.")

    @model_validator(mode="after")
    def _enough_experts(self) -> Params:
        _router.check_top_k(self.top_k, self.experts)
        return self

    def memory_bytes(self) -> int:
        """What a checkup or a step holds at its peak, whichever is more.

        Weights, gradients and AdamW's two means take 16 bytes a parameter. A checkup holds logits, their log-softmax
        and a copy of N held-out tokens, 12·N·V bytes; a step's activations of n tokens are some 4·n·(3·V + 60·D +
        8·K·F), gathered rows of the experts included.
        """
        experts = self.experts * 3 * D_MODEL * FFN_DIM
        others = 2 * VOCAB_SIZE * D_MODEL + 2 * 4 * D_MODEL**2 + 3 * D_MODEL * FFN_DIM + self.experts * D_MODEL
        held_out = _HELD_OUT_BLOCKS * _SOURCES * BLOCK_SIZE
        step = 4 * _BATCH_SIZE * BLOCK_SIZE * (3 * VOCAB_SIZE + 60 * D_MODEL + 8 * self.top_k * FFN_DIM)
        return 16 * (experts + others) + max(step, 12 * held_out * VOCAB_SIZE)


@dataclass(frozen=True)
class Result:
    """A run of training, up to where it ended or, while it is running, up to where it is.

    What is examined is a fixed held-out set with as many tokens of each source; weights and bias rest meanwhile.

    Args:
        step, loss: (S,), of each step taken; the next-token loss of its samples before its update in nats a token,
            without the auxiliary loss.
        checked: (M,) steps after which the model was examined, 0 among them.
        held_out_loss: (M,), in nats a token.
        source_loss: (M, J), the same for each source.
        load: (M, E), share of the held-out tokens' choices that each expert gets; rows sum to 1.
        relative: (M, E), load ÷ fair share: 1 is fair, 0 is dead.
        entropy: (M,), of the load in nats; ln E is fair.
        max_violation: (M,), MaxVio = (max − mean) / mean of the load of the held-out tokens.
        trained_violation: (M,), the same for all tokens trained on since the checkup before; NaN at the first.
        dead: (M,) int, experts that got none of the held-out tokens.
        bias: (M, E), the selection bias; 0 without that balancing.
        router_entropy: (M,), mean entropy of a token's probabilities in nats.
        directions: (M,), how many directions the tokens at the router spread over, from 1 to the model's width: the
            participation ratio (Σ λ)² / Σ λ² of the eigenvalues of their second moments.
        sources: J names.
        examples: the beginning of each source, as text.
        counts: (J, E), choices of each source's held-out tokens at the last checkup.
        information: between source and expert in nats at each checkup, (M,), less what chance gives.
        information_chance: (M,), what chance gives: the mean over shuffled sources.
        typical: the most typical tokens of each expert at the last checkup.
        balancing: as in the parameters.
        experts, top_k: likewise.
        steps: of the whole run, whether they were taken or not.
        ended: why it ended, or that it has not.
        ending: the same as a sentence.
        sentence: what is seen of the balance, in words.
        course: who went short on the way and what went on at the router meanwhile.
        learned: what the experts specialised on, in words.
        seconds: of training, checkups included.
        tokens_per_step, held_out_tokens, parameters, active_parameters: sizes; `active` computes one token.
        device: where it ran.
        versions: of what took part.
    """

    step: np.ndarray
    loss: np.ndarray
    checked: np.ndarray
    held_out_loss: np.ndarray
    source_loss: np.ndarray
    load: np.ndarray
    relative: np.ndarray
    entropy: np.ndarray
    max_violation: np.ndarray
    trained_violation: np.ndarray
    dead: np.ndarray
    bias: np.ndarray
    router_entropy: np.ndarray
    directions: np.ndarray
    sources: tuple[str, ...]
    examples: tuple[str, ...]
    counts: np.ndarray
    information: np.ndarray
    information_chance: np.ndarray
    typical: tuple[Typical, ...]
    balancing: Balancing
    experts: int
    top_k: int
    steps: int
    ended: Ending
    ending: str
    sentence: str
    course: str
    learned: str
    seconds: float
    tokens_per_step: int
    held_out_tokens: int
    parameters: int
    active_parameters: int
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Train until the last step, a divergence, or until it is stopped; whatever was learned by then is returned.

    What is known so far is shown after every step.
    """
    import torch

    from engine.experiments._on_workers.router_training import BalancedTrainer, Diary, build
    from engine.measure import device_name, versions
    from engine.trainer import TrainerOptions

    languages = _router_languages.read(VOCAB_SIZE, BLOCK_SIZE, _HELD_OUT_BLOCKS)
    where, software = device_name(job.device), versions()
    torch.manual_seed(params.seed)
    bias_rate = params.bias_rate if params.balancing == "loss-free bias" else 0.0
    model = build(params.experts, params.top_k, bias_rate).to(job.device)
    model.layers[-1].mlp.router.weight.requires_grad_(not params.freeze_router)
    diary = Diary(model, languages)
    every = max(1, params.steps // _CHECKUPS)

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            **_curves(diary, params),
            sources=_router_languages.NAMES,
            examples=languages.examples,
            typical=diary.typical,
            balancing=params.balancing,
            experts=params.experts,
            top_k=params.top_k,
            steps=params.steps,
            ended=ended,
            ending=ending,
            seconds=time.monotonic() - began,
            tokens_per_step=_BATCH_SIZE * BLOCK_SIZE,
            held_out_tokens=len(languages.held_out) * BLOCK_SIZE,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            active_parameters=_active_parameters(model, params),
            device=where,
            versions=software,
        )

    def examine() -> None:
        diary.examine(trainer.step, trainer.chosen)
        trainer.chosen.clear()

    def follow(report: StepReport) -> None:
        diary.losses.append(trainer.next_token_loss)
        if report.step % every == 0:
            examine()
        last = diary.checkups[-1]
        job.report(
            report.step,
            params.steps,
            loss=trainer.next_token_loss,
            held_out_loss=last.loss,
            held_out_max_violation=last.load.max_violation,
            dead_experts=len(last.load.dead),
        )
        job.show(lambda: result("running", f"{trainer.step} of {params.steps} steps so far."))

    trainer = BalancedTrainer(
        model,
        _router_languages.SourceMixture(tuple(stream.to(job.device) for stream in languages.learned), BLOCK_SIZE),
        TrainerOptions(learning_rate=params.learning_rate, batch_size=_BATCH_SIZE, beta2=0.99, seed=params.seed),
        aux_weight=params.aux_weight if params.balancing == "auxiliary loss" else 0.0,
        held_out=languages.held_out,
        on_step=follow,
        cancelled=lambda: job.cancelled,
    )
    began = time.monotonic()
    examine()
    job.show(lambda: result("running", "No step so far."))
    ended, ending = see_through(lambda: trainer.train_steps(params.steps), trainer, params, job)
    if ended != "diverged":  # then the weights may be no numbers any more
        examine()
    return result(ended, ending)


def _active_parameters(model: Decoder, params: Params) -> int:
    """Of all but the experts that a token does not use."""
    experts = model.layers[-1].mlp
    stacked = experts.gate_up_proj.numel() + experts.down_proj.numel()
    return (
        sum(parameter.numel() for parameter in model.parameters())
        - stacked * (params.experts - params.top_k) // params.experts
    )


def _curves(diary: Diary, params: Params) -> dict[str, Any]:
    """The arrays and sentences of a `Result`."""
    checkups = diary.checkups
    last = checkups[-1]
    arrays = {
        "step": np.arange(1, len(diary.losses) + 1),
        "loss": np.array(diary.losses),
        "checked": np.array([checkup.step for checkup in checkups]),
        "held_out_loss": np.array([checkup.loss for checkup in checkups]),
        "source_loss": np.stack([checkup.source_loss for checkup in checkups]),
        "load": np.stack([checkup.load.relative / params.experts for checkup in checkups]),
        "relative": np.stack([checkup.load.relative for checkup in checkups]),
        "entropy": np.array([checkup.load.entropy for checkup in checkups]),
        "max_violation": np.array([checkup.load.max_violation for checkup in checkups]),
        "trained_violation": np.array(
            [checkup.trained.max_violation if checkup.trained else np.nan for checkup in checkups]
        ),
        "dead": np.array([len(checkup.load.dead) for checkup in checkups]),
        "bias": np.stack([checkup.bias for checkup in checkups]),
        "router_entropy": np.array([checkup.router_entropy for checkup in checkups]),
        "directions": np.array([checkup.directions for checkup in checkups]),
        "counts": last.specialisation.counts,
        "information": np.array([checkup.specialisation.excess for checkup in checkups]),
        "information_chance": np.array([checkup.specialisation.chance for checkup in checkups]),
    }
    return arrays | {
        "sentence": describe_balance(arrays["checked"], arrays["relative"], arrays["trained_violation"]),
        "course": describe_course(arrays["checked"], arrays["relative"], arrays["directions"], params),
        "learned": describe_information(last.specialisation, len(arrays["counts"]), params.experts),
    }


def describe_balance(checked: np.ndarray, relative: np.ndarray, trained_violation: np.ndarray) -> str:
    """How even the load is at the last checkup.

    Args:
        checked, relative, trained_violation: as `Result`'s.
    """
    experts = relative.shape[1]
    if experts == 1:
        return (
            "There is one expert: it gets every token, which is always its fair share, so all of the map has the "
            "colour of 1 and there is nothing to balance."
        )
    now, step = relative[-1], int(checked[-1])
    when = f"After {step} step{'' if step == 1 else 's'}" if step else "Before the first step"
    if np.isnan(now).any():
        return f"{when} no token goes to any expert: there is no load."
    busiest, dead = tuple(np.flatnonzero(now == now.max())), tuple(np.flatnonzero(now == 0))
    idle = tuple(np.flatnonzero((now > 0) & (now < IDLE)))
    if len(busiest) == experts:
        return f"{when} every expert gets exactly its fair share of the held-out tokens."
    said = (
        f"{when} {list_experts(busiest)} get{'s' if len(busiest) == 1 else ''} {now.max():.2f} times the fair share "
        f"{'' if len(busiest) == 1 else 'each '}of the held-out tokens (MaxVio {now.max() - 1:.2f})"
    )
    if len(checked) > 1 and not np.isnan(trained_violation[-1]):
        since = step - int(checked[-2])
        said += (
            f"; of the tokens trained on in the last {f'{since} steps' if since > 1 else 'step'} MaxVio is "
            f"{trained_violation[-1]:.2f}"
        )
    if dead:
        said += f"; {len(dead)} of {experts} experts {'gets' if len(dead) == 1 else 'get'} no token at all"
    if idle:
        said += f"; {len(idle)} {'gets' if len(idle) == 1 else 'get'} some, but less than a tenth of a fair share"
    return f"{said}."


def describe_course(checked: np.ndarray, relative: np.ndarray, directions: np.ndarray, params: Params) -> str:
    """Who went short in the run, who came back, and what went on at the router meanwhile; a cause one run cannot show.

    Args:
        checked, relative, directions: as `Result`'s.
        params: of the run.
    """
    if params.experts == 1 or len(checked) < 2 or np.isnan(relative).any():
        return ""
    starved = (relative < IDLE).sum(1)  # (M,), dead ones included
    worst = int(starved.argmax())
    if not starved[worst]:
        return f"At no checkup did an expert get less than a tenth of a fair share, with {_cure(params)}."
    ever = np.flatnonzero((relative < IDLE).any(0))
    back = int((relative[-1, ever] >= IDLE).sum())
    said = (
        f"With {_cure(params)} {starved[0]} of {params.experts} experts got less than a tenth of a fair share before "
    )
    said += f"the first step, {starved[worst]} after {checked[worst]}"
    if worst != len(checked) - 1:
        said += f" and {starved[-1]} after {checked[-1]}"
    said += f". Of {len(ever)} that went short at some checkup {back} {_have(back)} a tenth or more after {checked[-1]}"
    left = np.flatnonzero((relative == 0).any(0))
    if len(left):
        again = int((relative[-1, left] > 0).sum())
        said += f"; of {len(left)} without any token at some checkup {again} {_have(again)} some again"
    said += "."
    narrowest = int(directions.argmin())
    if narrowest and directions[0] > 1.5 * directions[narrowest]:
        said += (
            f" Meanwhile the tokens at the router spread over {directions[0]:.1f} directions before the first step, "
            f"over {directions[narrowest]:.1f} after {checked[narrowest]}"
        )
        if narrowest != len(checked) - 1:
            said += f" and over {directions[-1]:.1f} after {checked[-1]}"
        said += "." if starved[-1] else ", and even so no expert goes short at the end."
    if params.freeze_router:
        said += " The router's weights did not learn in this run"
        said += ", only its bias moved." if params.balancing == "loss-free bias" else "."
    return said


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _cure(params: Params) -> str:
    return {"none": "nothing to balance them", "auxiliary loss": "the auxiliary loss", "loss-free bias": "the bias"}[
        params.balancing
    ]
