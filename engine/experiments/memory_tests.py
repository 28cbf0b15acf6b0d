"""What must hold of the memory's arithmetic, checked on the settings of the page and on a small twin of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.experiments import memory
from engine.experiments._memory import SHAPES
from engine.experiments.attention_tests import Check
from engine.memory_budget import GB, budget, largest, optimizer_bytes, weight_bytes

if TYPE_CHECKING:
    from engine.runtime.jobs import Job
    from engine.training_plan import Plan

_EXACT, _SAVED, _PEAK = 0.0, 0.01, 0.05
_MOST_TOKENS = 128


class Params(memory.Params):
    """The settings of the page."""

    time_limit: ClassVar[float] = 120.0


@dataclass(frozen=True)
class Result:
    """All checks."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Count the real model's parameters without their memory, and weigh a small twin's step."""
    from engine.memory_measurement import build, measure_step

    job.report(0, 3)
    checks = _of_shape(params) + _of_card(params)
    job.report(1, 3)
    plan = _twin(params.plan(on_cuda=job.device.startswith("cuda")))
    found = measure_step(plan, *build(plan, job.device), job.device)
    job.report(2, 3)
    made = budget(plan)
    model = sum(weight_bytes(plan)) + made.peak.parts.get("adapters", 0)
    checks += [
        _check(
            "Weights, scales, adapters",
            "|predicted / held − 1|, of a small twin of this plan",
            model,
            found.model,
            _EXACT,
        ),
        _check(
            "Optimizer state",
            "|predicted / held − 1|, of the twin after two steps",
            optimizer_bytes(plan)[0],
            found.optimizer,
        ),
        _check(
            "Gradients",
            "|predicted / held − 1|, of the twin after a backward pass",
            made.moments[-1].parts.get("gradients", 0),
            found.gradients,
        ),
    ]
    if found.saved is not None and not plan.on_cuda:  # whose allocator rounds small tensors up
        checks.append(
            _check(
                "Saved for the backward pass",
                "|predicted / saved − 1|, as autograd's own hooks count what the twin saves",
                made.saved,
                found.saved,
                _SAVED,
            )
        )
    if plan.on_cuda or (plan.weights != "int8" and plan.optimizer == "AdamW"):  # on the CPU these unpack in float32
        checks.append(
            _check(
                "Peak of a step", "|predicted / measured − 1|, of the twin's peak", made.peak.total, found.peak, _PEAK
            )
        )
    job.report(3, 3)
    return Result(checks)


def _of_shape(params: Params) -> list[Check]:
    """The model itself, of any size, on the device that holds no numbers."""
    import torch

    from engine.lora.injection import inject_lora
    from engine.model import Decoder

    plan = params.plan()
    with torch.device("meta"):
        model = Decoder(plan.config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    checks = [
        _check(
            "Parameters",
            "|predicted / counted − 1|, of the whole model, built without memory for its numbers",
            SHAPES[params.shape].config.num_parameters,
            counted,
        )
    ]
    if plan.method == "LoRA":
        inject_lora(model, plan.rank, targets=plan.targets)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    predicted = sum(plan.trained().elements())
    return [*checks, _check("Trained numbers", "|predicted / counted − 1|, of the whole model", predicted, trained)]


def _of_card(params: Params) -> list[Check]:
    """The largest batch fits, one more does not; computing blocks again never keeps more."""
    plan, card = params.plan(), params.card * GB
    most = largest(plan, card, "batch")

    def peak(**changes: object) -> int:
        return budget(dataclasses.replace(plan, **changes)).peak.total

    left = card - peak(batch=most + 1)
    checks = [
        Check("One text more does not fit", "card − peak, in bytes, one above the largest batch", left, 0.0, left < 0)
    ]
    if most:
        over = peak(batch=most) - card
        checks.append(Check("The largest batch fits", "peak − card, in bytes", over, 0.0, over <= 0))
    again, kept = peak(checkpointing=True), peak(checkpointing=False)
    checks.append(
        Check(
            "Checkpointing never takes more",
            "peak with it / peak without it",
            again / kept,
            1.0,
            again <= kept,
        )
    )
    return checks


def _twin(plan: Plan) -> Plan:
    """The same plan for a model that is built in a moment: two narrow blocks, few words, few tokens."""
    config = plan.config
    grouped = config.num_heads != config.num_kv_heads
    small = config.model_copy(
        update={
            "d_model": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2 if grouped else 4,
            "head_dim": 32,
            "ffn_dim": 320,
            "vocab_size": 1000,
        }
    )
    batch = min(plan.batch, 2)
    return dataclasses.replace(
        plan, config=small, rank=min(plan.rank, 32), batch=batch, length=min(plan.length, _MOST_TOKENS // batch)
    )


def _check(name: str, must: str, predicted: int, found: int, bound: float = _EXACT) -> Check:
    apart = abs(predicted / found - 1) if found else float(predicted != 0)
    return Check(name, must, apart, bound, apart <= bound)
