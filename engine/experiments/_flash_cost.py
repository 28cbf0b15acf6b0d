"""What a pass of attention costs by the books: memory held, bytes moved, FLOPs, and the time that these need.

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

SAFE = 0.85
"""Share of the free memory that a point may be predicted to take."""

ABOVE = 1.05
"""A share of a ceiling that noise does not explain."""

_VECTORS = {"standard": (2, 5), "flash": (1, 5)}
"""Of B·H·T·d numbers that are held at once, forward and for gradients."""
_VECTORS_ON_GPU = {"flash": 6, "torch-flash": 8, "torch-efficient": 7, "flex": 4}
"""The same for gradients of kernels without the matrix on a GPU: O, dQ, dK, dV, and in half precision two more for the
sum of dQ in float32, which FlexAttention does without; PyTorch's own kernels copy O or its gradient besides."""
_TENSORS = {"forward": 4, "backward": 8}
"""Of T·d numbers: Q, K, V and O; for gradients also dO, dQ, dK and dV."""
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
        ms: (N,), as `least_ms` models it; NaN before the device's peaks are measured.
    """

    name: Model
    label: str
    lengths: np.ndarray
    peak_bytes: np.ndarray
    ms: np.ndarray


def predict(params: SweepParams, peaks: Peaks | None = None, *, on_gpu: bool = False) -> tuple[Predicted, ...]:
    """Standard and flash attention at every length of the sweep; without `peaks` only their memory."""
    return tuple(
        Predicted(
            name,
            f"{label}, predicted",
            np.array(params.lengths),
            np.array([held_bytes(params, name, length, on_gpu=on_gpu) for length in params.lengths]),
            np.array([least_ms(params, name, length, peaks) if peaks else math.nan for length in params.lengths]),
        )
        for name, label in LABELS.items()
    )


def model_of(backend: str) -> Model:
    """By which model a backend's cost is counted."""
    return "standard" if traffic.held_matrices(backend, 4, grad=False) else "flash"


def held_bytes(params: SweepParams, backend: str, length: int, *, on_gpu: bool = False) -> int:
    """Peak beyond the inputs: some matrices of B·H·T² numbers, or none, and some vectors of B·H·T·d.

    Args:
        params: the shape.
        backend: its name, or a model's.
        length: T.
        on_gpu: whether it runs on one, where softmax and kernels hold other copies than on a processor.
    """
    heads = params.batch_at(length) * params.heads
    matrices = traffic.held_matrices(backend, params.element_bytes, params.grad, on_gpu=on_gpu) * heads * length**2
    vectors = _held_vectors(backend, params.grad, on_gpu) * heads * length * params.head_dim
    statistics = 4 * heads * length
    return params.element_bytes * (matrices + vectors) + statistics + _mask_bytes(params, backend, length, on_gpu)


def _held_vectors(backend: str, grad: bool, on_gpu: bool) -> int:
    model = model_of(backend)
    if model == "flash" and grad and on_gpu:
        return _VECTORS_ON_GPU.get(backend, _VECTORS_ON_GPU["flash"])
    return _VECTORS[model][grad]


def _mask_bytes(params: SweepParams, backend: str, length: int, on_gpu: bool) -> int:
    """Of the booleans that are there at the peak: in PyTorch's, which scores are −∞; a GPU has them without a mask."""
    if backend != "torch-math" or params.grad or not (params.causal or on_gpu):
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
    """Between memory and chip: of standard attention the matrices at every step, of flash attention every tensor once.

    Flash attention's tiles read keys and values again (`engine.flash.traffic.flash_traffic`), but a GPU's second-level
    cache keeps those of a head meanwhile, so they come from memory once. The logsumexp, one number a query in float32,
    is written forward and read backward.
    """
    T, d, e = length, params.head_dim, params.element_bytes
    if model == "standard":
        passes = [traffic.standard_traffic(T, T, d, e).total, traffic.standard_backward_traffic(T, T, d, e).total]
    else:
        passes = [tensors * e * T * d + traffic.STATISTICS_BYTES * T for tensors in _TENSORS.values()]
    taken = {"forward": passes[:1], "backward": passes[1:], "forward and backward": passes}[params.direction]
    return params.batch_at(T) * params.heads * sum(taken)


def least_ms(params: SweepParams, model: Model, length: int, peaks: Peaks) -> float:
    """The longer of computing and moving by the device's measured peaks, max(FLOP / peak, bytes / bandwidth): a model.

    It leaves out what takes more time (exponentials, starting kernels, further passes over the matrix such as the
    mask's) and what takes less: caches. A kernel without the matrix does not beat it, as it has to move every tensor
    once, if these are larger than the caches; standard attention may, where short matrices stay in caches. Standard
    attention computes what the mask hides as well.
    """
    computing = flops(params, length, causal=params.causal and model == "flash") / peaks.flops
    return 1e3 * max(computing, moved_bytes(params, model, length) / peaks.bandwidth)


def check_fits(params: SweepParams, free: int, *, on_gpu: bool = False) -> None:
    """Refuse a sweep whose longest sequences do not fit even without the T × T matrix.

    Raises:
        DoesNotFitError: they do not; the message says which length does.
    """
    needed = _without_matrix(params, on_gpu)
    if needed <= SAFE * free:
        return
    longest = params.max_length
    while longest > 2 * MIN_LENGTH:
        longest //= 2
        if _without_matrix(params.model_copy(update={"max_length": longest}), on_gpu) <= SAFE * free:
            way_out = f"the longest that fits is {longest:,}"
            break
    else:
        way_out = "no length fits, choose a smaller batch or fewer heads"
    raise DoesNotFitError(
        f"{params.max_length:,} tokens need {needed / GB:.1f} GB even without the matrix of scores, and "
        f"{free / GB:.1f} GB are free: {way_out}."
    )


def _without_matrix(params: SweepParams, on_gpu: bool) -> int:
    return max(
        input_bytes(params, length) + held_bytes(params, "flash", length, on_gpu=on_gpu) for length in params.lengths
    )
