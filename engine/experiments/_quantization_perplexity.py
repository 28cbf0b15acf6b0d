"""What quantizing does to a model of the quantization lab: a quantized copy, and its perplexity on a text.

Legend: T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InputError
from engine.experiments._quantization import (
    BLOCK_TOKENS,
    LOGITS_AT_ONCE,
    METHODS,
    Method,
    ScaleParams,
    TextParams,
)
from engine.experiments._quantization_source import grouping_of, keep
from engine.experiments._training import SHIPPED

if TYPE_CHECKING:
    from torch import nn

    from engine.data import TokenBlocks
    from engine.pretrained import Pretrained
    from engine.quantization.calibration import InputStatistics
    from engine.quantization.perplexity import Perplexity
    from engine.runtime.jobs import Job

CALIBRATION_BLOCKS = 16


@dataclass(frozen=True, eq=False)
class Text:
    """What perplexity is measured on.

    Args:
        blocks: T + 1 tokens each.
        sentence: which text it is.
    """

    blocks: TokenBlocks
    sentence: str

    @property
    def tokens(self) -> int:
        """That are predicted."""
        return len(self.blocks) * self.blocks.block_size


def read_text(params: TextParams, model: Pretrained) -> Text:
    """A learner's own text or the shipped stories, as far as `params.tokens` reach.

    Raises:
        InputError: the text is too short.
    """
    from engine.data import TokenBlocks

    size = min(_context(model), params.tokens)
    if own := params.text.strip():
        blocks, whose = _blocks([own], model, size), "your own text"
    else:
        stories = _stories(model)
        rows = stories.ids[:-CALIBRATION_BLOCKS]
        blocks = TokenBlocks(rows if size == stories.block_size else rows[:, : size + 1])
        whose = "stories that the storyteller was not trained on"
    blocks = TokenBlocks(blocks.ids[: max(1, params.tokens // blocks.block_size)])
    read = len(blocks) * blocks.block_size
    return Text(blocks, f"Perplexity over {read:,} tokens of {whose}.")


def measure(quantized: nn.Module, model: Pretrained, text: Text) -> Perplexity:
    """The perplexity of `quantized`, a copy of the model, on a text."""
    from engine.quantization.perplexity import measure_perplexity

    at_once = LOGITS_AT_ONCE // (text.blocks.block_size * model.vocab_size)
    return measure_perplexity(quantized, text.blocks, batch_size=max(1, min(8, at_once)))


def in_words(perplexity: float) -> str:
    """A perplexity, or a ratio of two, to four digits, large ones to three: ``"5.277"``, ``"42,000"``."""
    if not math.isfinite(perplexity):
        return "no number" if math.isnan(perplexity) else "∞"
    return f"{perplexity:.4g}" if perplexity < 1000 else f"{float(f'{perplexity:.3g}'):,.0f}"


def calibration_blocks(model: Pretrained) -> TokenBlocks:
    """The last of the shipped stories, which `read_text` leaves out."""
    from engine.data import TokenBlocks

    return TokenBlocks(_stories(model).ids[-CALIBRATION_BLOCKS:])


def calibration(model: Pretrained) -> dict[str, InputStatistics]:
    """The inputs of every linear layer on `calibration_blocks`, on which no perplexity is measured; kept."""
    from engine.quantization.calibration import collect_statistics

    def collect() -> dict[str, InputStatistics]:
        return collect_statistics(model.model, calibration_blocks(model), batch_size=2)

    return keep(model, "calibration", collect)


def calibration_tokens(model: Pretrained) -> int:
    """That `calibration` has seen."""
    return CALIBRATION_BLOCKS * _context(model)


class Stopped(Exception):
    """A job was asked to stop while a model was quantized."""


def quantize_model(
    model: Pretrained,
    name: str,
    params: ScaleParams,
    method: Method,
    job: Job,
    layers: Callable[[str], bool] | None = None,
) -> nn.Module:
    """A copy of the model in the data type `name`, or with its `layers` alone; its report is in ``quantization``.

    Raises:
        Stopped: the job was cancelled before the last layer.
    """
    from engine.quantization.methods import LayerReport, quantize_layers

    def check(*_: LayerReport | int) -> None:
        if job.cancelled:
            raise Stopped

    check()
    return quantize_layers(
        model.model,
        name,
        grouping_of(params),
        method=METHODS[method],
        statistics=calibration(model) if layers is None else None,
        layers=layers,
        double_quantization=params.double_quantization,
        on_layer=check,
    )


def _stories(model: Pretrained) -> TokenBlocks:
    from engine.pretraining.run import read_stories

    return keep(model, "stories", lambda: _blocks(read_stories(SHIPPED / "heldout.txt"), model, _context(model)))


def _blocks(texts: list[str], model: Pretrained, size: int) -> TokenBlocks:
    from engine.quantization.perplexity import read_blocks

    if model.tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {model.name} has no end token, which is put between documents: choose another model."
        )
    return read_blocks(texts, model.tokenizer, size)


def _context(model: Pretrained) -> int:
    return min(BLOCK_TOKENS, model.max_tokens or BLOCK_TOKENS)


class Finished:
    """Points of sweeps that are finished, the latest few hundred: a sweep that is run again goes on from them."""

    KEPT = 500

    def __init__(self) -> None:
        self._points: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The point, or None."""
        return self._points.get(key)

    def add(self, key: Hashable, point: Any) -> Any:
        """Keep and return it; the oldest go first."""
        self._points[key] = point
        while len(self._points) > self.KEPT:
            self._points.popitem(last=False)
        return point
