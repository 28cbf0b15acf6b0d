"""Block-wise 4-bit quantization in one pass over memory, for CUDA, in Triton; `engine.quantization.tensor` is the
reference.

    payload, absmax = quantize_blocks(w, "nf4", 64)
    w = dequantize_blocks(payload, absmax, levels, 64, w.shape, w.dtype)

Codes and scales are those of bitsandbytes' CUDA kernels to the bit, which decides three things that the reference does
otherwise: the inverse of the largest magnitude is the chip's fast one (within one unit in the last place), numbers
below 2^−126 count as 0, and FP4 compares magnitudes, with thresholds rounded to a few digits. Blocks of zeros get NF4's
lowest code, since 0/0 is above no threshold. Times their scale of 0 that is 0; but a scale that is quantized itself is
not 0 any more, so that with double quantization a block of zeros comes back as that small scale's negative.

Legend: N weights, S weights of a block, G blocks, P blocks of one program.
"""
# ruff: noqa: ANN001, ANN202 - what the kernels take and give are blocks of numbers, and Triton reads annotations

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Size, Tensor

from engine.quantization.data_types import DataType
from engine.quantization.grouping import Grouping

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = tuple(2**power for power in range(5, 13))


class Launch(NamedTuple):
    """How work is cut up for the GPU.

    Args:
        weights: of one program, a power of two; a block of more weights is one program.
        num_warps: that share them.
    """

    weights: int
    num_warps: int


QUANTIZE_LAUNCH = Launch(2048, 4)
DEQUANTIZE_LAUNCH = Launch(2048, 4)


