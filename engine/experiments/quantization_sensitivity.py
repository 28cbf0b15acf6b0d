"""Which layers hurt most: one part of the model at a time is quantized, the rest stays as it is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from engine.experiments import _quantization, _quantization_perplexity, _quantization_source
from engine.experiments._ending import Ending, stopped
from engine.experiments._quantization_perplexity import Finished, Stopped, Text

if TYPE_CHECKING:
    from engine.pretrained import Pretrained
    from engine.quantization.perplexity import Perplexity
    from engine.runtime.jobs import Job


Unit = Literal["layer", "block", "kind"]

_LARGEST_PERCENTAGE = 10.0


class Params(_quantization.FormatParams, _quantization.TextParams):
    """A model, a format, a text, and what is quantized at a time."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0
    returns_partial: ClassVar[bool] = True

    bits: int = Field(
        3,
        ge=_quantization.MIN_BITS,
        le=_quantization.MAX_BITS,
        title="Bits",
        description="Of a code: few enough for the layers to differ.",
    )
    unit: Unit = Field(
        "layer",
        title="At a time",
        description="One linear layer, all of one block, or all of one kind (such as every q_proj).",
    )


@dataclass(frozen=True)
class PartCost:
    """What quantizing one part alone costs.

    Args:
        name: of the layer; for a block its number, for a kind its name.
        block, kind: row and column of the map, as in `quantization_map.Result`; "" where the part has several.
        weights: in the part.
        perplexity: of the model with this part quantized.
        increase: `perplexity` over the original's, less 1; below 0 if the model does better on this text.
        error: standard error of `increase` over the blocks of the text, as `Perplexity.increase_over` has it; NaN
            where there is none.
        seconds: that it took.
    """

    name: str
    block: str
    kind: str
    weights: int
    perplexity: float
    increase: float
    error: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """The parts so far.

    Args:
        parts: in the model's order.
        blocks, kinds: labels of the map's rows and columns, as in `quantization_map.Result`.
        original_perplexity: of the model as it is.
        quantized_perplexity: with all parts quantized at once; None before the end.
        total: parts that there are to be.
        tokens: that were predicted for each perplexity.
        text: which text it is, in a sentence.
        text_blocks: that it was cut into, each read from its start.
        ended, ending: whether all parts are there, and why not.
        sentence: which hurt most, and whether the costs add up.
        device: where it ran.
        versions: of what took part.
    """

    parts: list[PartCost]
    blocks: list[str]
    kinds: list[str]
    original_perplexity: float
    quantized_perplexity: float | None
    total: int
    tokens: int
    text: str
    text_blocks: int
    ended: Ending
    ending: str
    sentence: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Quantize one part after the other by rounding, and measure the perplexity each time.

    Parts are kept by this process: a run that was cancelled goes on from them.

    Raises:
        InputError: the model cannot be had, is no decoder or has no linear layer, or the text is too short.
    """
    from engine.measure import device_name, versions

    model = _quantization_source.load_model(params, job, predicts=True)
    names = list(_quantization_source.linear_layers(model).chosen)
    text = _quantization_perplexity.read_text(params, model)
    places = _quantization_source.places_of(names)
    blocks, kinds = _quantization_source.labels_of(places)
    plan = _parts(params.unit, places)
    where, software = device_name(job.device), versions()
    parts: list[PartCost] = []
    everything = None

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            parts=list(parts),
            blocks=blocks,
            kinds=kinds,
            original_perplexity=original.value,
            quantized_perplexity=everything,
            total=len(plan),
            tokens=text.tokens,
            text=text.sentence,
            text_blocks=len(text.blocks),
            ended=ended,
            ending=ending,
            sentence=_describe(params, parts, original.value, everything),
            device=where,
            versions=software,
        )

    def measure(layers: frozenset[str]) -> tuple[Perplexity, int, float]:
        """Perplexity with these layers quantized, their weights, and the seconds that took."""
        key = (params.model_copy(update={"unit": "layer"}), params.cache_token(), job.device, layers)
        return _finished.get(key) or _finished.add(key, _measure(layers, params, model, text, job))

    original = _quantization_perplexity.measure(model.model, model, text)
    try:
        for done, (name, layers) in enumerate(plan.items(), 1):
            perplexity, weights, seconds = measure(layers)
            block, kind = places[min(layers)]
            increase, error = perplexity.increase_over(original)
            parts.append(
                PartCost(
                    name=name,
                    block="" if params.unit == "kind" else block,
                    kind="" if params.unit == "block" else kind,
                    weights=weights,
                    perplexity=perplexity.value,
                    increase=increase,
                    error=error,
                    seconds=seconds,
                )
            )
            job.report(done, len(plan) + 1, increase=parts[-1].increase)
            job.show(lambda: result("running", f"{len(parts)} of {len(plan)} parts so far."))
        everything = measure(frozenset(names))[0].value
    except Stopped:
        ended, words = stopped(params, job)
        return result(ended, f"{words} after {len(parts)} of {len(plan)} parts, which are shown.")
    job.report(len(plan) + 1, len(plan) + 1)
    return result("finished", f"All {len(plan)} parts were measured.")


_finished = Finished()


def _parts(unit: Unit, places: Mapping[str, tuple[str, str]]) -> dict[str, frozenset[str]]:
    """The layers of each part, by what it is called, in the model's order."""
    parts: dict[str, set[str]] = {}
    for name, (block, kind) in places.items():
        parts.setdefault({"layer": name, "block": block, "kind": kind}[unit], set()).add(name)
    return {label: frozenset(layers) for label, layers in parts.items()}


def _measure(
    layers: frozenset[str], params: Params, model: Pretrained, text: Text, job: Job
) -> tuple[Perplexity, int, float]:
    began = time.monotonic()
    name = _quantization.type_name(params.data_type, params.bits, params.symmetric)
    quantized = _quantization_perplexity.quantize_model(model, name, params, "rounding", job, layers.__contains__)
    perplexity = _quantization_perplexity.measure(quantized, model, text)
    weights = sum(math.prod(layer.shape) for layer in quantized.quantization.layers)
    return perplexity, weights, time.monotonic() - began


def _describe(params: Params, parts: list[PartCost], original: float, everything: float | None) -> str:
    if not parts:
        return ""
    worst = max(parts, key=lambda part: math.inf if math.isnan(part.perplexity) else part.perplexity)
    part = {"layer": "", "block": "block ", "kind": "all of "}[params.unit] + worst.name
    sentence = f"{params.in_words}: {part} alone hurts most: perplexity {_change(worst.increase)}."
    if everything is None:
        return sentence
    sentence += f" All parts at once: {_change(everything / original - 1)}."
    one_by_one = sum(part.increase for part in parts)
    if not math.isfinite(one_by_one):
        return sentence
    return f"{sentence} One by one, their changes add up to {_change(one_by_one)}."


def _change(increase: float) -> str:
    """A relative change, ``"−0.02%"``; beyond tenfold a percentage says nothing any more."""
    if not math.isfinite(increase):
        return "no number" if math.isnan(increase) else "beyond counting"
    if increase > _LARGEST_PERCENTAGE:
        return f"{_quantization_perplexity.in_words(1 + increase)} times the original"
    rounded = round(increase, 4)
    return f"{rounded:+.2%}".replace("-", "−") if rounded else "0.00%"
