"""What few bits do to a model: its perplexity on a text, by data type, width and method."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from engine.experiments import _quantization, _quantization_perplexity, _quantization_source
from engine.experiments._ending import Ending, stopped
from engine.experiments._quantization import Method
from engine.experiments._quantization_perplexity import Finished, Stopped, Text

if TYPE_CHECKING:
    from engine.pretrained import Pretrained
    from engine.runtime.jobs import Job


class Params(_quantization.ScaleParams, _quantization.TextParams):
    """A model, a text, and the ways to quantize it."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0
    returns_partial: ClassVar[bool] = True

    methods: tuple[Method, ...] = Field(
        ("rounding", "GPTQ", "AWQ"),
        min_length=1,
        max_length=3,
        title="Methods",
        description="Rounding is round to nearest (RTN); GPTQ compensates its errors, AWQ scales by the activations.",
    )
    data_types: tuple[Literal["Integer", "NormalFloat"], ...] = Field(
        ("Integer",), min_length=1, max_length=2, title="Data types", description="Each with each method."
    )
    widths: tuple[Annotated[int, Field(ge=_quantization.MIN_BITS, le=_quantization.MAX_BITS)], ...] = Field(
        (8, 6, 5, 4, 3, 2), min_length=1, max_length=7, title="Bits", description="Widths to try, 2 to 8."
    )
    symmetric: bool = Field(True, title="Symmetric", description="Integers without a zero point.")


