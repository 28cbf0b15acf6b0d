"""What the inputs of a model's linear layers look like on some text: the ground on which weights are rounded well.

    statistics = collect_statistics(model, pack(stories, tokenizer, block_size=256))
    statistics["layers.0.mlp.down_proj"].hessian

Legend: N tokens seen, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.data import TokenBlocks
from engine.errors import InputError
from engine.model import evaluating
from engine.quantization.layers import only, select_layers


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of the inputs x of one layer.

    Args:
        hessian: mean of x·xᵀ, (I, I) float32: half the second derivative of the mean squared output error by a row of
            the weight, hence its name.
        magnitude: mean of |x|, (I,) float32.
        count: N; 0 for a layer that was never called, such as an expert that no token chose.
    """

    hessian: Tensor
    magnitude: Tensor
    count: int

    def check_fits(self, w: Tensor) -> None:
        """Refuse what these cannot be the inputs of.

        Raises:
            InputError: `w` is no matrix (O, I) of so many inputs, or the statistics are not finite.
        """
        if w.dim() != 2 or w.shape[1] != len(self.magnitude):
            raise InputError(
                f"The weights have the shape {tuple(w.shape)} and the statistics are of {len(self.magnitude)} inputs: "
                "give a matrix (outputs, inputs) and the statistics of its own layer."
            )
        if not (self.hessian.isfinite().all() and self.magnitude.isfinite().all()):
            raise InputError(
                "The statistics hold numbers that are not finite: the inputs that they were taken from overflow, or "
                "their model is broken."
            )

    def output_error(self, weight: Tensor, approximation: Tensor) -> float:
        """mean ‖(Ŵ − W)·x‖² / mean ‖W·x‖² over the inputs seen: what rounding a weight (O, I) costs at the output."""
        weight = weight.detach().float()
        power = self.output_power(weight)
        return self.output_power(approximation.float() - weight) / power if power else 0.0

    def output_power(self, matrix: Tensor) -> float:
        """mean ‖M·x‖² = tr(M·H·Mᵀ) over the inputs seen, of M (O, I) float32."""
        return ((matrix @ self.hessian) * matrix).sum().item()


def collect_statistics(
    model: nn.Module,
    blocks: TokenBlocks,
    layers: Callable[[str], bool] | None = None,
    batch_size: int = 8,
) -> dict[str, InputStatistics]:
    """Run `model` over `blocks` and keep the inputs' second moments, layer by layer.

    All layers are watched in one pass of the model as it is. (GPTQ's authors quantize block by block and watch a block
    behind those that are quantized already; one pass is simpler, faster, and can be used for every bit-width.)

    Args:
        model: ours or transformers', on any device; takes ids (B, T).
        blocks: the text, of which a few thousand tokens are enough.
        layers: says of a layer's name whether it is watched; all linear layers if left out.
        batch_size: B.

    Returns:
        Statistics by the layer's name, I² numbers each, on the model's device.

    Raises:
        InputError: the model has no such layer, or the inputs of one are not finite.
    """
    watched = {
        name: _Watch(linear) for name, linear in select_layers(model, only(layers) if layers else None).chosen.items()
    }
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for indices in torch.arange(len(blocks)).split(batch_size):
                model(blocks.batch(indices).inputs.to(device))
    finally:
        for watch in watched.values():
            watch.handle.remove()
    statistics = {name: watch.statistics() for name, watch in watched.items()}
    for name, found in statistics.items():
        if not found.hessian.isfinite().all():
            raise InputError(f"The inputs of {name} are not finite on this text: its model is broken, or overflows.")
    return statistics


class _Watch:
    """Sums over the inputs of a layer."""

    def __init__(self, linear: nn.Linear) -> None:
        size, device = linear.in_features, linear.weight.device
        self._squares = torch.zeros(size, size, device=device)
        self._magnitudes = torch.zeros(size, device=device)
        self._count = 0
        self.handle = linear.register_forward_pre_hook(self._see)

    def _see(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, linear.in_features).float()  # (tokens, I)
        self._squares += x.T @ x
        self._magnitudes += x.abs().sum(0)
        self._count += len(x)

    def statistics(self) -> InputStatistics:
        count = max(1, self._count)
        return InputStatistics(self._squares / count, self._magnitudes / count, self._count)
