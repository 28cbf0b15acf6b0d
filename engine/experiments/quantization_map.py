"""All linear layers of a model under one format: which of them suffers most.

Legend: B blocks of a model, K kinds of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from engine.experiments import _quantization, _quantization_source
from engine.experiments._ending import Ending, stopped

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


class Params(_quantization.FormatParams, _quantization.ModelParams):
    """A model and a format."""

    stop_grace: ClassVar[float] = 30.0
    returns_partial: ClassVar[bool] = True


@dataclass(frozen=True)
class LeftAlone:
    """A matrix that keeps its precision.

    Args:
        name: of it.
        shape: of it.
        reason: one sentence.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Result:
    """A number for every layer, NaN where there is no such layer, or not yet.

    Args:
        blocks: B labels of rows: the number of a block, with the name of its stack where there are several, or
            ``"outside"`` for layers that belong to none.
        kinds: K labels of columns, e.g. ``"self_attn.q_proj"``.
        names: (B, K) dotted names, as `quantization.Params.layer` takes them; "" where there is no such layer.
        shapes: of each layer's weight, by name, (outputs, inputs).
        relative_error: (B, K), rms error over rms weight.
        sqnr_db: (B, K), the same in dB, −20·log₁₀.
        bits_per_weight: mean over the weights quantized so far; 0 before the first.
        left: matrices that keep their precision, and why.
        worst: the layer with the largest relative error so far; "" before the first.
        done, total: layers.
        ended, ending: whether all are there, and why not.
        sentence: what the map shows.
    """

    blocks: list[str]
    kinds: list[str]
    names: list[list[str]]
    shapes: dict[str, tuple[int, ...]]
    relative_error: np.ndarray
    sqnr_db: np.ndarray
    bits_per_weight: float
    left: list[LeftAlone]
    worst: str
    done: int
    total: int
    ended: Ending
    ending: str
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Quantize one layer after the other, each by itself; the model is not touched.

    Raises:
        InputError: the model cannot be had or has no linear layer, or a weight is not finite.
    """
    from engine.quantization.distortion import measure_distortion
    from engine.quantization.tensor import check_weights, quantize

    model = _quantization_source.load_model(params, job)
    selection = _quantization_source.linear_layers(model)
    layers = selection.chosen
    places = _quantization_source.places_of(layers)
    blocks, kinds = _quantization_source.labels_of(places)
    names = [[""] * len(kinds) for _ in blocks]
    for name, (block, kind) in places.items():
        names[blocks.index(block)][kinds.index(kind)] = name
    data_type = _quantization.type_name(params.data_type, params.bits, params.symmetric)
    grouping = _quantization_source.grouping_of(params)
    sqnr, stored_bits = {}, 0.0

    def result(ended: Ending, ending: str) -> Result:
        grid = np.array([[sqnr.get(name, math.nan) for name in row] for row in names])  # (B, K)
        error = 10 ** (-grid / 20)
        worst = min(sqnr, key=sqnr.__getitem__, default="")
        seen = sum(layers[name].weight.numel() for name in sqnr)
        return Result(
            blocks=blocks,
            kinds=kinds,
            names=names,
            shapes={name: tuple(linear.weight.shape) for name, linear in layers.items()},
            relative_error=error,
            sqnr_db=grid,
            bits_per_weight=stored_bits / seen if seen else 0.0,
            left=[LeftAlone(entry.name, entry.shape, entry.reason) for entry in selection.left],
            worst=worst,
            done=len(sqnr),
            total=len(layers),
            ended=ended,
            ending=ending,
            sentence=_describe(params, sqnr, worst),
        )

    for done, (name, linear) in enumerate(layers.items(), 1):
        if job.cancelled:
            ended, words = stopped(params, job)
            return result(ended, f"{words} after {len(sqnr)} of {len(layers)} layers, which are shown.")
        weight = linear.weight.detach()
        check_weights(weight, f"The weights of {name}")
        stored = quantize(weight, data_type, grouping, double_quantization=params.double_quantization)
        sqnr[name] = measure_distortion(weight, stored.dequantize()).sqnr_db
        stored_bits += 8 * stored.nbytes
        job.report(done, len(layers))
        job.show(lambda: result("running", f"{len(sqnr)} of {len(layers)} layers so far."))
    return result("finished", f"All {len(layers)} layers were quantized.")


def _describe(params: Params, sqnr: dict[str, float], worst: str) -> str:
    if not sqnr:
        return ""
    best = max(sqnr, key=sqnr.__getitem__)
    errors = {name: 10 ** (-sqnr[name] / 20) for name in (worst, best)}
    return (
        f"{params.in_words}: {worst} suffers most, its error is {errors[worst]:.1%} of its weights (rms), and {best} "
        f"least, {errors[best]:.1%}. What that does to the model is another question: a layer may hurt more than its "
        "error says."
    )
