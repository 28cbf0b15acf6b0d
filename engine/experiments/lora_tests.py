"""What must hold of an adapter before and after it learns, checked on the settings of the page."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.experiments import _lora, lora
from engine.experiments.attention_tests import Check

if TYPE_CHECKING:
    from engine.finetuning.lessons import Lessons
    from engine.model import Decoder
    from engine.runtime.jobs import Job

_STEPS = 4
_ROUNDING = 1e-4
"""Of the largest logit: what float32 may differ by when a sum is taken in another order."""

_LEARNED_AT_ONCE = 256
"""Positions, filling included."""


class Params(lora.Params):
    """The settings of the page; steps and learning rate play no part."""

    cacheable: ClassVar[bool] = True
    returns_partial: ClassVar[bool] = False
    time_limit: ClassVar[float] = 600.0
    stop_grace: ClassVar[float] = 5.0


@dataclass(frozen=True)
class Result:
    """All checks, in the order of a run."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Check a fresh adapter of the chosen kind and size, then a few of its steps; full fine-tuning has no adapter."""
    import torch

    from engine import llama, pretrained
    from engine.finetuning.changes import difference
    from engine.finetuning.lessons import Lessons

    published = pretrained.load(params.model, job.device)

    def lessons(questions: list[tuple[str, str]]) -> Lessons:
        return Lessons(questions, published.tokenizer, published.max_tokens)

    base, ready = llama.from_transformers(published.model), llama.from_transformers(published.model)
    torch.manual_seed(params.seed)
    model = _prepare(ready, params)
    asked = lessons([(fact.question, fact.answer) for fact in params.known])
    apart, scale = difference(base, model, asked)
    job.report(1, 3)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    checks = [
        _check(
            "What is trained is what was predicted",
            "|numbers that are trained − the formula's|",
            abs(trainable - params.predict().trainable),
            0.0,
        ),
        _check(
            "It starts as it was given",
            "largest change of a logit before the first step",
            apart,
            _ROUNDING * scale if params.method in ("DoRA", "PiSSA") else 0.0,
        ),
    ]
    if params.method != "full fine-tuning":
        checks += _first_gradients(model, params, asked)
        job.report(2, 3)
        checks += _after_training(model, base, params, asked)
    job.report(3, 3)
    return Result(checks)


def _prepare(model: Decoder, params: Params) -> Decoder:
    from engine.finetuning.methods import prepare

    return prepare(model, params.method, params.rank, params.alpha, _lora.TARGETS[params.targets])


def _first_gradients(model: Decoder, params: Params, asked: Lessons) -> list[Check]:
    """Of A and B, before anything has moved."""
    from engine.lora.injection import adapted_layers
    from engine.trainer import summed_loss

    model.zero_grad()
    for batch in asked.batches(_LEARNED_AT_ONCE):
        summed_loss(model, *batch.to(next(model.parameters()).device)).backward()
    adapters = [layer.adapter for layer in adapted_layers(model).values()]
    of_a = [adapter.A.grad.abs().max().item() for adapter in adapters]
    of_b = [adapter.B.grad.abs().max().item() for adapter in adapters]
    model.zero_grad()
    still = _check(
        "At the first step every B has a gradient", "how many Bs have none", sum(norm == 0 for norm in of_b), 0.0
    )
    if params.method == "PiSSA":  # B does not start at 0
        return [
            _check(
                "At the first step every A has one too", "how many As have none", sum(norm == 0 for norm in of_a), 0.0
            ),
            still,
        ]
    return [
        _check(
            "At the first step no A has a gradient", "largest |gradient of A|, to which B = 0 leads", max(of_a), 0.0
        ),
        still,
    ]


def _after_training(model: Decoder, base: Decoder, params: Params, asked: Lessons) -> list[Check]:
    """Of what a few calm steps have learned."""
    import torch

    from engine.finetuning.changes import difference, merged_difference
    from engine.finetuning.methods import make_trainer
    from engine.lora.adapter_files import load_adapter, save_adapter
    from engine.lora.injection import adapted_layers
    from engine.trainer import TrainerOptions

    options = TrainerOptions(learning_rate=1e-3, batch_size=min(8, len(asked)), weight_decay=0.0, seed=params.seed)
    make_trainer(model, params.method, asked, options).train_steps(_STEPS)
    layers = adapted_layers(model)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    merged_apart, scale = merged_difference(model, asked)
    bound = _ROUNDING * scale
    changed = sum(int((layer.weight != weights[name]).sum()) for name, layer in layers.items())
    with tempfile.TemporaryDirectory() as folder:
        load_adapter(base, save_adapter(model, folder, params.model))
    checks = [
        _check("Merged gives what unmerged gives", "largest difference of a logit", merged_apart, bound),
        _check("Merging can be undone to the bit", "weights that differ after merging and unmerging", changed, 0.0),
        _check(
            "Saved and loaded it is the same",
            "largest difference of a logit between this model and a fresh one that the adapter's file was put on",
            difference(model, base, asked)[0],
            bound,
        ),
    ]
    layer = max(layers.values(), key=lambda layer: layer.delta_weight().norm().item())
    if params.method == "DoRA":
        magnitude = layer.magnitude.detach()
        norms = torch.linalg.vector_norm(layer.merged_weight(), dim=1)
        checks.append(
            _check(
                "Magnitudes are the norms of the rows",
                "largest |‖row of the merged weight‖ − m| / m in the layer that changed most",
                ((norms - magnitude).abs() / magnitude).max().item(),
                1e-5,
            )
        )
    else:
        most = 2 * params.rank if params.method == "PiSSA" else params.rank
        sigma = torch.linalg.svdvals(layer.delta_weight())
        checks.append(
            _check(
                f"The update has rank {most} at most",
                f"singular value {most + 1} of ΔW over the first, in the layer that changed most",
                (sigma[most] / sigma[0]).item() if most < len(sigma) else 0.0,
                1e-5,
            )
        )
    return checks


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, float(measured), bound, measured <= bound)
