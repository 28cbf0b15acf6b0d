"""Any way of quantizing, applied to the linear layers of a whole model.

    statistics = collect_statistics(model, blocks)
    rounded = quantize_layers(model, "int3")
    better = quantize_layers(model, "int3", method="gptq", statistics=statistics)
    better.quantization.bits_per_weight

The copies hold dequantized weights: they compute what a quantized model would, at the speed and memory of the original,
for any data type there is (fake quantization). For use there is `engine.quantization.production`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.quantization.awq import ScaledTensor, quantize_awq
from engine.quantization.calibration import InputStatistics
from engine.quantization.data_types import DataType
from engine.quantization.distortion import Distortion, measure_distortion
from engine.quantization.gptq import quantize_gptq
from engine.quantization.grouping import Grouping
from engine.quantization.layers import LeftAlone, copy_without_weights, only, select_layers
from engine.quantization.tensor import QuantizedTensor, check_weights, quantize

Method = Literal["rounding", "gptq", "awq"]


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one layer has cost.

    Args:
        name: of the layer.
        shape: of its weight, (outputs, inputs).
        bits_per_weight: scales counted.
        distortion: of its weight.
        output_error: relative mean squared error of its outputs on the calibration text; None without statistics.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    distortion: Distortion
    output_error: float | None


@dataclass(frozen=True)
class ModelReport:
    """What quantizing a model has cost.

    Args:
        layers: those that were quantized.
        left: parameters that keep their precision, and why.
    """

    layers: tuple[LayerReport, ...]
    left: tuple[LeftAlone, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of the quantized layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        bits = [layer.bits_per_weight for layer in self.layers]
        return sum(size * each for size, each in zip(sizes, bits, strict=True)) / sum(sizes)


@torch.no_grad()
def quantize_layers(
    model: nn.Module,
    to: str | DataType = "int4",
    grouping: Grouping | None = None,
    *,
    method: Method = "rounding",
    statistics: Mapping[str, InputStatistics] | None = None,
    layers: Callable[[str], bool] | None = None,
    double_quantization: bool = False,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> nn.Module:
    """A copy of `model` with the weights that its linear layers would have if they were quantized.

    Args:
        model: ours or transformers'; not touched.
        to: data type or its name.
        grouping: which weights share a scale; blocks of 64 if left out.
        method: to the nearest level, with GPTQ's compensation, or with AWQ's scaling.
        statistics: from `collect_statistics`; the last two methods need them, the first reports with them.
        layers: says of a layer's name whether it is meant; all if left out. One at a time shows which hurt most.
        double_quantization: store the scales in 8 bits.
        on_layer: called with each layer's report and the number of layers in all.

    Returns:
        The copy, with a `ModelReport` in its ``quantization``.

    Raises:
        InputError: no such layer, an unknown method, no statistics where they are needed, or weights that cannot be
            quantized (the message names the layer).
    """
    if method not in get_args(Method):
        raise InputError(f"There is no method {method!r}: choose one of {', '.join(get_args(Method))}.")
    selection = select_layers(model, only(layers) if layers else None)
    known = statistics or {}
    missing = [name for name in selection.chosen if name not in known]
    if method != "rounding" and missing:
        raise InputError(
            f"{method} needs the inputs of {len(missing)} layers, {missing[0]} first: collect_statistics gives them."
        )
    duplicate = copy_without_weights(model, selection)
    reports = []
    for name, linear in selection.chosen.items():
        check_weights(linear.weight, f"The weights of {name}")
        stored = _quantize(linear.weight, to, grouping, method, known.get(name), double_quantization)
        weight = stored.dequantize()
        duplicate.get_submodule(name).weight = nn.Parameter(weight, linear.weight.requires_grad)
        reports.append(
            LayerReport(
                name=name,
                shape=tuple(weight.shape),
                bits_per_weight=stored.bits_per_weight,
                distortion=measure_distortion(linear.weight, weight),
                output_error=known[name].output_error(linear.weight, weight) if name in known else None,
            )
        )
        if on_layer is not None:
            on_layer(reports[-1], len(selection.chosen))
    duplicate.quantization = ModelReport(tuple(reports), selection.left)
    return duplicate


def _quantize(
    weight: Tensor,
    to: str | DataType,
    grouping: Grouping | None,
    method: Method,
    statistics: InputStatistics | None,
    double_quantization: bool,
) -> QuantizedTensor | ScaledTensor:
    if method == "rounding":
        return quantize(weight, to, grouping, double_quantization=double_quantization)
    better = {"gptq": quantize_gptq, "awq": quantize_awq}[method]
    return better(weight, statistics, to, grouping, double_quantization=double_quantization)
