"""What must hold of a model before and while it learns, checked on the shape that was chosen."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import JobCancelledError
from engine.experiments import training
from engine.experiments.attention_tests import Check

if TYPE_CHECKING:
    from torch import Tensor

    from engine.data import TokenBlocks
    from engine.model import Decoder
    from engine.runtime.jobs import Job
    from engine.trainer import TrainerOptions

_LENGTH = 64
_STEPS = 4
_HEART_STEPS = 100
_LEARNING_RATE = 4e-3
_SHAPE = "takes depth, width, heads and seed of this page"
_SHAPE_AND_RATE = f"{_SHAPE}, and a learning rate of its own, {_LEARNING_RATE:g}"


class Params(training.Params):
    """The settings of the page, of which the shape and the seed are taken."""

    lane = "short"
    cacheable = True
    returns_partial = False
    time_limit = 60.0
    stop_grace = 5.0


@dataclass(frozen=True)
class Result:
    """All checks, in the order of a training run."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Check a fresh model of the chosen shape, and a few of its steps.

    Raises:
        JobCancelledError: nobody waits for it any more.
    """
    import torch

    from engine.data import TokenBlocks
    from engine.trainer import TrainerOptions, evaluate

    generator = torch.Generator().manual_seed(params.seed)
    ids = torch.randint(training.VOCAB_SIZE, (8, _LENGTH + 1), generator=generator).to(job.device)
    blocks = TokenBlocks(ids)
    model = _fresh(params, job.device)
    _go_on(job, 1)
    checks = [
        _check(
            "The parameters are those predicted",
            f"|parameters of the model − the formula's|; {_SHAPE}",
            abs(sum(parameter.numel() for parameter in model.parameters()) - params.architecture.num_parameters),
            0.0,
        ),
        _check(
            "A fresh model guesses",
            f"|first loss − ln V|, with ln {training.VOCAB_SIZE} = {math.log(training.VOCAB_SIZE):.2f} nats; {_SHAPE}",
            abs(evaluate(model, blocks) - math.log(training.VOCAB_SIZE)),
            0.5,
        ),
        _check(
            "No token sees a later one",
            f"largest change of any earlier logit when the last token is another; {_SHAPE}",
            _looks_ahead(model, ids[:, :-1]),
            1e-5,
        ),
    ]
    _go_on(job, 2)
    options = TrainerOptions(learning_rate=_LEARNING_RATE, batch_size=4, seed=params.seed)
    checks.append(
        _check(
            "A resumed run is the same run",
            f"largest difference of the losses of {_STEPS} steps, straight through or with a checkpoint in between; "
            f"{_SHAPE_AND_RATE}",
            _resumed_apart(params, blocks, options, job.device),
            0.0,
        )
    )
    _go_on(job, 3)
    checks.append(
        _check(
            "Four samples are learned by heart",
            f"loss after {_HEART_STEPS} steps on the same four, of random tokens, against half of ln V; "
            f"{_SHAPE_AND_RATE}",
            _by_heart(model, TokenBlocks(ids[:4]), options, job),
            math.log(training.VOCAB_SIZE) / 2,
        )
    )
    _go_on(job, 4)
    return Result(checks)


def _go_on(job: Job, done: int) -> None:
    if job.cancelled:
        raise JobCancelledError("The checks were cancelled.")
    job.report(done, 4)


def _fresh(params: Params, device: str) -> Decoder:
    import torch

    from engine.model import Decoder

    torch.manual_seed(params.seed)
    return Decoder(params.architecture).to(device)


def _looks_ahead(model: Decoder, ids: Tensor) -> float:
    from engine.model import evaluating

    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % training.VOCAB_SIZE
    with evaluating(model):
        return (model(ids) - model(other))[:, :-1].abs().max().item()


def _resumed_apart(params: Params, blocks: TokenBlocks, options: TrainerOptions, device: str) -> float:
    from engine.trainer import Trainer

    straight = Trainer(_fresh(params, device), blocks, options, held_out=blocks).train_steps(_STEPS)
    taken: list[float] = []
    first = Trainer(
        _fresh(params, device),
        blocks,
        options,
        held_out=blocks,
        on_step=lambda report: taken.append(report.loss),
        cancelled=lambda: len(taken) == _STEPS // 2,
    )
    first.train_steps(_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "run.safetensors")
        second = Trainer(_fresh(params, device), blocks, options, held_out=blocks)
        second.load(Path(folder) / "run.safetensors")
    both = taken + second.resume()
    return max(abs(one - other) for one, other in zip(straight, both, strict=True))


def _by_heart(model: Decoder, blocks: TokenBlocks, options: TrainerOptions, job: Job) -> float:
    from engine.trainer import Trainer, evaluate

    trainer = Trainer(model, blocks, options, held_out=blocks, cancelled=lambda: job.cancelled)
    trainer.train_steps(_HEART_STEPS)
    return evaluate(model, blocks)


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, float(measured), bound, measured <= bound)
