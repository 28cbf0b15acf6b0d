"""Weights in few bits: the levels, the error, and the block that one outlier wrecks.

Legend: N weights, K bins of a histogram, S weights of a block, G blocks, E entries of the strip, L levels, b bits.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engine.errors import InputError
from engine.experiments import _quantization, _quantization_source

if TYPE_CHECKING:
    from torch import Tensor

    from engine.quantization.tensor import QuantizedTensor
    from engine.runtime.jobs import Job

BINS = 121
SHOWN = 4096
"""Weights of a block, the one that the largest is in the middle of."""
ENTRIES = 240
"""Of neighbouring groups, in one strip: as many as can be chosen with a pointer."""


class Params(_quantization.WeightParams):
    """Weights, their format, and the block to look at."""

    block: int = Field(
        -1,
        ge=-1,
        le=100_000_000,
        title="Block",
        description="Which weights with one scale are shown, counted from 0; −1 is that with the largest weight.",
    )


@dataclass(frozen=True)
class BlockView:
    """Weights that share a scale, at most `SHOWN` of them.

    Args:
        index: which group it is, from 0.
        start: place of the first weight that is shown among all N.
        size: weights that share the scale, shown or not.
        original, dequantized, error: (≤ `SHOWN`,); error is dequantized − original.
        scale: as it is stored, dequantized if it is quantized itself.
        zero_point: level that stands for 0; None for symmetric types.
        levels: (L,), the values that a weight of it can take.
        largest: magnitude of the whole group's largest weight.
        extent: from the smallest to the largest weight of the whole group, 0 counted as one of them.
        standard_deviation: of the whole group.
        rms_error: of the whole group.
        worst: whether no other group has a larger rms error.
    """

    index: int
    start: int
    size: int
    original: np.ndarray
    dequantized: np.ndarray
    error: np.ndarray
    scale: float
    zero_point: float | None
    levels: np.ndarray
    largest: float
    extent: float
    standard_deviation: float
    rms_error: float
    worst: bool


@dataclass(frozen=True)
class Distortion:
    """As `engine.quantization.distortion.Distortion`.

    Args:
        mse: mean squared error.
        sqnr_db: mean square of the weights over `mse`, in dB; infinite where nothing was lost.
        max: the largest absolute error.
        mean_absolute: the mean absolute error.
    """

    mse: float
    sqnr_db: float
    max: float
    mean_absolute: float


@dataclass(frozen=True)
class Result:
    """Weights before and after.

    Args:
        source: what they are, in a sentence.
        layer: name of the layer; empty for drawn numbers.
        layers: names of all linear layers of the model; empty for drawn numbers.
        shape: of the weights.
        count: N.
        data_type: name of the format in the engine, e.g. ``"nf4"``.
        edges: (K + 1,), of both histograms.
        original, dequantized: (K,), weights in each bin.
        levels: those of the shown block, which for one scale per tensor are those of all weights.
        error_edges: (K + 1,).
        error_counts: (K,), of dequantized − original.
        block: the one that is looked at.
        num_blocks: G.
        block_errors: (E,), the largest rms error of neighbouring groups; of each group where there are at most 240.
        worst_blocks: (E,), number of the group whose error each entry is.
        block_edges: (E + 1,): entry e stands for the groups from edges[e] up to, not with, edges[e + 1].
        median_error: of the rms errors of all groups.
        distortion: of all weights.
        standard_deviation: of the weights.
        bits_per_weight: everything counted: `payload_bits` + `scale_bits`.
        payload_bits, scale_bits: of codes; of scales and zero points; a weight.
        bound_db: the best SQNR that so many bits could reach if the weights were independent and normal.
        bound_applies: whether they are; else the bound is a line to compare with, not a limit.
        bound_note: that in a sentence.
        nbytes: of codes, scales and zero points.
        original_nbytes: of the weights in bfloat16.
        padded: zeros that fill the last block up while it is quantized; they are not stored.
        crosscheck: why `quantization_crosscheck` has nothing to compare with; empty if it has.
        sentence: what quantizing did.
        block_sentence: the same of the block.
    """

    source: str
    layer: str
    layers: list[str]
    shape: tuple[int, ...]
    count: int
    data_type: str
    edges: np.ndarray
    original: np.ndarray
    dequantized: np.ndarray
    levels: np.ndarray
    error_edges: np.ndarray
    error_counts: np.ndarray
    block: BlockView
    num_blocks: int
    block_errors: np.ndarray
    worst_blocks: np.ndarray
    block_edges: np.ndarray
    median_error: float
    distortion: Distortion
    standard_deviation: float
    bits_per_weight: float
    payload_bits: float
    scale_bits: float
    bound_db: float
    bound_applies: bool
    bound_note: str
    nbytes: int
    original_nbytes: int
    padded: int
    crosscheck: str
    sentence: str
    block_sentence: str


def run(params: Params, job: Job) -> Result:
    """Quantize the weights and look at what became of them.

    Raises:
        InputError: no such block, or weights that cannot be had.
    """
    from engine.quantization.distortion import gaussian_bound_db, measure_distortion

    weights = _quantization_source.read_weights(params, job)
    stored = weights.quantize(params)
    dequantized = stored.dequantize()
    count = weights.values.numel()
    edges, (before, after) = _histograms(weights.values, dequantized)
    error_edges, (errors,) = _histograms(dequantized - weights.values, centred=True)
    block, block_errors = _look_into(params.block, weights.values, stored, dequantized)
    entries, worst_blocks, block_edges = _pool(block_errors)
    distortion = Distortion(**vars(measure_distortion(weights.values, dequantized)))
    payload_bits = 8 * stored.payload.nbytes / count
    bound = gaussian_bound_db(stored.bits_per_weight)
    return Result(
        source=weights.sentence,
        layer=weights.layer,
        layers=weights.layers,
        shape=tuple(weights.values.shape),
        count=count,
        data_type=stored.data_type.name,
        edges=edges,
        original=before,
        dequantized=after,
        levels=block.levels,
        error_edges=error_edges,
        error_counts=errors,
        block=block,
        num_blocks=len(block_errors),
        block_errors=entries,
        worst_blocks=worst_blocks,
        block_edges=block_edges,
        median_error=float(np.median(block_errors)),
        distortion=distortion,
        standard_deviation=weights.values.std().item(),
        bits_per_weight=stored.bits_per_weight,
        payload_bits=payload_bits,
        scale_bits=stored.bits_per_weight - payload_bits,
        bound_db=bound,
        bound_applies=weights.normal,
        bound_note=weights.bound_note,
        nbytes=stored.nbytes,
        original_nbytes=2 * count,
        padded=stored.grouping.split(weights.values).numel() - count,
        crosscheck=_quantization_source.not_comparable(params),
        sentence=_describe(params, stored, distortion, bound, weights.normal),
        block_sentence=_describe_block(params, block, len(block_errors)),
    )


def _histograms(*samples: Tensor, centred: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
    """Edges that hold all `samples`, and the counts of each; `centred` puts 0 into the middle of a bin."""
    import torch

    low, high = min(sample.min().item() for sample in samples), max(sample.max().item() for sample in samples)
    if centred:
        low, high = -max(-low, high), max(-low, high)
    if low == high:  # constant weights, or no error
        low, high = low - 0.5, high + 0.5
    counts = [torch.histc(sample.float(), BINS, low, high).cpu().numpy().astype(np.int64) for sample in samples]
    return np.linspace(low, high, BINS + 1), counts


def _look_into(
    chosen: int, values: Tensor, stored: QuantizedTensor, dequantized: Tensor
) -> tuple[BlockView, np.ndarray]:
    """The chosen group, and the rms error of every group, (G,)."""
    import torch

    split = stored.grouping.split
    original, after = split(values), split(dequantized)  # (G, S)
    sizes = split(torch.ones_like(values)).sum(1)  # (G,), without what fills up the last one
    errors = ((after - original).square().sum(1) / sizes).sqrt()  # (G,)
    if chosen >= len(errors):
        raise InputError(
            f"There is no block {chosen}: these weights have {len(errors)} groups with one scale, 0 to "
            f"{len(errors) - 1}; −1 takes the one with the largest weight."
        )
    index = chosen if chosen >= 0 else int(original.abs().amax(1).argmax())
    size = int(sizes[index])
    whole = original[index, :size]
    peak = int(original[index].abs().argmax())
    first = min(max(0, peak - SHOWN // 2), max(0, size - SHOWN))
    shown = slice(first, min(size, first + SHOWN))
    scale, zero_point = _scale_of(stored, index)
    levels = scale * (stored.data_type.codebook.unique() - (zero_point or 0.0))
    view = BlockView(
        index=index,
        start=index * original.shape[1] + first,
        size=size,
        original=original[index, shown].cpu().numpy(),
        dequantized=after[index, shown].cpu().numpy(),
        error=(after - original)[index, shown].cpu().numpy(),
        scale=scale,
        zero_point=zero_point,
        levels=levels.numpy(),
        largest=whole.abs().max().item(),
        extent=(whole.max().clamp(min=0) - whole.min().clamp(max=0)).item(),
        standard_deviation=whole.std(correction=0).item(),
        rms_error=errors[index].item(),
        worst=bool(errors[index] == errors.max()),
    )
    return view, errors.cpu().numpy()


def _scale_of(stored: QuantizedTensor, index: int) -> tuple[float, float | None]:
    """Scale and zero point of a group, as they are used."""
    import torch

    from engine.quantization.packing import unpack

    scales = stored.scales if isinstance(stored.scales, torch.Tensor) else stored.scales.dequantize()
    if stored.zero_points is None:
        return scales[index].item(), None
    codes = unpack(stored.zero_points, stored.data_type.bits, len(scales))
    return scales[index].item(), stored.data_type.decode(codes)[index].item()


def _pool(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest of neighbouring errors (E,), where each of them is (E,), and where the neighbours end (E + 1,)."""
    edges = np.linspace(0, len(errors), min(ENTRIES, len(errors)) + 1).round().astype(np.int64)
    worst = np.array([first + errors[first:end].argmax() for first, end in itertools.pairwise(edges)])
    return errors[worst], worst, edges


