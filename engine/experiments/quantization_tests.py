"""What must hold of quantized weights, checked on the weights and the settings of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.experiments import _quantization, _quantization_source
from engine.experiments.attention_tests import Check

if TYPE_CHECKING:
    from torch import Tensor

    from engine.quantization.tensor import QuantizedTensor
    from engine.runtime.jobs import Job


ROUNDING = 1e-5
"""Of the largest number: what float32 may differ by when it is multiplied by an inverse and by the scale again."""


class Params(_quantization.WeightParams):
    """The settings of the page."""


@dataclass(frozen=True)
class Result:
    """All checks, in the order in which weights are quantized."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Run every property on the current settings."""
    import torch

    from engine.quantization.distortion import measure_distortion

    weights = _quantization_source.read_weights(params, job)
    w, stored = weights.values, weights.quantize(params)
    values, data_type, grouping = stored.dequantize(), stored.data_type, stored.grouping
    name = data_type.name

    def again(numbers: Tensor) -> QuantizedTensor:
        return _quantization_source.quantize_as(numbers, name, params)

    scales = stored.scales if isinstance(stored.scales, torch.Tensor) else stored.scales.dequantize()
    levels, scaled, offset = _in_units_of_scales(w, stored, scales)
    used = torch.unique(stored.codes)
    codebook = data_type.codebook.to(w.device)
    nearest = torch.searchsorted((codebook[:-1] + codebook[1:]) / 2, scaled.contiguous())
    apart = (scaled - levels).abs() - (scaled - codebook[nearest]).abs()
    own_scales = not params.double_quantization  # else the codes were chosen for the scales before they were rounded
    distortion = measure_distortion(w, values)
    checks = [
        _check(f"At most 2^{data_type.bits} codes", "different codes in use", len(used), 2**data_type.bits),
        _check(
            "Every code stands for a level",
            "largest |level − round(level)| over the codebook",
            (data_type.round(codebook) - codebook).abs().max().item(),
            0.0,
        ),
        _check(
            "Dequantized is scale × level",
            "largest |dequantized − scale · (level − zero point)|, over the largest weight",
            _relative(values, grouping.join((levels - offset) * scales[:, None], w.shape), w),
            0.0,
        ),
        _check(
            "Padding is undone exactly",
            "weights that splitting into groups and joining them again has changed",
            int((grouping.join(grouping.split(w), w.shape) != w).sum()),
            0.0,
        ),
        _check(
            "Bits counted are bytes stored",
            "|bytes of codes, scales and zero points − what the formula says|",
            abs(stored.bits_per_weight * w.numel() / 8 - _bytes_by_formula(params, w, data_type.bits)),
            1e-6 * stored.nbytes,
        ),
    ]
    if own_scales:
        checks.append(
            _check(
                "Each weight gets its nearest level",
                "how much nearer another level would be, at most, in units of the scale",
                apart.max().item(),
                ROUNDING * data_type.peak,
            )
        )
    if own_scales and stored.zero_points is None:  # a zero point is rounded, so that the range of the result differs
        checks.append(
            _check(
                "Quantizing twice changes nothing",
                "largest |quantized again − quantized| over the largest weight",
                _relative(again(values).dequantize(), values, w),
                ROUNDING,
            )
        )
    zeroed, scale = _with_zeros(w, again)
    checks += [
        _check(
            "Zero stays zero",
            "largest magnitude of a group of zeros that is quantized among the others"
            + (", up to its scale: on CUDA double quantization leaves that above 0 in NF4" if scale else ""),
            zeroed,
            scale,
        ),
        _check(
            "Twice the weights, twice the result",
            "largest |quantize(2 w) − 2 · quantize(w)| over the largest weight",
            _relative(again(2 * w).dequantize(), 2 * values, w),
            0.0 if own_scales else ROUNDING,
        ),
    ]
    if data_type.bits < _quantization.MAX_BITS and params.data_type in ("NormalFloat", "Integer"):
        finer_name = _quantization.type_name(params.data_type, params.bits + 1, params.symmetric)
        finer = _quantization_source.quantize_as(w, finer_name, params)
        checks.append(
            _check(
                "One more bit costs no accuracy",
                f"mean squared error with {data_type.bits + 1} bits, over that with {data_type.bits}",
                _ratio(measure_distortion(w, finer.dequantize()).mse, distortion.mse),
                1.0,
            )
        )
    if not _quantization_source.not_comparable(params):
        compare = _against_8_bits if name == "int8" else _against_4_bits
        checks.append(compare(w, name, params.block_size))
    job.report(1, 1)
    return Result(checks)


