"""Activation-aware scaling: inputs that matter get finer levels, by making their weights larger first (AWQ).

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantization.calibration import InputStatistics
from engine.quantization.data_types import DataType, data_type
from engine.quantization.grouping import Grouping, per_block
from engine.quantization.tensor import Grid, QuantizedTensor, check_weights, quantize, round_to

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
        return round_to(self.quantized.dequantize().float() / self.input_scales.float(), self.quantized.dtype)


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

    α = 0 is plain rounding, so that on the text of the statistics the result is never worse. Double quantization comes
    after the search, which sees the scales as they are before.

    Args:
        w: (O, I), finite.
        statistics: of the layer's inputs.
        to: data type or its name.
        grouping: which weights share a scale; blocks of 64 if left out.
        steps: how finely α is searched, at least 1.
        double_quantization: store the scales in 8 bits.

    Raises:
        InputError: statistics of another layer, or as `engine.quantization.tensor.quantize`.

    Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978; without the search for a clipping range.
    """
    check_weights(w)
    statistics.check_fits(w)
    chosen = data_type(to) if isinstance(to, str) else to
    grouping = grouping or per_block()
    weights = w.detach().float()
    magnitude = statistics.magnitude.clamp_min(_SMALLEST)  # (I,)
    best, least = None, torch.inf
    for exponent in torch.linspace(0, 1, steps + 1).tolist():
        powers = magnitude**exponent
        scales = (powers / (powers.max() * powers.min()).sqrt()).clamp(_SMALLEST, _LARGEST).half()
        scaled = (w * scales).to(w.dtype)
        groups = grouping.split(scaled.float())  # (G, S)
        grid = Grid.fit(groups, chosen)
        rounded = grouping.join(grid.decode(grid.encode(groups)), w.shape).to(w.dtype)
        error = statistics.output_power(rounded.float() / scales.float() - weights)
        if best is None or error < least:
            best, least = (scaled, scales, exponent), error
    scaled, scales, exponent = best
    quantized = quantize(scaled, chosen, grouping, double_quantization=double_quantization)
    return ScaledTensor(quantized, scales, exponent)
