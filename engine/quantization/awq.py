"""Activation-aware scaling: inputs that matter get finer levels, by making their weights larger first (AWQ).

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantization.calibration import InputStatistics
from engine.quantization.data_types import DataType
from engine.quantization.grouping import Grouping
from engine.quantization.tensor import QuantizedTensor, quantize

STEPS = 20
_SMALLEST, _LARGEST = 1e-4, 1e4


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A quantized matrix whose inputs were scaled before: W ≈ Q(W·diag(s))·diag(s)⁻¹.

    Args:
        quantized: Q(W·diag(s)), (O, I).
        input_scales: s, (I,) float16; where a norm comes before the layer they could be made part of its gains and cost
            nothing, here they are counted.
        exponent: α with s ∝ (mean |x|)^α, from 0 to 1; 0 is plain rounding.
    """

    quantized: QuantizedTensor
    input_scales: Tensor
    exponent: float

    @property
    def nbytes(self) -> int:
        """Bytes of codes and all scales."""
        return self.quantized.nbytes + self.input_scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 · `nbytes` / (O·I)."""
        return 8 * self.nbytes / self.quantized.shape.numel()

    def dequantize(self) -> Tensor:
        """The weights that are stored, (O, I)."""
        return (self.quantized.dequantize().float() / self.input_scales.float()).to(self.quantized.dtype)


@torch.no_grad()
def quantize_awq(
    w: Tensor,
    statistics: InputStatistics,
    to: str | DataType = "int4",
    grouping: Grouping | None = None,
    *,
    steps: int = STEPS,
    double_quantization: bool = False,
) -> ScaledTensor:
    """Quantize W·diag(s) instead of W, with the s that keeps the outputs closest.

        s = m^α / √(max m^α · min m^α),  m = mean |x|;  α from 0 to 1 in `steps` steps, the one with the least
        mean ‖(Q(W·diag(s))·diag(s)⁻¹ − W)·x‖² = tr(Δ·H·Δᵀ)

    α = 0 is plain rounding, so that on the text of the statistics the result is never worse.

    Args:
        w: (O, I), finite.
        statistics: of the layer's inputs.
        to: data type or its name.
        grouping: which weights share a scale; blocks of 64 if left out.
        steps: how finely α is searched, at least 1.
        double_quantization: store the scales in 8 bits.

    Raises:
        InputError: as `engine.quantization.tensor.quantize`.

    Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978; without the search for a clipping range.
    """
    magnitude = statistics.magnitude.clamp_min(_SMALLEST)  # (I,)
    best, least = None, torch.inf
    for exponent in torch.linspace(0, 1, steps + 1).tolist():
        powers = magnitude**exponent
        scales = (powers / (powers.max() * powers.min()).sqrt()).clamp(_SMALLEST, _LARGEST).half()
        quantized = quantize((w * scales).to(w.dtype), to, grouping, double_quantization=double_quantization)
        candidate = ScaledTensor(quantized, scales, exponent)
        error = statistics.output_error(w, candidate.dequantize())
        if error < least:
            best, least = candidate, error
    return best
