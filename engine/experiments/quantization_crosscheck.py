"""Ours against bitsandbytes on the same weights: codes that differ, values that differ, and both times."""

from __future__ import annotations

from collections.abc import Callable
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
        differing_scales: how many scales have another 8-bit code, with double quantization; 0 without.
        max_difference: the largest difference between two values.
        ours_ms, theirs_ms: median time to quantize, in milliseconds.
        ours, theirs: evidence of these times, as in `engine.measure.Evidence`.
        sentence: all of it in words.
    """

    reason: str
    count: int
    differing_codes: int
    differing_values: int
    differing_scales: int
    max_difference: float
    ours_ms: float | None
    theirs_ms: float | None
    ours: dict[str, Any] | None
    theirs: dict[str, Any] | None
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Quantize with both, compare, and time both."""
    if reason := _quantization_source.not_comparable(params):
        return Result(reason, 0, 0, 0, 0, 0.0, None, None, None, None, reason)
    from engine.measure import measure_time

    weights = _quantization_source.read_weights(params, job).values.contiguous()
    pair = _eight_bits(weights) if _is_8bit(params) else _four_bits(weights, params)
    job.report(1, 3)
    shape = f"{weights.numel():,} weights to {params.in_words}"
    times = []
    for step, (whose, quantize) in enumerate(
        {"ours": pair.quantize_ours, "bitsandbytes": pair.quantize_theirs}.items(), 2
    ):
        times.append(measure_time(quantize, job.device, dtype=pair.weights.dtype, shape=f"{shape}, {whose}", runs=RUNS))
        job.report(step, 3)
    ours, theirs = times
    codes, scales = int(pair.codes.sum()), int(pair.scales.sum())
    values = int((pair.differences > 0).sum())
    evidence = [
        asdict(time) | {"versions": time.versions | {"bitsandbytes": version("bitsandbytes")}} for time in times
    ]
    return Result(
        reason="",
        count=weights.numel(),
        differing_codes=codes,
        differing_values=values,
        differing_scales=scales,
        max_difference=pair.differences.max().item(),
        ours_ms=ours.median_ms,
        theirs_ms=theirs.median_ms,
        ours=evidence[0],
        theirs=evidence[1],
        sentence=(
            f"Ours against bitsandbytes on these {weights.numel():,} weights{pair.rounded}: {codes} codes and {values} "
            "values differ"
            + (f", of {pair.scales.numel():,} scales {scales} in their 8-bit code" if pair.scales.numel() else "")
            + f"; {ours.median_ms:.3g} ms and {theirs.median_ms:.3g} ms."
            + (" Its FP4 has two codes for zero." if codes and not values else "")
        ),
    )


@dataclass(frozen=True, eq=False)
class _Pair:
    """Both libraries' results.

    Args:
        weights: what both have quantized.
        codes: where these differ, of the weights' shape.
        differences: of the values, absolute.
        scales: where the codes of scales differ that are quantized themselves; none where they are not.
        quantize_ours, quantize_theirs: to be timed.
        rounded: what was done to the weights before, in words.
    """

    weights: Tensor
    codes: Tensor
    differences: Tensor
    scales: Tensor
    quantize_ours: Callable[[], QuantizedTensor]
    quantize_theirs: Callable[[], Any]
    rounded: str = ""


def _is_8bit(params: Params) -> bool:
    return _quantization.type_name(params.data_type, params.bits, params.symmetric) == "int8"


def _four_bits(weights: Tensor, params: Params) -> _Pair:
    """As `Linear4bit` stores them."""
    from bitsandbytes import functional
    from torch import Size

    from engine.quantization.packing import unpack

    name, nested = _quantization.type_name(params.data_type, params.bits), params.double_quantization

    def quantize_ours() -> QuantizedTensor:
        return _quantization_source.quantize_as(weights, name, params)

    def quantize_theirs() -> tuple[Tensor, Any]:
        return functional.quantize_4bit(
            weights,
            blocksize=params.block_size,
            quant_type=_quantization_source.BITSANDBYTES_TYPES[name],
            compress_statistics=nested,
        )

    ours, (payload, state) = quantize_ours(), quantize_theirs()
    if weights.shape[-1] % params.block_size:  # their kernel for AVX512 takes wrong scales unless the tensor is flat
        state.shape = Size([weights.numel()])
    codes = unpack(payload.flatten(), 4, weights.numel()).view(weights.shape)
    values = functional.dequantize_4bit(payload, state).view(weights.shape)
    return _Pair(
        weights=weights,
        codes=ours.codes != codes,
        differences=(ours.dequantize() - values).abs(),
        scales=ours.scales.differences.codes != state.absmax if nested else codes.new_empty(0),
        quantize_ours=quantize_ours,
        quantize_theirs=quantize_theirs,
    )


def _eight_bits(weights: Tensor) -> _Pair:
    """As `Linear8bitLt` stores them, which takes float16 on CUDA.

    Its values are code · largest / 127. Its own function multiplies by 1/127 instead, which moves the last digit.
    """
    import torch
    from bitsandbytes import functional

    from engine.quantization.grouping import per_channel
    from engine.quantization.tensor import quantize, round_to

    half = round_to(weights, torch.float16)

    def quantize_ours() -> QuantizedTensor:
        return quantize(half, "int8", per_channel())

    def quantize_theirs() -> tuple[Tensor, Tensor, Tensor | None]:
        return functional.int8_vectorwise_quant(half)

    ours, (codes, largest, _) = quantize_ours(), quantize_theirs()
    levels = ours.data_type.decode(ours.codes)
    values = codes * (largest / 127)[:, None]
    return _Pair(
        weights=half,
        codes=levels != codes,
        differences=(levels * ours.scales[:, None] - values).abs(),
        scales=codes.new_empty(0),
        quantize_ours=quantize_ours,
        quantize_theirs=quantize_theirs,
        rounded=", rounded to float16",
    )
