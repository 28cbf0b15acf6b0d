"""Every data type at every width on the same weights: bits a weight, scales included, against the error.

Legend: P points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import JobCancelledError
from engine.experiments import _quantization, _quantization_source
from engine.experiments._quantization import Format

if TYPE_CHECKING:
    from torch import Tensor

    from engine.runtime.jobs import Job


BOUND_POINTS = 41

SPLIT = "Integer, outlier columns in 16 bits"
"""Family of LLM.int8's split, on stored weights."""

_OUTLYING = 6.0  # standard deviations of the weights; LLM.int8 has 6 as well, of activations


class Params(_quantization.WeightParams):
    """The settings of the page; data type, bits and symmetric only mark a point."""


@dataclass(frozen=True)
class Point:
    """One data type.

    Args:
        name: in the engine, e.g. ``"nf4"``; for the split ``"int4 and 16 bits"``.
        data_type: the format, as `Params.data_type` calls it.
        family: what a line connects: ``"NormalFloat"``, ``"Integer"``, ``"Integer, asymmetric"``, `SPLIT` or the format
            itself.
        bits: of a code.
        symmetric: False for integers with a zero point.
        bits_per_weight: scales and zero points included.
        sqnr_db: signal to noise; infinite where nothing was lost.
        mean_absolute: mean absolute error.
        current: whether it is the one that the parameters name.
    """

    name: str
    data_type: Format
    family: str
    bits: int
    symmetric: bool
    bits_per_weight: float
    sqnr_db: float
    mean_absolute: float
    current: bool


@dataclass(frozen=True)
class Result:
    """All points, and the limit.

    Args:
        source: what the weights are, in a sentence.
        points: family by family, bits rising.
        bound_bits, bound_db: (P,), the Gaussian rate-distortion bound, 6.02 dB a bit.
        bound_applies: whether the weights are independent and normal, so that it is a limit for them.
        bound_note: that in a sentence.
        sentence: which data type of the current width comes closest to the bound, scales paid for, and how close.
    """

    source: str
    points: list[Point]
    bound_bits: np.ndarray
    bound_db: np.ndarray
    bound_applies: bool
    bound_note: str
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Quantize the weights with one data type after the other."""
    from engine.quantization.distortion import gaussian_bound_db, measure_distortion

    weights = _quantization_source.read_weights(params, job)
    current = _quantization.type_name(params.data_type, params.bits, params.symmetric)
    points = []
    candidates = list(_candidates())
    for done, (data_type, bits, symmetric) in enumerate(candidates, 1):
        if job.cancelled:
            raise JobCancelledError("The job was cancelled before all data types were tried.")
        name = _quantization.type_name(data_type, bits, symmetric)
        stored = _quantization_source.quantize_as(weights.values, name, params)
        distortion = measure_distortion(weights.values, stored.dequantize())
        points.append(
            Point(
                name=name,
                data_type=data_type,
                family=data_type if symmetric else f"{data_type}, asymmetric",
                bits=bits,
                symmetric=symmetric,
                bits_per_weight=stored.bits_per_weight,
                sqnr_db=distortion.sqnr_db,
                mean_absolute=distortion.mean_absolute,
                current=name == current,
            )
        )
        job.report(done, len(candidates))
    if not params.double_quantization:  # which the split's scales do not have
        points += _split(weights.values, params)
    bound_bits = np.linspace(0, math.ceil(max(point.bits_per_weight for point in points)), BOUND_POINTS)
    return Result(
        source=weights.sentence,
        points=points,
        bound_bits=bound_bits,
        bound_db=np.array([gaussian_bound_db(bits) for bits in bound_bits]),
        bound_applies=weights.normal,
        bound_note=weights.bound_note,
        sentence=_describe(points, params.width, weights.normal),
    )


def _split(values: Tensor, params: Params) -> list[Point]:
    """Integers of every width but for the columns with an outlier; none where no column has one, or all have."""
    from engine.quantization.distortion import measure_distortion
    from engine.quantization.outliers import split_outliers

    threshold = _OUTLYING * values.std().item()
    columns = (values.abs() >= threshold).any(0)
    if threshold == 0 or not columns.any() or columns.all():
        return []
    points = []
    for bits in range(_quantization.MIN_BITS, _quantization.MAX_BITS + 1):
        stored = split_outliers(values, threshold, f"int{bits}", _quantization_source.grouping_of(params))
        distortion = measure_distortion(values, stored.dequantize())
        points.append(
            Point(
                name=f"int{bits} and 16 bits",
                data_type="Integer",
                family=SPLIT,
                bits=bits,
                symmetric=True,
                bits_per_weight=stored.bits_per_weight,
                sqnr_db=distortion.sqnr_db,
                mean_absolute=distortion.mean_absolute,
                current=False,
            )
        )
    return points


def _candidates() -> Iterator[tuple[Format, int, bool]]:
    """Every format, width and symmetry, family by family."""
    widths = range(_quantization.MIN_BITS, _quantization.MAX_BITS + 1)
    yield from (("NormalFloat", bits, True) for bits in widths)
    for symmetric in (True, False):
        yield from (("Integer", bits, symmetric) for bits in widths)
    yield from ((name, bits, True) for name, (_, bits) in _quantization.FORMATS.items() if bits)


def _describe(points: list[Point], bits: int, normal: bool) -> str:
    """Which of the types of `bits` bits is best once the bits of its scales are paid for, and where it lies."""
    from engine.quantization.distortion import gaussian_bound_db

    of_this_width = [point for point in points if point.bits == bits]
    best = max(of_this_width, key=lambda point: point.sqnr_db - gaussian_bound_db(point.bits_per_weight))
    found = f"Of all types of {bits} bits {best.family} is nearest to the bound on these weights"
    if math.isinf(best.sqnr_db):
        return f"{found}: it holds every one of them exactly."
    apart = gaussian_bound_db(best.bits_per_weight) - best.sqnr_db
    where = f"{abs(apart):.1f} dB {'below' if apart > 0 else 'above'}"
    line = "the bound, which no code can pass on normal weights" if normal else "the line of normal weights"
    return f"{found}: {best.sqnr_db:.1f} dB at {best.bits_per_weight:.3g} bits a weight, {where} {line}."
