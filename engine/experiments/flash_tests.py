"""What must hold of every way to compute attention, checked on the settings of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from engine.errors import JobCancelledError
from engine.experiments._flash import BACKENDS, BackendName, ShapeParams
from engine.experiments.attention_tests import Check

if TYPE_CHECKING:
    from torch import Tensor

    from engine.flash.backends import Backend
    from engine.flash.choice import Errors
    from engine.runtime.jobs import Job

_EXACT = 1e-10
_TWICE = 2.0
_PARTS = 7
_MOST = 2
"""Sequences and heads that are checked; more would show nothing else."""


class Params(ShapeParams):
    """The settings of the page; of the batch and of the heads two are checked."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 300.0

    length: int = Field(200, ge=16, le=512, title="Tokens", description="Queries, and as many keys.")
    block_q: int = Field(64, ge=1, le=128, title="Rows of a tile", description="Of the tiled attention in PyTorch.")
    block_k: int = Field(64, ge=1, le=128, title="Columns of a tile", description="Of the tiled attention in PyTorch.")
    backends: tuple[BackendName, ...] = Field(
        BACKENDS,
        min_length=1,
        max_length=len(BACKENDS),
        title="Backends",
        description="Implementations to check. What does not exist here is left out.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="Of the random numbers.")


@dataclass(frozen=True)
class Result:
    """All checks.

    Args:
        checks: in the order of the computation.
        absent: backends that were not checked, by label, with the reason in a sentence.
    """

    checks: list[Check]
    absent: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Run every property on the current settings."""
    import torch

    from engine.flash.backends import BACKENDS as EXISTING
    from engine.flash.backends import Case
    from engine.flash.choice import error_against_reference

    drawn = _draw(params)
    inputs = [tensor.to(getattr(torch, params.dtype)).to(job.device) for tensor in drawn]
    chosen = [EXISTING[name] for name in dict.fromkeys(params.backends)]
    case = Case.of(*inputs[:2], params.causal, grad=False)
    absent = {backend.label: reason for backend in chosen if (reason := backend.why_not(case)) is not None}
    present = [backend for backend in chosen if backend.label not in absent]
    checks = _of_the_algorithm(params, drawn)
    standard, graded = (
        error_against_reference(EXISTING["standard"], *inputs, causal=params.causal, grad=grad)
        for grad in (False, True)
    )
    job.report(1, 1 + len(present))
    for done, backend in enumerate(present, 2):
        if job.cancelled:
            raise JobCancelledError("The job was cancelled before all properties were checked.")
        has_gradients = backend.why_not(case._replace(grad=True)) is None
        checks += _of_a_backend(params, backend, inputs, graded if has_gradients else standard)
        job.report(done, 1 + len(present))
    return Result(checks, absent)


def _draw(params: Params) -> list[Tensor]:
    """Q, K and V in float64, of a few heads."""
    import torch

    generator = torch.Generator().manual_seed(params.seed)
    shape = (min(params.batch, _MOST), min(params.heads, _MOST), params.length, params.head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def _of_the_algorithm(params: Params, inputs: list[Tensor]) -> list[Check]:
    """The didactic versions, in float64 on the CPU."""
    import torch

    from engine.attention import attend
    from engine.flash.online import softmax_of, stream_softmax
    from engine.flash.split import split_attention
    from engine.flash.tiled import differentiable_tiled_attention, stream_tiles
    from engine.flash.traffic import flash_traffic
    from engine.masks import causal, materialize

    T, d = params.length, params.head_dim
    blocks = {"block_q": params.block_q, "block_k": params.block_k, "causal": params.causal}
    mask = materialize(causal, T) if params.causal else None
    leaves = [tensor[:1, :1].clone().requires_grad_() for tensor in inputs]
    upstream = inputs[2][:1, :1].flip(-1)
    expected, _ = attend(*leaves, mask)
    found = differentiable_tiled_attention(*leaves, **blocks)
    gradients = [torch.autograd.grad(output, leaves, upstream) for output in (found, expected)]
    moved = sum(
        step.bytes_read + step.bytes_written
        for step in stream_tiles(*(tensor[0, 0].detach().float() for tensor in leaves), **blocks)
    )
    counted = flash_traffic(T, T, d, 4, params.block_q, params.block_k, params.causal).total
    row = (inputs[0][0, 0, -1] @ inputs[1][0, 0].mT) / d**0.5  # (T,)
    query, keys, values = inputs[0][:1, :, -1:], inputs[1][:1], inputs[2][:1]
    whole, _ = attend(query, keys, values)
    return [
        _check(
            "Tiles give the whole",
            "|tiled attention − standard attention|, float64",
            (found - expected).abs().max().item(),
            _EXACT,
        ),
        _check(
            "Tiles give the gradients",
            "|gradients of Q, K and V by tiles − autograd's through the matrix|, float64",
            max((one - other).abs().max().item() for one, other in zip(*gradients, strict=True)),
            _EXACT,
        ),
        _check("Every byte is counted", "|bytes that the tiles move − the formula|", float(abs(moved - counted)), 0.0),
        _check(
            "Softmax in chunks",
            f"|online softmax of the last row, {params.block_k} scores at a time − softmax|, float64",
            (softmax_of(stream_softmax(row, params.block_k)) - row.softmax(0)).abs().max().item(),
            _EXACT,
        ),
        _check(
            "Parts merge to the whole",
            f"|attention to the keys in {_PARTS} parts, merged − attention to all|, float64",
            (split_attention(query, keys, values, _PARTS) - whole).abs().max().item(),
            _EXACT,
        ),
    ]


def _of_a_backend(params: Params, backend: Backend, inputs: list[Tensor], standard: Errors) -> list[Check]:
    """One backend on the page's device, in the page's number format, beside the errors of standard attention."""
    import torch

    from engine.flash.choice import Errors, error_against_reference

    def judge(what: str, mine: Errors, theirs: Errors) -> Check:
        """By the rule of FlashAttention's own choice, on an `Errors` of one kind."""
        must = (
            f"error against float32 or better / that of standard attention in {params.dtype}, root mean square or "
            f"largest, whichever is worse; one rounding to {params.dtype} may come on top of the bound"
        )
        worst = max(mine.forward / theirs.forward, mine.forward_max / theirs.forward_max)
        held = mine.within(theirs, inputs[0].dtype)
        return Check(f"{backend.label}: {what}", must, worst, _TWICE, held)

    try:
        grad = standard.backward is not None
        found = error_against_reference(backend, *inputs, causal=params.causal, grad=grad)
        both = (found, standard)
        checks = [judge("output", *(Errors(each.forward, each.forward_max) for each in both))]
        if grad:
            checks.append(judge("gradients", *(Errors(each.backward, each.backward_max) for each in both)))
        if params.causal:
            Q, K, V = inputs
            changed = [
                tensor.index_fill(-2, torch.tensor([params.length - 1], device=V.device), 3.0) for tensor in (K, V)
            ]
            apart = backend.run(Q, *changed, True, None) - backend.run(Q, K, V, True, None)
            checks.append(
                _check(
                    f"{backend.label}: no looking ahead",
                    "what the last key and value change of earlier outputs",
                    apart[..., :-1, :].abs().max().item(),
                    0.0,
                )
            )
    except Exception as error:
        said = str(error).strip().split("\n")[0].rstrip(".") or "it said no more"
        return [Check(f"{backend.label}: runs", f"it failed with {type(error).__name__}: {said}", 1.0, 0.0, False)]
    return checks


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, measured, bound, measured <= bound)
