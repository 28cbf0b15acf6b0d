"""How far each backend's output is from float64: histograms of the error, and the bound of twice standard's.

Legend: N bins of a histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.errors import JobCancelledError, JobFailedError
from engine.experiments._flash import BACKENDS, BackendName, Dtype, ShapeParams, Stop, number_in_words
from engine.experiments._flash_cost import model_of

if TYPE_CHECKING:
    from torch import Tensor

    from engine.runtime.jobs import Job

EDGES = np.linspace(-9, 1, 81)
"""Of the bins, log₁₀ of |error| / rms of the output."""

_BOUND = 2.0
_SAME = 1.1
_TF32_STEP = 2.0**-10


class Params(ShapeParams):
    """A shape, the numbers in it, and who computes."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 300.0

    length: int = Field(512, ge=16, le=4096, title="Tokens", description="Queries, and as many keys.")
    dtype: Dtype = Field(
        "bfloat16",
        title="Number format",
        description="Of queries, keys and values. The reference is float64 on the very same rounded numbers.",
    )
    size: float = Field(
        1.0,
        ge=0.1,
        le=10,
        title="Size of queries and keys",
        description="Their standard deviation. Large ones make attention sharp: a few weights near 1, the rest near 0.",
        json_schema_extra={"step": 0.1},
    )
    backends: tuple[BackendName, ...] = Field(
        BACKENDS,
        min_length=1,
        max_length=len(BACKENDS),
        title="Backends",
        description="Implementations to compare. What does not exist here is left out, and the reason is given.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="Of the random numbers.")

    def memory_bytes(self) -> int:
        """The float64 reference holds its T × T matrices, some four at its peak."""
        return 4 * 8 * self.batch * self.heads * self.length**2


@dataclass(frozen=True)
class Errors:
    """One backend.

    Args:
        backend, label: which, and what it is called.
        histogram: (N,), share of the output's numbers whose |error| / rms of the output lies in each bin; the first bin
            holds all that is below it, exact ones too, the last all above.
        rms, maximum: of the error, relative to the rms of the output.
        ratio: `rms` / the rms error of standard attention in the same format; None before that is known or if it is 0.
        within_bound: whether that is at most 2: one part of `engine.flash.choice.Errors.within`, without the rounding
            that is allowed there.
    """

    backend: str
    label: str
    histogram: np.ndarray
    rms: float
    maximum: float
    ratio: float | None
    within_bound: bool | None


@dataclass(frozen=True)
class Precision:
    """Attention to float32 numbers, computed in one precision, the rounding of the input counted.

    Args:
        name: e.g. ``"float16"``, ``"TF32"`` for standard attention; on a GPU ``"FlashAttention, fast"`` and
            ``"FlashAttention, exact"`` as well, which are what the layer of that name makes of float32.
        rms: error relative to the rms of the output, against float64.
        epsilon: distance from 1 to the next number of the format; of 11 significant bits for the fast layer, which
            computes in float16 with float32 sums.
    """

    name: str
    rms: float
    epsilon: float


@dataclass(frozen=True)
class Result:
    """All backends on the same numbers.

    Args:
        edges: (N + 1,), of the bins: log₁₀ of the relative error.
        errors: standard attention first.
        failed: backends that raised, by label, with what they said.
        absent: backends that were asked for and do not exist here, by label, with the reason in a sentence.
        precisions: the ladder of number formats, the most exact first.
        bound: 2 × the rms error of standard attention in this format.
        output_rms: root mean square of the output.
        on_gpu: whether it ran on one.
        sentence: what the histograms show.
        device: its name.
        versions: of what took part.
    """

    edges: np.ndarray
    errors: tuple[Errors, ...]
    failed: dict[str, str]
    absent: dict[str, str]
    precisions: tuple[Precision, ...]
    bound: float
    output_rms: float
    on_gpu: bool
    sentence: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Compute the reference once, and every backend on the same numbers."""
    import torch

    from engine.experiments._flash_sweep import attempt
    from engine.flash.backends import BACKENDS as EXISTING
    from engine.flash.backends import Case
    from engine.measure import device_name, versions

    dtype = getattr(torch, params.dtype)
    shape = (params.batch, params.heads, params.length, params.head_dim)
    generator = torch.Generator().manual_seed(params.seed)
    drawn = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * size for size in (params.size,) * 2 + (1.0,)
    ]
    inputs = [tensor.to(dtype).to(job.device) for tensor in drawn]
    reference = _reference(params, [tensor.double() for tensor in inputs])
    scale = reference.square().mean().sqrt().item()
    chosen = [EXISTING[name] for name in dict.fromkeys(("standard", *params.backends))]
    case = Case.of(*inputs[:2], params.causal, grad=False)
    errors: list[Errors] = []
    failed: dict[str, str] = {}
    absent = {backend.label: reason for backend in chosen if (reason := backend.why_not(case)) is not None}
    present = [backend for backend in chosen if backend.label not in absent]
    for done, backend in enumerate(present, 1):
        if job.cancelled:
            raise JobCancelledError("The job was cancelled before all backends were compared.")
        output = attempt(
            lambda backend=backend: backend.run(*inputs, params.causal, None),
            backend.name,
            backend.label,
            params.length,
            job.device,
        )
        if isinstance(output, Stop):
            failed[backend.label] = output.reason
        else:
            errors.append(_errors(backend.name, backend.label, output.double() - reference, scale, errors))
        job.report(done, len(present))
    if not errors or errors[0].backend != "standard":
        raise JobFailedError(f"Standard attention itself cannot be computed here. {failed['Standard attention']}")
    precisions = _precisions(params, [tensor.float().to(job.device) for tensor in drawn], job.device)
    return Result(
        edges=EDGES,
        errors=tuple(errors),
        failed=failed,
        absent=absent,
        precisions=precisions,
        bound=2 * errors[0].rms,
        output_rms=scale,
        on_gpu=job.device.startswith("cuda"),
        sentence=_describe(params, errors),
        device=device_name(job.device),
        versions=versions(),
    )


def _reference(params: Params, inputs: list[Tensor]) -> Tensor:
    """Standard attention in float64."""
    from engine.flash.backends import BACKENDS as EXISTING

    return EXISTING["standard"].run(*inputs, params.causal, None)


def _errors(backend: str, label: str, difference: Tensor, scale: float, before: list[Errors]) -> Errors:
    relative = (difference.abs() / scale).flatten().cpu().numpy()
    with np.errstate(divide="ignore"):
        logarithms = np.log10(relative).clip(EDGES[0], np.nextafter(EDGES[-1], 0))
    rms = float(np.sqrt(np.mean(relative**2)))
    ratio = rms / before[0].rms if before and before[0].rms else None
    return Errors(
        backend=backend,
        label=label,
        histogram=np.histogram(logarithms, EDGES)[0] / len(relative),
        rms=rms,
        maximum=float(relative.max()),
        ratio=1.0 if not before else ratio,
        within_bound=None if before and ratio is None else not before or ratio <= _BOUND,
    )


def _precisions(params: Params, inputs: list[Tensor], device: str) -> tuple[Precision, ...]:
    """The same float32 numbers in one precision after the other."""
    import torch

    from engine.flash.attention import FlashAttention
    from engine.flash.backends import BACKENDS as EXISTING

    reference = _reference(params, [tensor.double() for tensor in inputs])
    scale = reference.square().mean().sqrt()

    def distance(output: Tensor) -> float:
        return ((output.double() - reference).square().mean().sqrt() / scale).item()

    def standard(dtype: torch.dtype) -> float:
        return distance(EXISTING["standard"].run(*(tensor.to(dtype) for tensor in inputs), params.causal, None))

    def layer(precision: Literal["fast", "exact"]) -> float:
        return distance(FlashAttention(params.head_dim, params.causal, precision=precision)(*inputs))

    on_gpu, before = device.startswith("cuda"), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        found = [Precision("float32", standard(torch.float32), torch.finfo(torch.float32).eps)]
        if on_gpu:
            found.append(Precision("FlashAttention, exact", layer("exact"), torch.finfo(torch.float32).eps))
            torch.set_float32_matmul_precision("high")
            found.append(Precision("TF32", standard(torch.float32), _TF32_STEP))
            found.append(Precision("FlashAttention, fast", layer("fast"), _TF32_STEP))
    finally:
        torch.set_float32_matmul_precision(before)
    halves = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    found += [Precision(name, standard(dtype), torch.finfo(dtype).eps) for name, dtype in halves.items()]
    return tuple(found)


def _describe(params: Params, errors: list[Errors]) -> str:
    standard, *others = errors
    first = f"In {params.dtype} standard attention errs by {number_in_words(standard.rms)} of the output's size"
    if not others:
        return f"{first}; there is no other backend to compare it with here."
    without_matrix = [error for error in others if model_of(error.backend) == "flash"]
    best = min(without_matrix or others, key=lambda error: error.rms)
    beyond = [error.label for error in others if error.within_bound is False]
    said = f"{first}, {best.label} by {number_in_words(best.rms)}"
    if standard.rms and best.rms:
        ratio = best.rms / standard.rms
        said += (
            ": about the same"
            if _SAME > ratio > 1 / _SAME
            else f", {1 / ratio:.1f} times less"
            if ratio < 1
            else f", {ratio:.1f} times more"
        )
    if beyond:
        said += f". More than twice standard attention's error: {', '.join(beyond)}"
    else:
        said += (
            ". " + ("It" if len(others) == 1 else "Every backend") + " stays within twice standard attention's error"
        )
    if without_matrix and not beyond:
        said += ": leaving the matrix out costs no exactness"
    return f"{said}."