def _describe(params: Params, stored: QuantizedTensor, distortion: Distortion, bound: float, normal: bool) -> str:
    cost = f"{params.in_words}: {stored.bits_per_weight:.3g} bits a weight with all scales"
    if math.isinf(distortion.sqnr_db):
        return f"{cost}, and every weight is exactly a level: nothing is lost."
    limit = "the best that any code of so many bits can do is" if normal else "independent normal weights would allow"
    return f"{cost}. The signal is {distortion.sqnr_db:.1f} dB above the error; {limit} {bound:.1f} dB."


def _describe_block(params: Params, block: BlockView, num_blocks: int) -> str:
    group = "Channel" if params.scale == "per channel" else "Block"
    who = (
        f"All {block.size:,} weights share one scale"
        if num_blocks == 1
        else f"{group} {block.index} of {num_blocks:,} has {block.size:,} weight{'s' * (block.size > 1)} with one scale"
    )
    worst = f", the largest of all {group.lower()}s" if block.worst and num_blocks > 1 else ""
    if block.size == 1:
        return f"{who}; its error is {block.rms_error:.2g}{worst}."
    spread = block.standard_deviation
    if not spread:
        return f"{who}; they are equal, and their rms error is {block.rms_error:.2g}{worst}."
    by, width = ("the largest", block.largest) if block.zero_point is None else ("their range with 0", block.extent)
    return (
        f"{who}; it is set by {by}, {width / spread:.1f} times their standard deviation: rms error "
        f"{block.rms_error:.2g}{worst}."
    )
