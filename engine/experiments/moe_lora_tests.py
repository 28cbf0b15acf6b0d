"""What must hold of a mixture of adapters before and after it learns, checked on the settings of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.experiments import moe_lora, moe_lora_split
from engine.experiments.attention_tests import Check

if TYPE_CHECKING:
    from torch import Tensor

    from engine.experiments._on_workers.moe_lora_training import Examination
    from engine.model import Decoder
    from engine.moe.lora import MoELoRALayer
    from engine.runtime.jobs import Job

_STEPS = 4
_ROUNDING = 1e-4
"""Of the largest number compared: what float32 may differ by when a sum is taken in another order."""

_TOKENS = 32
_PARTS = 4


class Params(moe_lora.Params):
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
    """Check a fresh mixture, then one that has taken a few calm steps, then two inputs with opposite targets."""
    from engine import llama, pretrained
    from engine.experiments._on_workers.moe_lora_training import Examination, Leg, adapt

    base = pretrained.load(params.model, job.device)
    exam = Examination(base)
    calm = params.model_copy(update={"learning_rate": 1e-3, "steps": _STEPS})
    checks = _sizes(params, {role: adapt(role, params, base) for role in ("MoE-LoRA", "LoRA, equal parameters")})
    job.report(1, _PARTS)
    leg = Leg("MoE-LoRA", calm, base, exam, follow=lambda: None, cancelled=lambda: job.cancelled)
    checks += _fresh(leg.model, llama.from_transformers(base.model), exam)
    job.report(2, _PARTS)
    leg.trainer.train_steps(_STEPS)
    checks += _routed(leg.model, exam, params)
    checks += _computed(leg.model)
    job.report(3, _PARTS)
    rate = params.bias_rate
    split = moe_lora_split.run(moe_lora_split.Params(seed=params.seed, bias_rate=rate or 0.02), job)
    told = "" if rate else " (with a bias rate of 0.02, as yours is 0)"
    checks.append(
        _check(
            "Two inputs with opposite targets part",
            f"whether they share an expert after {len(split.loss) - 1} rounds with this seed and bias rate{told}",
            float(not split.apart),
            0.0,
        )
    )
    job.report(_PARTS, _PARTS)
    return Result(checks)


def _sizes(params: Params, models: dict[moe_lora.Role, Decoder]) -> list[Check]:
    trained = {role: _trainable(model) for role, model in models.items()}
    mixture, plain = trained["MoE-LoRA"], trained["LoRA, equal parameters"]
    return [
        _check(
            "What is trained is what was predicted",
            "|numbers that are trained − the formula's|",
            abs(mixture - params.mixture().trainable),
            0.0,
        ),
        _check(
            "The LoRA of equal parameters is as close as a rank allows",
            "|its numbers − the mixture's|, against half of what one rank has, or one where it has rank 1",
            abs(mixture - plain),
            params.plain(1).trainable / (1 if params.size("LoRA, equal parameters").rank == 1 else 2),
        ),
    ]


def _trainable(model: Decoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _fresh(model: Decoder, base: Decoder, exam: Examination) -> list[Check]:
    """Before anything has moved."""
    import torch

    from engine.model import evaluating
    from engine.moe.injection import moe_lora_layers
    from engine.trainer import summed_loss

    with evaluating(model), evaluating(base):
        apart = (model(exam.inputs) - base(exam.inputs))[exam.inputs != 0].abs().max().item()
    summed_loss(model, exam.inputs, exam.targets).backward()
    layers = moe_lora_layers(model).values()
    gradients = [[(expert.A.grad, expert.B.grad) for expert in layer.experts] for layer in layers]
    of_a = max(float(a.abs().max()) for layer in gradients for a, _ in layer if a is not None)
    still = sum(not any(torch.count_nonzero(b) for _, b in layer if b is not None) for layer in gradients)
    model.zero_grad()
    return [
        _check("It starts as it was given", "largest change of a logit before the first step", apart, 0.0),
        _check("At the first step no A has a gradient", "largest |gradient of A|, to which B = 0 leads", of_a, 0.0),
        _check(
            "At the first step every mixture has a B with one",
            "how many mixtures have no expert whose B has a gradient",
            still,
            0.0,
        ),
    ]


def _routed(model: Decoder, exam: Examination, params: Params) -> list[Check]:
    """Where tokens go, in a model that has learned a little."""
    from engine.model import evaluating
    from engine.moe.observation import observing

    filled = exam.inputs == 0  # (B, T)
    with evaluating(model), observing(model) as seen:
        full = model(exam.inputs)
    lost = sum(int(filled.flatten()[routing.tokens].sum()) for _, routing in seen)
    most = max(int((routing.dense_gates() != 0).sum(1).max()) for _, routing in seen)
    checks = [
        _check("Filling goes to no expert", "filled-up positions that some expert got", lost, 0.0),
        _check("A token has K experts", "the most experts whose gate for one token is not 0", most, params.top_k),
        _check(
            "Every token is somewhere",
            "largest |sum over the experts of a task's shares of tokens − 1|",
            float(abs(exam.take(model).routing.sum(-1) - 1).max()),
            1e-9,
        ),
    ]
    if params.kind != "random":  # lots are drawn anew in each pass
        own = ~filled[0]
        with evaluating(model):
            alone = model(exam.inputs[:1, own])
        checks.append(
            _check(
                "A question is answered alone as among others",
                "largest difference of a logit",
                (alone - full[:1, own]).abs().max().item(),
                _ROUNDING * full.abs().max().item(),
            )
        )
    return checks


def _computed(model: Decoder) -> list[Check]:
    """The mixture whose experts have learned most, beside the plainest way to compute it."""
    import torch

    from engine.lora.spectrum import delta_weight, singular_values
    from engine.moe.injection import moe_lora_layers, without_expert

    layers = moe_lora_layers(model).values()
    layer = max(layers, key=lambda layer: sum(expert.B.norm().item() for expert in layer.experts)).eval()
    x = torch.randn(_TOKENS, layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(layer.router.weight)
    with torch.no_grad():
        expected = _looped(layer, x)
        together = torch.zeros_like(expected)
        apart = 0.0
        for form in ("concatenated", "grouped"):
            layer.form = form
            given = _computed_alike(layer, x)
            apart = max(apart, (given - expected).abs().max().item())
        for index in range(layer.num_experts):
            with without_expert(layer, index):
                together += given - _computed_alike(layer, x)
    scale = expected.abs().max().item()
    sigma, rounding = 0.0, 0.0
    for expert in layer.experts:
        exact = torch.linalg.svdvals(delta_weight(expert.A, expert.B, layer.scaling))[: layer.rank]
        found = singular_values(expert.A, expert.B, layer.scaling)
        sigma, rounding = max(sigma, (found - exact).abs().max().item()), max(rounding, exact[0].item())
    return [
        _check(
            "Without a loop it gives what a loop gives",
            "largest difference of an output, of both forms, in the mixture that has learned most",
            apart,
            _ROUNDING * scale,
        ),
        _check(
            "What experts give adds up",
            "largest |the sum of what is missing without each expert − the whole| of an output",
            (together - expected).abs().max().item(),
            _ROUNDING * scale,
        ),
        _check(
            "Singular values through the factors are those of ΔW",
            "largest difference, over that mixture's experts",
            sigma,
            _ROUNDING * rounding,
        ),
    ]


def _computed_alike(layer: MoELoRALayer, x: Tensor) -> Tensor:
    """Its output, with the lots of the first time if it draws lots; without the hooks that tell it what is filling."""
    import torch

    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        return layer.forward(x)


def _looped(layer: MoELoRALayer, x: Tensor) -> Tensor:
    """One token and one of its experts after the other."""
    import torch

    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        routing = layer.router.route(x)
    y = x.new_zeros(len(x), layer.out_features)
    for token, index, gate in zip(routing.tokens.tolist(), routing.experts.tolist(), routing.gates, strict=True):
        expert = layer.experts[index]
        y[token] += layer.scaling * gate * (x[token] @ expert.A @ expert.B)
    return y


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, float(measured), float(bound), measured <= bound)
