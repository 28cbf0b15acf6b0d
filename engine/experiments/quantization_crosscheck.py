"""Ours against bitsandbytes on the same weights: codes that differ, values that differ, and both times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from engine.experiments import _quantization, _quantization_source

if TYPE_CHECKING:
    from torch import Tensor

    from engine.quantization.tensor import QuantizedTensor
    from engine.runtime.jobs import Job


RUNS = 10


class Params(_quantization.WeightParams):
    """The settings of the page."""

    lane: ClassVar = "long"
    cacheable: ClassVar[bool] = False


@dataclass(frozen=True)
class Result:
    """Both libraries on one tensor.

    Args:
        reason: why there is nothing to compare with, in a sentence; empty if there is, else all else is 0 or None.
        count: weights.
        differing_codes: how many have another code.
        differing_values: how many have another value after dequantizing.
        max_difference: the largest difference between two values.
        ours_ms, theirs_ms: median time to quantize, in milliseconds.
        ours, theirs: evidence of these times, as in `engine.measure.Evidence`.
        sentence: all of it in words.
    """

    reason: str
    count: int
    differing_codes: int
    differing_values: int
    max_difference: float
    ours_ms: float | None
    theirs_ms: float | None
    ours: dict[str, Any] | None
    theirs: dict[str, Any] | None
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Quantize with both, compare, and time both.

    With double quantization the scales are compared as they are before: bitsandbytes' search on the CPU misses the
    nearest 8-bit level of some.
    """
    if reason := _quantization_source.not_comparable(params):
        return Result(reason, 0, 0, 0, 0.0, None, None, None, None, reason)
    from bitsandbytes import functional
    from torch import Size

    from engine.measure import measure_time
    from engine.quantization.grouping import per_block
    from engine.quantization.packing import unpack
    from engine.quantization.tensor import quantize

    name = _quantization.type_name(params.data_type, params.bits)
    quant_type, size = _quantization_source.BITSANDBYTES_TYPES[name], params.block_size
    weights = _quantization_source.read_weights(params, job).values.contiguous()

    def quantize_ours() -> QuantizedTensor:
        return quantize(weights, name, per_block(size))

    def quantize_theirs() -> tuple[Tensor, Any]:
        return functional.quantize_4bit(weights, blocksize=size, quant_type=quant_type)

    ours, (payload, state) = quantize_ours(), quantize_theirs()
    if weights.shape[-1] % size:  # their kernel for AVX512 takes other blocks' scales unless the tensor is flat
        state.shape = Size([weights.numel()])
    values = functional.dequantize_4bit(payload, state).view(weights.shape)
    differences = (ours.dequantize() - values).abs()
    job.report(1, 3)
    shape = f"{weights.numel():,} weights to {params.data_type}, 4 bits, blocks of {size}"
    ours_time = measure_time(quantize_ours, job.device, dtype=weights.dtype, shape=f"{shape}, ours", runs=RUNS)
    job.report(2, 3)
    theirs_time = measure_time(
        quantize_theirs, job.device, dtype=weights.dtype, shape=f"{shape}, bitsandbytes", runs=RUNS
    )
    job.report(3, 3)
    codes = unpack(payload.flatten(), 4, weights.numel()).view(weights.shape)
    differing_codes = int((ours.codes != codes).sum())
    differing_values = int((differences > 0).sum())
    evidence = [
        asdict(time) | {"versions": time.versions | {"bitsandbytes": version("bitsandbytes")}}
        for time in (ours_time, theirs_time)
    ]
    return Result(
        reason="",
        count=weights.numel(),
        differing_codes=differing_codes,
        differing_values=differing_values,
        max_difference=differences.max().item(),
        ours_ms=ours_time.median_ms,
        theirs_ms=theirs_time.median_ms,
        ours=evidence[0],
        theirs=evidence[1],
        sentence=(
            f"Ours against bitsandbytes on these {weights.numel():,} weights: {differing_codes} codes and "
            f"{differing_values} values differ; {ours_time.median_ms:.3g} ms and {theirs_time.median_ms:.3g} ms."
            + (" Its FP4 has two codes for zero." if differing_codes and not differing_values else "")
        ),
    )