@dataclass(frozen=True)
class Point:
    """One quantized model.

    Args:
        method: how its levels were chosen; ``"original"`` for the model as it is.
        data_type: ``"Integer"`` or ``"NormalFloat"``; for the original ``"16-bit"``, or ``"32-bit"`` where neither
            float16 nor bfloat16 holds every weight of its linear layers exactly.
        bits: of a code; 16 or 32 for the original.
        bits_per_weight: of the layers that are quantized, scales included; as `bits` for the original.
        perplexity: on the text; infinite if it is too large for a number.
        loss: its logarithm, in nats a token.
        output_error: mean over the layers of the relative mean squared error of their outputs on the calibration text;
            0 for the original.
        seconds: that it took to quantize and to measure.
    """

    method: Literal["original", "rounding", "GPTQ", "AWQ"]
    data_type: Literal["16-bit", "32-bit", "Integer", "NormalFloat"]
    bits: int
    bits_per_weight: float
    perplexity: float
    loss: float
    output_error: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """The points so far.

    Args:
        original: the model as it is; None before it was measured.
        points: in the order in which they were made: by width from the many to the few, then data type, then method.
        total: points that there are to be, the original not counted.
        tokens: that were predicted for each perplexity.
        calibration_tokens: of other stories, that GPTQ and AWQ have seen and `output_error` is measured on.
        text: which text it is, in a sentence.
        weights: share of the model's parameters that is quantized, from 0 to 1.
        ended, ending: whether all points are there, and why not.
        sentence: what they show.
        source: where the model comes from, in a sentence.
        device: where it ran.
        versions: of what took part.
    """

    original: Point | None
    points: list[Point]
    total: int
    tokens: int
    calibration_tokens: int
    text: str
    weights: float
    ended: Ending
    ending: str
    sentence: str
    source: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Make one point after the other until the last, or a cancellation.

    Points are kept by this process: a sweep that was cancelled, or has a width more, goes on from them.

    Raises:
        InputError: the model cannot be had, is no decoder or has no linear layer, or the text is too short.
    """
    from engine.measure import device_name, versions

    model = _quantization_source.load_model(params, job, predicts=True)
    layers = _quantization_source.linear_layers(model).chosen
    text = _quantization_perplexity.read_text(params, model)
    plan = list(_plan(params))
    where, software = device_name(job.device), versions()
    points: list[Point] = []

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            original=original,
            points=list(points),
            total=len(plan),
            tokens=text.tokens,
            calibration_tokens=_quantization_perplexity.calibration_tokens(model),
            text=text.sentence,
            weights=sum(linear.weight.numel() for linear in layers.values()) / model.num_parameters,
            ended=ended,
            ending=ending,
            sentence=_describe(original, points),
            source=model.source,
            device=where,
            versions=software,
        )

    original = None
    read = (params.model, params.cache_token(), job.device, params.tokens, params.text)
    try:
        original = _finished.get(read) or _finished.add(read, _measure_original(model, text))
        job.report(0, len(plan), perplexity=original.perplexity)
        job.show(lambda: result("running", "The model as it is was measured."))
        for done, way in enumerate(plan, 1):
            key = (*read, way, *_scales(params))
            if (point := _finished.get(key)) is None:
                point = _finished.add(key, _measure(way, params, model, text, job))
            points.append(point)
            job.report(done, len(plan), bits=point.bits, perplexity=point.perplexity)
            job.show(lambda: result("running", f"{len(points)} of {len(plan)} points so far."))
    except Stopped:
        ended, words = stopped(params, job)
        return result(ended, f"{words} after {len(points)} of {len(plan)} points, which are shown.")
    return result("finished", f"All {len(plan)} points were measured.")


@dataclass(frozen=True)
class _Way:
    """One point that there is to be."""

    bits: int
    data_type: Literal["Integer", "NormalFloat"]
    method: Method
    symmetric: bool


_finished = Finished()


def _plan(params: Params) -> Iterator[_Way]:
    for bits in sorted(set(params.widths), reverse=True):
        for data_type in dict.fromkeys(params.data_types):
            for method in dict.fromkeys(params.methods):
                yield _Way(bits, data_type, method, params.symmetric or data_type != "Integer")


def _scales(params: Params) -> tuple[str | int | bool, ...]:
    """What the scales of a point depend on."""
    return (params.scale, params.block_size if params.scale == "per block" else 0, params.double_quantization)


def _measure_original(model: Pretrained, text: Text) -> Point:
    began = time.monotonic()
    found = _quantization_perplexity.measure(model.model, model, text)
    seconds, bits = time.monotonic() - began, _quantization_source.stored_bits(model)
    return Point("original", f"{bits}-bit", bits, float(bits), found.value, found.loss, 0.0, seconds)


def _measure(way: _Way, params: Params, model: Pretrained, text: Text, job: Job) -> Point:
    began = time.monotonic()
    name = _quantization.type_name(way.data_type, way.bits, way.symmetric)
    quantized = _quantization_perplexity.quantize_model(model, name, params, way.method, job)
    found = _quantization_perplexity.measure(quantized, model, text)
    report = quantized.quantization
    return Point(
        method=way.method,
        data_type=way.data_type,
        bits=way.bits,
        bits_per_weight=report.bits_per_weight,
        perplexity=found.value,
        loss=found.loss,
        output_error=statistics.fmean(layer.output_error for layer in report.layers),
        seconds=time.monotonic() - began,
    )


def _describe(original: Point | None, points: list[Point]) -> str:
    """The original, and every way at the fewest bits there are so far, the best first, with what it really takes."""
    if original is None:
        return ""
    in_words = _quantization_perplexity.in_words
    first = f"As it is, the model has a perplexity of {in_words(original.perplexity)}"
    if not math.isfinite(original.perplexity):
        first = (
            "Even as it is, the model has no finite perplexity on this text, so that there is nothing to compare with"
        )
    if not points:
        return f"{first}."
    fewest = min(point.bits for point in points)
    ranked = sorted(
        (point for point in points if point.bits == fewest),
        key=lambda point: math.inf if math.isnan(point.loss) else point.loss,
    )
    ways = ", ".join(
        f"{in_words(point.perplexity)} with {point.data_type} by {_quantization.method_name(point.method)} "
        f"({point.bits_per_weight:.2f})"
        for point in ranked
    )
    return f"{first}; with codes of {fewest} bits (in brackets: bits a weight, scales included) it has {ways}."