def _with_zeros(w: Tensor, quantize: Callable[[Tensor], QuantizedTensor]) -> tuple[float, float]:
    """What becomes of the first group's weights if they are 0: the largest magnitude, and what it may be.

    That is 0, but where a CUDA kernel gives zeros NF4's lowest code, and the scale is not 0 once it is quantized.
    """
    from engine.quantization.tensor import QuantizedScales, kernels_for

    stored = quantize(w)
    groups = stored.grouping.split(w).clone()
    groups[0] = 0
    stored = quantize(stored.grouping.join(groups, w.shape))
    largest = stored.grouping.split(stored.dequantize())[0].abs().max().item()
    kernels = kernels_for(w)
    leaves = kernels and kernels.encodes(stored.data_type, stored.grouping, w.dtype) and stored.data_type.name == "nf4"
    if not leaves or not isinstance(stored.scales, QuantizedScales):
        return largest, 0.0
    return largest, abs(stored.scales.dequantize()[0].item())


def _in_units_of_scales(w: Tensor, stored: QuantizedTensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Levels (G, S), weights in units of their scale and offset like levels, and the zero points (G, 1) or 0."""
    from engine.quantization.packing import unpack

    levels = stored.grouping.split(stored.data_type.decode(stored.codes))
    groups = stored.grouping.split(w)
    units = scales.where(scales != 0, 1.0)[:, None]
    if stored.zero_points is None:
        return levels, groups / units, 0.0
    codes = unpack(stored.zero_points, stored.data_type.bits, len(scales))
    offset = stored.data_type.decode(codes)[:, None]
    padding = stored.grouping.split(w.new_ones(w.shape)) == 0
    return levels.where(~padding, offset), groups / units + offset, offset


def _bytes_by_formula(params: Params, w: Tensor, bits: int) -> int:
    """⌈N·b/8⌉ of codes; of G groups 4·G, or G + 4·⌈G/256⌉ + 4 double-quantized; ⌈G·b/8⌉ of zero points."""
    groups = {"per block": -(-w.numel() // params.block_size), "per channel": len(w), "per tensor": 1}[params.scale]
    scales = groups + 4 * -(-groups // 256) + 4 if params.double_quantization else 4 * groups
    asymmetric = params.data_type == "Integer" and not params.symmetric
    return -(-w.numel() * bits // 8) + scales + (-(-groups * bits // 8) if asymmetric else 0)


def _against_8_bits(w: Tensor, name: str, _: int) -> Check:
    """Of weights in float16, as its CUDA kernel takes them; that multiplies by an inverse of its own."""
    import torch
    from bitsandbytes import functional

    from engine.quantization.grouping import per_channel
    from engine.quantization.tensor import quantize, round_to

    half = round_to(w, torch.float16)
    theirs, _, _ = functional.int8_vectorwise_quant(half)
    ours = quantize(half, name, per_channel())
    scaled = half / ours.scales.where(ours.scales != 0, 1.0)[:, None]
    apart = (scaled - theirs).abs() - (scaled - ours.data_type.decode(ours.codes)).abs()
    return _check(
        "bitsandbytes chooses the same levels",
        "how much further from a weight its level is, at most, in units of the scale",
        apart.max().item(),
        ROUNDING * ours.data_type.peak,
    )


def _against_4_bits(w: Tensor, name: str, block_size: int) -> Check:
    from bitsandbytes import functional

    from engine.quantization.grouping import per_block
    from engine.quantization.packing import unpack
    from engine.quantization.tensor import quantize

    quant_type = _quantization_source.BITSANDBYTES_TYPES[name]
    theirs, _ = functional.quantize_4bit(w.contiguous(), blocksize=block_size, quant_type=quant_type)
    codes = unpack(theirs.flatten(), 4, w.numel()).view(w.shape)
    ours = quantize(w, name, per_block(block_size))
    differing = int((ours.data_type.decode(ours.codes) != ours.data_type.decode(codes)).sum())
    return _check("bitsandbytes chooses the same levels", "weights with another level there", differing, 0.0)


def _relative(one: Tensor, other: Tensor, w: Tensor) -> float:
    return _ratio((one - other).abs().max().item(), w.abs().max().item())


def _ratio(above: float, below: float) -> float:
    return above / below if below else above


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, float(measured), float(bound), measured <= bound)
