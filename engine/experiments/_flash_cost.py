"""What a pass of attention costs by the books: memory held, bytes moved, FLOPs, and the time that these need at least.

Needs no torch.

Legend: B batch, H heads, T tokens, d head width, e bytes of a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.errors import DoesNotFitError
from engine.experiments._flash import GB, MIN_LENGTH, Direction, Peaks, SweepParams
from engine.flash import traffic

Model = Literal["standard", "flash"]

LABELS: dict[Model, str] = {"standard": "standard attention", "flash": "flash attention"}
TILE = (128, 64)
"""Rows and columns of a tile for which flash attention's traffic is counted, as usual in kernels for GPUs."""

SAFE = 0.85
"""Share of the free memory that a point may be predicted to take."""

_VECTORS = {"standard": (2, 5), "flash": (1, 5)}
"""Of B·H·T·d numbers that are held at once, forward and for gradients."""
_PASSES: dict[Direction, traffic.Direction] = {
    "forward": "forward",
    "backward": "backward",
    "forward and backward": "both",
}


@dataclass(frozen=True)
class Predicted:
    """A line that is computed and not measured.

    Args:
        name: ``"standard"`` (the T × T matrix is held and moved) or ``"flash"`` (it never is).
        label: in words.
        lengths: (N,), the lengths of the sweep.
        peak_bytes: (N,), beyond the inputs.
        ms: (N,), no faster than this by the device's measured peaks; NaN before those are measured.
    """

    name: Model
    label: str
    lengths: np.ndarray
    peak_bytes: np.ndarray
    ms: np.ndarray


def predict(params: SweepParams, peaks: Peaks | None = None) -> tuple[Predicted, ...]:
    """Standard and flash attention at every length of the sweep; without `peaks` only their memory."""
    return tuple(
        Predicted(
            name,
            f"{label}, predicted",
            np.array(params.lengths),
            np.array([held_bytes(params, name, length) for length in params.lengths]),
            np.array([least_ms(params, name, length, peaks) if peaks else math.nan for length in params.lengths]),
        )
        for name, label in LABELS.items()
    )


def model_of(backend: str) -> Model:
    """By which model a backend's cost is counted."""
    return "standard" if traffic.held_matrices(backend, 4, grad=False) else "flash"


def held_bytes(params: SweepParams, backend: str, length: int) -> int:
    """Peak beyond the inputs: some matrices of B·H·T² numbers, or none, and some vectors of B·H·T·d.

    Args:
        params: the shape.
        backend: its name, or a model's.
        length: T.
    """
    heads = params.batch_at(length) * params.heads
    matrices = traffic.held_matrices(backend, params.element_bytes, params.grad) * heads * length**2
    vectors = _VECTORS[model_of(backend)][params.grad] * heads * length * params.head_dim
    statistics = 4 * heads * length
    return (
        params.element_bytes * (matrices + vectors) + statistics + params.causal * _mask_bytes(params, backend, length)
    )


def _mask_bytes(params: SweepParams, backend: str, length: int) -> int:
    """Of the booleans that are there at the peak: in PyTorch's, which scores are −∞."""
    if backend != "torch-math" or params.grad:
        return 0
    return params.batch_at(length) * params.heads * length**2


def input_bytes(params: SweepParams, length: int) -> int:
    """Q, K and V; for gradients also the output's gradient."""
    numbers = params.batch_at(length) * params.heads * length * params.head_dim
    return (4 if params.grad else 3) * params.element_bytes * numbers


def flops(params: SweepParams, length: int, *, causal: bool | None = None) -> int:
    """Of the pass; with a mask only what it lets through counts, unless `causal` says otherwise."""
    causal = params.causal if causal is None else causal
    B, H, d = params.batch_at(length), params.heads, params.head_dim
    return traffic.attention_flops(B, H, length, length, d, causal, _PASSES[params.direction])


def moved_bytes(params: SweepParams, model: Model, length: int) -> int:
    """Between memory and chip, by the model."""
    T, d, e = length, params.head_dim, params.element_bytes
    if model == "standard":
        passes = traffic.standard_traffic(T, T, d, e), traffic.standard_backward_traffic(T, T, d, e)
    else:
        tiles = (*TILE, params.causal)
        passes = traffic.flash_traffic(T, T, d, e, *tiles), traffic.flash_backward_traffic(T, T, d, e, *tiles)
    taken = {"forward": passes[:1], "backward": passes[1:], "forward and backward": passes}[params.direction]
    return params.batch_at(T) * params.heads * sum(one.total for one in taken)


def least_ms(params: SweepParams, model: Model, length: int, peaks: Peaks) -> float:
    """The longer of computing and moving. Standard attention computes what the mask hides as well."""
    computing = flops(params, length, causal=params.causal and model == "flash") / peaks.flops
    return 1e3 * max(computing, moved_bytes(params, model, length) / peaks.bandwidth)


def check_fits(params: SweepParams, free: int) -> None:
    """Refuse a sweep whose longest sequences do not fit even without the T × T matrix.

    Raises:
        DoesNotFitError: they do not; the message says which length does.
    """
    needed = _without_matrix(params)
    if needed <= SAFE * free:
        return
    longest = params.max_length
    while longest > 2 * MIN_LENGTH:
        longest //= 2
        if _without_matrix(params.model_copy(update={"max_length": longest})) <= SAFE * free:
            way_out = f"the longest that fits is {longest:,}"
            break
    else:
        way_out = "no length fits, choose a smaller batch or fewer heads"
    raise DoesNotFitError(
        f"{params.max_length:,} tokens need {needed / GB:.1f} GB even without the matrix of scores, and "
        f"{free / GB:.1f} GB are free: {way_out}."
    )


def _without_matrix(params: SweepParams) -> int:
    return max(input_bytes(params, length) + held_bytes(params, "flash", length) for length in params.lengths)
