"""What the parameters of the quantization lab's experiments share: the number format, the weights, the model, the text.

Needs no torch. `_quantization_source` has what they stand for.

Legend: b bits, N weights of a layer, P parameters of a model, L its layers, D its width, F its feed-forward width,
T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

from pydantic import Field, field_validator

from engine import catalogue, local_models
from engine.experiments import ExperimentParams, _lora
from engine.quantization.limits import FEWEST_TOKENS, MAX_BITS, MIN_BITS

__all__ = ["FEWEST_TOKENS", "MAX_BITS", "MIN_BITS"]

Format = Literal["NormalFloat", "Integer", "FP4 (E2M1)", "FP4 (bitsandbytes)", "FP8 (E4M3)", "FP8 (E5M2)"]
Scale = Literal["per block", "per channel", "per tensor"]
Source = Literal["model layer", "normal", "uniform", "Student-t", "normal with outliers"]
Method = Literal["rounding", "GPTQ", "AWQ"]

FORMATS: dict[Format, tuple[str, int | None]] = {
    "NormalFloat": ("nf", None),
    "Integer": ("int", None),
    "FP4 (E2M1)": ("fp4-e2m1", 4),
    "FP4 (bitsandbytes)": ("fp4-bnb", 4),
    "FP8 (E4M3)": ("fp8-e4m3", 8),
    "FP8 (E5M2)": ("fp8-e5m2", 8),
}
"""What the engine calls each format, and its bits where the format itself says them."""

DRAWN_SHAPE = (256, 256)
"""Of drawn numbers."""

BLOCK_TOKENS = 256
"""T, tokens that a model reads from the start each time."""

LOGITS_AT_ONCE = 2**25
"""Computed in one pass, if a block has no more."""

_BYTES_A_WEIGHT = 64

METHODS: dict[Method, str] = {"rounding": "rounding", "GPTQ": "gptq", "AWQ": "awq"}
"""What the engine calls each method."""

_ROUNDING = "round to nearest (RTN)"


class ScaleParams(ExperimentParams):
    """Which weights share a scale, and how it is stored. The time limit leaves room for a model that is fetched."""

    time_limit: ClassVar[float] = 180.0

    scale: Scale = Field(
        "per block", title="One scale", description="For each block of neighbours, each output channel, or all weights."
    )
    block_size: int = Field(
        64,
        ge=2,
        le=4096,
        title="Block size",
        description="Weights that share a scale, if there is one per block (GPTQ's and AWQ's group size): small blocks "
        "cost bits, large ones error.",
    )
    double_quantization: bool = Field(
        False, title="Double quantization", description="Store the scales themselves in 8 bits, as QLoRA does."
    )


class FormatParams(ScaleParams):
    """The levels that a weight can take."""

    data_type: Format = Field("NormalFloat", title="Data type", description="Where the levels lie.")
    bits: int = Field(
        4,
        ge=MIN_BITS,
        le=MAX_BITS,
        title="Bits",
        description="Of a code, without its share of the scale; FP4 and FP8 have their own number.",
    )
    symmetric: bool = Field(
        True,
        title="Symmetric",
        description="Of Integer: levels −n … n. Without it each scale has a zero point as well. Others are symmetric.",
    )

    @property
    def width(self) -> int:
        """b, the bits of a code."""
        return FORMATS[self.data_type][1] or self.bits

    @property
    def in_words(self) -> str:
        """E.g. ``"NormalFloat, 4 bits, per block of 64, double quantization"``."""
        own_bits = FORMATS[self.data_type][1] is not None
        parts = [
            self.data_type if own_bits else f"{self.data_type}, {self.bits} bits",
            "asymmetric" if self.data_type == "Integer" and not self.symmetric else "",
            f"per block of {self.block_size}" if self.scale == "per block" else self.scale,
            "double quantization" if self.double_quantization else "",
        ]
        return ", ".join(filter(None, parts))


class ModelParams(ExperimentParams):
    """A model at full precision."""

    model: str = Field(
        catalogue.STORYTELLER,
        max_length=300,
        title="Model",
        description="storyteller (our own, small), or another at full precision: smollm2-135m where the Hugging Face "
        "Hub can be reached, any id, or a local folder.",
    )

    def cache_token(self) -> str:
        """When a local model changed last."""
        return str(local_models.modified(self.model))

    def memory_bytes(self) -> int:
        """The model in float32, 4·P, and its largest layer while it is quantized, 64·N; 0 for models not known here.

        Codes are packed in 64-bit words, so that a weight takes some 64 bytes for a moment.
        """
        shape = self._shape
        return 0 if shape is None else 4 * shape.config.num_parameters + _BYTES_A_WEIGHT * shape.d_model * shape.ffn_dim

    @property
    def _shape(self) -> _lora.Shape | None:
        """Of a model that is known before it is loaded; what others need is checked when they are."""
        return _lora.shape_of(self.model) if self.model in get_args(_lora.ModelName) else None

    @field_validator("model")
    @classmethod
    def _some_model(cls, model: str) -> str:
        if not model.strip():
            raise ValueError(f"No model is named: {catalogue.STORYTELLER} is always there.")
        return model.strip()


class WeightParams(FormatParams, ModelParams):
    """Weights, and the format that they are to be stored in."""

    source: Source = Field(
        "model layer", title="Weights", description="A layer of the model, or numbers drawn from a distribution."
    )
    layer: str = Field(
        "",
        max_length=300,
        title="Layer",
        description="The dotted name of a linear layer of the model; empty takes the first layer's down projection.",
    )
    outliers: float = Field(
        0.1,
        ge=0,
        le=5,
        title="Outliers (%)",
        description="Of normal with outliers: how many weights are outliers.",
        json_schema_extra={"step": 0.1},
    )
    outlier_size: float = Field(
        20.0,
        ge=1,
        le=100,
        title="Outlier size (σ)",
        description="Of normal with outliers: their magnitude in standard deviations of the others.",
    )
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of the numbers that are drawn.")

    def memory_bytes(self) -> int:
        """As `ModelParams.memory_bytes`; of drawn numbers 64·N."""
        return super().memory_bytes() if self.source == "model layer" else _BYTES_A_WEIGHT * math.prod(DRAWN_SHAPE)


class TextParams(ModelParams):
    """A text to measure perplexity on."""

    tokens: int = Field(
        2048,
        ge=64,
        le=65_536,
        title="Tokens",
        description="Tokens that are predicted: with more of them the perplexity is surer, and takes longer.",
    )
    text: str = Field(
        "",
        max_length=500_000,
        title="Your text",
        description="To measure on; empty takes stories that the storyteller was not trained on.",
        json_schema_extra={"widget": "area"},
    )

    def memory_bytes(self) -> int:
        """The model and a copy, the logits of the tokens read at once three times, and every layer's statistics.

        8·P + 12·max(2²⁵, T·V) + 4·L·(6 D² + F²) + 64·N
        """
        shape = self._shape
        if shape is None:
            return 0
        logits = max(LOGITS_AT_ONCE, BLOCK_TOKENS * shape.vocab_size)
        moments = shape.num_layers * (6 * shape.d_model**2 + shape.ffn_dim**2)
        return super().memory_bytes() + 4 * (shape.config.num_parameters + 3 * logits + moments)

    @field_validator("text")
    @classmethod
    def _something_to_read(cls, text: str) -> str:
        text = text.strip()
        if 0 < len(text.encode()) < FEWEST_TOKENS:  # a token has at least one byte, and one ends the text
            raise ValueError(
                f"Your text has {len(text)} characters, too few to measure perplexity on: paste text of "
                f"{FEWEST_TOKENS + 1} tokens or more, or leave it empty for the stories."
            )
        return text


def method_name(method: str) -> str:
    """What the field calls a method."""
    return _ROUNDING if method == "rounding" else method


def type_name(data_type: Format, bits: int, symmetric: bool = True) -> str:
    """The name of `engine.quantization.data_types.DATA_TYPE_NAMES` for a format of the lab."""
    name, own_bits = FORMATS[data_type]
    if own_bits:
        return name
    return f"{'uint' if name == 'int' and not symmetric else name}{bits}"
