"""What must hold of attention, checked on your text, your head and your settings.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import InputError
from engine.experiments import _attention, attention_head

if TYPE_CHECKING:
    from torch import Tensor

    from engine.pretrained import Pretrained
    from engine.runtime.jobs import Job
    from engine.tracing import Trace


class Params(_attention.HeadParams):
    """The settings of the page."""


@dataclass(frozen=True)
class Check:
    """A property with what was measured.

    Args:
        name: of the property.
        must: what must hold, in words or as a formula.
        measured: the number that decides.
        bound: passed if `measured` is at most this.
        passed: whether it is.
    """

    name: str
    must: str
    measured: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class Result:
    """All checks, in the order of the computation."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Run every property on the current settings."""
    import torch

    from engine.attention import attend

    model, ids = _attention.read(params, job)
    head = attention_head.run(attention_head.Params(**params.model_dump()), job)
    kept = _attention.without(ids, params.drop)
    seen = _attention.trace(model, params.weights, kept)
    allowed = _attention.mask_matrix(params, seen, params.layer).cpu()
    weights, value = torch.from_numpy(head.weights), torch.from_numpy(head.value)
    query, key = torch.from_numpy(head.query), torch.from_numpy(head.key)
    sums = weights.sum(-1)
    fused = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=allowed, scale=head.scale / params.temperature
    )[0]
    double, _ = attend(
        query[None].double(),
        key[None].double(),
        value[None].double(),
        allowed,
        scale=head.scale,
        temperature=params.temperature,
    )
    output = torch.from_numpy(head.output)
    checks = [
        _check(
            "Rows sum to 1",
            "|Σₖ weights[q, k] − 1| for every query q that may look somewhere",
            (sums - 1)[allowed.any(-1)].abs().max().item() if allowed.any() else 0.0,
            1e-5,
        ),
        _check(
            "Forbidden means zero",
            "the largest weight that the mask forbids is exactly 0",
            weights.masked_fill(allowed, 0).max().item(),
            0.0,
        ),
        _check(
            "Output is a mean of values",
            "no output leaves the range of the values",
            _outside(output, value),
            1e-5 * value.abs().max().item(),
        ),
        _check(
            "Fused kernel agrees",
            "|output − scaled_dot_product_attention| on the same Q, K, V and mask",
            (output - fused).abs().max().item(),
            1e-4,
        ),
        _check(
            "Float64 agrees", "|output − the same in double precision|", (output - double[0]).abs().max().item(), 1e-4
        ),
    ]
    if params.weights == "trained":
        checks += _recomputed(model, seen, params.layer)
    return Result(checks)


def _recomputed(model: Pretrained, seen: Trace, layer: int) -> list[Check]:
    """The layer's maps once more, by `MultiHeadAttention` from the model's weights; nothing for other architectures."""
    from engine.tracing import layer_attention, layer_input

    try:
        attention = layer_attention(model, layer)
    except InputError:
        return []
    x = layer_input(model, seen, layer)  # (1, T, D)
    _, weights = attention(x, x, x, seen.masks[layer])
    apart = (weights[0] - seen.attention[layer]).abs().max().item()
    return [
        _check(
            "Recomputed from the weights",
            f"|the model's maps − MultiHeadAttention's own, all heads of layer {layer}, rotary and grouped queries|",
            apart,
            1e-4,
        )
    ]


def _outside(output: Tensor, value: Tensor) -> float:
    """How far `output` leaves the box that `value` spans; a row without any key is 0 and counts as inside."""
    above = (output - value.amax(0)).clamp(min=0)
    below = (value.amin(0) - output).clamp(min=0)
    attends = output.abs().sum(-1) > 0
    return (above + below)[attends].max().item() if attends.any() else 0.0


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, measured, bound, measured <= bound)