class NestedScales(NamedTuple):
    """Scales that are quantized themselves: levels[code]·scale + mean, in blocks of `block_size`.

    Args:
        codes: (G,) uint8.
        levels: by code, (256,) float32.
        scales: (⌈G / block_size⌉,) float32.
        mean: a float32 number.
        block_size: scales with one scale, a power of two.
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor
    mean: Tensor
    block_size: int


def decodes(data_type: DataType, grouping: Grouping, dtype: torch.dtype) -> bool:
    """Whether `dequantize_blocks` knows such a tensor of weights of `dtype`."""
    even = grouping.kind == "block" and grouping.size in BLOCK_SIZES
    return even and data_type.bits == 4 and not data_type.has_zero_point and dtype in DTYPES


def encodes(data_type: DataType, grouping: Grouping, dtype: torch.dtype) -> bool:
    """Whether `quantize_blocks` makes such a tensor from weights of `dtype`."""
    return data_type.name in ENCODERS and decodes(data_type, grouping, dtype)


def quantize_blocks(
    w: Tensor, name: str, block_size: int, broken: Tensor | None = None, launch: Launch = QUANTIZE_LAUNCH
) -> tuple[Tensor, Tensor]:
    """The codes of `w`, two a byte, the first in the high half, and the largest magnitude of each block.

    A number that is not finite makes its block's magnitude not finite.

    Args:
        w: bfloat16, float16 or float32, N of them in any shape.
        name: of the data type, one of `ENCODERS`.
        block_size: S, one of `BLOCK_SIZES`; the last block may have fewer weights.
        broken: an int32 number that becomes 1 if a weight is not finite, and stays otherwise.
        launch: how the work is cut up.

    Returns:
        (⌈N / 2⌉,) uint8, filled up with a zero code, and (⌈N / S⌉,) float32.

    Source: `kQuantizeBlockwise` of bitsandbytes 0.50.
    """
    w = w.contiguous()
    count = w.numel()
    payload = torch.empty(triton.cdiv(count, 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(triton.cdiv(count, block_size), dtype=torch.float32, device=w.device)
    blocks = max(1, launch.weights // block_size)  # P
    with torch.cuda.device_of(w):
        _quantize_kernel[(triton.cdiv(len(absmax), blocks),)](
            w,
            payload,
            absmax,
            broken,
            count,
            len(payload),
            ENCODE=ENCODERS[name],
            BLOCK_SIZE=block_size,
            BLOCKS=blocks,
            num_warps=launch.num_warps,
        )
    return payload, absmax


def dequantize_blocks(
    payload: Tensor,
    scales: Tensor | NestedScales,
    levels: Tensor,
    block_size: int,
    shape: Size,
    dtype: torch.dtype,
    launch: Launch = DEQUANTIZE_LAUNCH,
) -> Tensor:
    """scale · level(code) of every code, computed in float32 and rounded once, within the dtype's range.

    Args:
        payload: uint8, N codes of 4 bits, two a byte, the first in the high half.
        scales: (G,) float32, or quantized themselves.
        levels: by code, (16,) float32, on the same device.
        block_size: S, one of `BLOCK_SIZES`.
        shape: of the weights, N in all.
        dtype: of the weights.
        launch: how the work is cut up.

    Returns:
        The weights, of `shape`.
    """
    w = torch.empty(shape, dtype=dtype, device=payload.device)
    blocks = max(1, launch.weights // block_size)  # P
    if isinstance(scales, NestedScales):
        *given, nested_size = scales
    else:
        given, nested_size = (scales, levels, scales, scales), 0  # the last three are not read
    with torch.cuda.device_of(payload):
        _dequantize_kernel[(-(-w.numel() // (block_size * blocks)),)](
            payload,
            *given,
            levels,
            w,
            w.numel(),
            payload.numel(),
            LARGEST=torch.finfo(dtype).max,
            NESTED_SIZE=nested_size,
            BLOCK_SIZE=block_size,
            BLOCKS=blocks,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,  # a product that is rounded before the mean is added, as the reference has it
        )
    return w


_SMALLEST = tl.constexpr(2.0**-126)
_LARGEST_FLOAT32 = tl.constexpr(torch.finfo(torch.float32).max)
_SMALLEST_BITS = tl.constexpr(1 << 23)
_INFINITE_BITS = tl.constexpr(0xFF << 23)


@triton.jit
def _quantize_kernel(
    w_ptr,
    payload_ptr,
    absmax_ptr,
    broken_ptr,
    count,
    half_count,
    ENCODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (P,)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)  # (P, S)
    inside = place < count
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as integers, NaN is larger than all others
    absmax = tl.max(magnitude, axis=1)  # (P,)
    if broken_ptr is not None:
        tl.store(broken_ptr + tl.zeros_like(absmax), 1, mask=absmax >= _INFINITE_BITS)  # all that write write the same
    absmax = tl.where(absmax < _SMALLEST_BITS, 0, absmax).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < count)
    w = tl.where(tl.abs(w) < _SMALLEST, 0.0, w)
    x = w * (1.0 / absmax)[:, None]
    codes = tl.where(inside, ENCODE(x), 0)
    high, low = tl.split(codes.reshape(BLOCKS, BLOCK_SIZE // 2, 2))
    half = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)  # (P, S/2)
    tl.store(payload_ptr + half, (high << 4 | low).to(tl.uint8), mask=half < half_count)


@triton.jit
def _dequantize_kernel(
    payload_ptr,
    scales_ptr,
    scale_levels_ptr,
    outer_scales_ptr,
    mean_ptr,
    levels_ptr,
    w_ptr,
    count,
    half_count,
    LARGEST: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (P,)
    half = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)  # (P, S/2)
    codes = tl.load(payload_ptr + half, mask=half < half_count, other=0).to(tl.int32)
    there = block * BLOCK_SIZE < count
    scale = tl.load(scales_ptr + block, mask=there, other=0)  # (P,)
    if NESTED_SIZE > 0:
        outer = tl.load(outer_scales_ptr + block // NESTED_SIZE, mask=there, other=0)
        scale = tl.load(scale_levels_ptr + scale.to(tl.int32)) * outer + tl.load(mean_ptr)
        scale = tl.clamp(scale, -_LARGEST_FLOAT32, _LARGEST_FLOAT32, propagate_nan=tl.PropagateNan.ALL)
    high = tl.load(levels_ptr + (codes >> 4)) * scale[:, None]
    low = tl.load(levels_ptr + (codes & 15)) * scale[:, None]
    w = tl.clamp(tl.join(high, low).reshape(BLOCKS, BLOCK_SIZE), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)  # (P, S)
    tl.store(w_ptr + place, w.to(w_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def _encode_nf4(x):
    """Codes 0 … 15 of x: four comparisons with thresholds that the earlier ones choose."""
    upper = x > 0.03979014977812767
    place = _place(
        x,
        tl.where(upper, 0.1202552542090416, -0.8480964303016663),
        tl.where(upper, 0.2035212516784668, -0.6106328964233398),
        tl.where(upper, 0.2920137643814087, -0.4599952697753906),
        tl.where(upper, 0.3893125355243683, -0.33967941999435425),
        tl.where(upper, 0.5016633868217468, -0.23460739850997925),
        tl.where(upper, 0.6427869200706482, -0.13791173696517944),
        tl.where(upper, 0.8614783883094788, -0.045525018125772476),
    )
    return tl.where(upper, 8, 0) + place


@triton.jit
def _encode_fp4(x):
    """Codes 0 … 15 of x: the sign, and the pattern of the magnitude."""
    place = _place(tl.abs(x), 0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
    pattern = (0x32547610 >> (4 * place)) & 7  # the patterns do not rise with the magnitudes
    return tl.where(x <= -_SMALLEST, 8, 0) + pattern


@triton.jit
def _place(x, t1, t2, t3, t4, t5, t6, t7):
    """How many of seven rising thresholds lie below x."""
    above4 = x > t4
    above2 = x > tl.where(above4, t6, t2)
    above1 = x > tl.where(above4, tl.where(above2, t7, t5), tl.where(above2, t3, t1))
    return tl.where(above4, 4, 0) + tl.where(above2, 2, 0) + tl.where(above1, 1, 0)


ENCODERS = {"nf4": _encode_nf4, "fp4-bnb": _encode_fp4}
"""Codes of numbers between −1 and 1, by the name of the data type."""
