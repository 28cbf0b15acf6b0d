"""Four bits a weight, by the names of the public contract: NormalFloat against evenly spaced levels, in blocks."""

from __future__ import annotations

from torch import Tensor

from engine.errors import InputError
from engine.quantization.grouping import per_block
from engine.quantization.tensor import QuantizedTensor, quantize

BLOCK_SIZE = 64
"""Weights with one scale, QLoRA's choice."""

_BYTES_PER_MB = 1_000_000


def quantize_nf4(w: Tensor, block_size: int = BLOCK_SIZE) -> QuantizedTensor:
    """Round to the 16 levels of NormalFloat-4, which lie where normal weights are; 4 + 32/S bits a weight.

    Args:
        w: the weights, floating point, any shape.
        block_size: S, weights that share an absmax scale.

    Raises:
        InputError: as `engine.quantization.tensor.quantize`.

    Source: Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314; equal to bitsandbytes' to the bit.
    """
    return quantize(w, "nf4", per_block(block_size))


def dequantize_nf4(q: QuantizedTensor) -> Tensor:
    """The weights that `quantize_nf4` stored, of the given shape and dtype.

    Raises:
        InputError: `q` holds another data type.
    """
    return _dequantize(q, "nf4")


def quantize_uniform_4bit(w: Tensor, block_size: int = BLOCK_SIZE) -> QuantizedTensor:
    """Round to the integers −7 … 7 times the block's scale, absmax / 7. Arguments and errors as `quantize_nf4`."""
    return quantize(w, "int4", per_block(block_size))


def dequantize_uniform_4bit(q: QuantizedTensor) -> Tensor:
    """The weights that `quantize_uniform_4bit` stored, of the given shape and dtype.

    Raises:
        InputError: `q` holds another data type.
    """
    return _dequantize(q, "int4")


def quantize_4bit(w: Tensor) -> QuantizedTensor:
    """NF4 in blocks of 64 with float32 scales: 4.5 bits a weight. Errors as `quantize_nf4`."""
    return quantize_nf4(w)


def double_quantize_4bit(w: Tensor) -> QuantizedTensor:
    """NF4 in blocks of 64 whose scales are quantized to 8 bits in blocks of 256: 4 + 8/64 + 32/(64·256) = 4.127 bits.

    Errors as `quantize_nf4`.

    Source: Dettmers et al. 2023, QLoRA, section 3.
    """
    return quantize(w, "nf4", per_block(BLOCK_SIZE), double_quantization=True)


def get_tensor_memory_mb(q: QuantizedTensor | Tensor) -> float:
    """What a tensor takes, quantized or not, in MB of 10⁶ bytes: its payload and all of its scales."""
    return q.nbytes / _BYTES_PER_MB


def _dequantize(q: QuantizedTensor, expected: str) -> Tensor:
    if q.data_type.name != expected:
        raise InputError(f"The tensor holds {q.data_type.name} codes, not {expected}: use its own dequantize().")
    return q.dequantize()
