"""The same prompt continued by the original and by the quantized model, and one head's attention in both.

Legend: T tokens of the prompt, L layers, H heads.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from engine.errors import InputError, JobCancelledError
from engine.experiments import _quantization, _quantization_perplexity, _quantization_source
from engine.experiments._quantization import Method
from engine.experiments._quantization_perplexity import Stopped

if TYPE_CHECKING:
    from torch import Tensor

    from engine.pretrained import Pretrained
    from engine.runtime.jobs import Job

MAX_PROMPT = 128
"""Tokens, as in the attention lab."""

STEPS = 7
"""Quantize, and three things with each of two models."""


class Params(_quantization.FormatParams, _quantization.ModelParams):
    """A model, a format, a prompt and a head."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 600.0
    stop_grace: ClassVar[float] = 60.0

    method: Method = Field(
        "rounding", title="Method", description="How the levels are chosen; rounding is round to nearest (RTN)."
    )
    prompt: str = Field(
        "Once upon a time there was a little fox who",
        min_length=1,
        max_length=5_000,
        title="Prompt",
        description="What both models go on from, up to 128 tokens.",
        json_schema_extra={"widget": "area"},
    )
    new_tokens: int = Field(60, ge=1, le=200, title="New tokens", description="How far they go on, greedily.")
    attention_layer: int = Field(
        0, ge=0, le=511, title="Layer", description="Of the attention map; counted from 0, next to the input."
    )
    attention_head: int = Field(0, ge=0, le=511, title="Head", description="Counted from 0 within the layer.")

    def memory_bytes(self) -> int:
        """As for a perplexity."""
        return _quantization.TextParams(model=self.model).memory_bytes()


@dataclass(frozen=True)
class Result:
    """Both models.

    Args:
        prompt_tokens: T printable labels.
        original_text, quantized_text: the continuations.
        original_tokens, quantized_tokens: the same as printable labels.
        first_difference: index of the first new token in which they differ; None if they do not.
        original_perplexity, quantized_perplexity: on the shipped stories.
        perplexity_tokens: that were predicted for each.
        bits_per_weight: of the quantized layers, scales included.
        original_map, quantized_map: (T, T) attention of the chosen head on the prompt, query × key.
        moved: share of its attention that a token gives elsewhere than before, mean over the tokens: total variation.
        moved_by_head: (L, H), the same for every head.
        original_nbytes, quantized_nbytes: of the layers that are quantized, in bfloat16 and as stored.
        sentence: about the texts.
        map_sentence: about the attention.
    """

    prompt_tokens: list[str]
    original_text: str
    quantized_text: str
    original_tokens: list[str]
    quantized_tokens: list[str]
    first_difference: int | None
    original_perplexity: float
    quantized_perplexity: float
    perplexity_tokens: int
    bits_per_weight: float
    original_map: np.ndarray
    quantized_map: np.ndarray
    moved: float
    moved_by_head: np.ndarray
    original_nbytes: int
    quantized_nbytes: int
    sentence: str
    map_sentence: str


def run(params: Params, job: Job) -> Result:
    """Quantize the model, let both go on from the prompt, and trace both on it.

    Raises:
        InputError: the model cannot be had, is no decoder or has no linear layer; the prompt or the head does not fit
            it.
    """
    from engine import tracing

    model = _quantization_source.load_model(params, job, predicts=True)
    ids = model.encode(params.prompt)
    _check(params, model, len(ids))
    name = _quantization.type_name(params.data_type, params.bits, params.symmetric)
    try:
        quantized = _quantization_perplexity.quantize_model(model, name, params, params.method, job)
    except Stopped as stop:
        raise JobCancelledError("The job was cancelled while the model was quantized.") from stop
    report = quantized.quantization
    twins = model, replace(model, model=quantized)
    text = _quantization_perplexity.read_text(_quantization.TextParams(model=params.model), model)
    continuations, perplexities, maps = [], [], []
    for index, twin in enumerate(twins):
        job.report(1 + 3 * index, STEPS)
        continuations.append(_continue(twin, ids, params.new_tokens))
        _go_on(job, 2 + 3 * index)
        perplexities.append(_quantization_perplexity.measure(twin.model, model, text).value)
        _go_on(job, 3 + 3 * index)
        maps.append(tracing.trace(twin, ids, last_logits=True).attention.float())  # (L, H, T, T)
    _go_on(job, STEPS)
    original, changed = continuations
    moved = (maps[1] - maps[0]).abs().sum(-1).mean(-1) / 2  # (L, H)
    layer, head = params.attention_layer, params.attention_head
    count = sum(math.prod(entry.shape) for entry in report.layers)
    first_difference = _first_difference(original, changed)
    return Result(
        prompt_tokens=model.readable(ids),
        original_text=model.tokenizer.decode(original, skip_special_tokens=True),
        quantized_text=model.tokenizer.decode(changed, skip_special_tokens=True),
        original_tokens=model.readable(original),
        quantized_tokens=model.readable(changed),
        first_difference=first_difference,
        original_perplexity=perplexities[0],
        quantized_perplexity=perplexities[1],
        perplexity_tokens=text.tokens,
        bits_per_weight=report.bits_per_weight,
        original_map=maps[0][layer, head].cpu().numpy(),
        quantized_map=maps[1][layer, head].cpu().numpy(),
        moved=moved[layer, head].item(),
        moved_by_head=moved.cpu().numpy(),
        original_nbytes=2 * count,
        quantized_nbytes=round(report.bits_per_weight * count / 8),
        sentence=_describe(params, first_difference, len(original), perplexities),
        map_sentence=_describe_maps(params, moved),
    )


def _go_on(job: Job, step: int) -> None:
    """Tell how far it is, unless it is to stop."""
    if job.cancelled:
        raise JobCancelledError("The job was cancelled before both models were compared.")
    job.report(step, STEPS)


def _check(params: Params, model: Pretrained, length: int) -> None:
    """Refuse a prompt that is too long, and a head that is not there."""
    if length == 0:
        raise InputError("The prompt is empty: type a few words to go on from.")
    if length > MAX_PROMPT:
        raise InputError(f"The prompt has {length} tokens, the lab takes {MAX_PROMPT}: shorten it.")
    if model.max_tokens is not None and length + params.new_tokens > model.max_tokens:
        raise InputError(
            f"The prompt of {length} tokens and {params.new_tokens} new ones exceed the {model.max_tokens} that "
            f"{model.name} takes: ask for fewer."
        )
    for what, index, count in (
        ("layer", params.attention_layer, model.num_layers),
        ("head", params.attention_head, model.num_heads),
    ):
        if index >= count:
            raise InputError(f"There is no {what} {index}: {model.name} has {count} of them, 0 to {count - 1}.")


def _continue(model: Pretrained, ids: list[int], new_tokens: int) -> list[int]:
    """The tokens that the model goes on with, greedily, until it ends by itself."""
    import torch

    batch = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        found = model.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=model.tokenizer.eos_token_id,
            pad_token_id=model.tokenizer.eos_token_id,
        )
    return found[0, len(ids) :].tolist()


def _first_difference(one: list[int], other: list[int]) -> int | None:
    pairs = itertools.zip_longest(one, other)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), None)


def _describe(params: Params, first_difference: int | None, length: int, perplexities: list[float]) -> str:
    before, after = perplexities
    in_words = _quantization_perplexity.in_words
    how = f"{params.in_words}, by {_quantization.method_name(params.method)}"
    text = (
        f"both models say the same {length} tokens"
        if first_difference is None
        else f"the quantized model goes its own way at new token {first_difference + 1}"
    )
    return f"{how}: {text}; its perplexity is {in_words(after)} instead of {in_words(before)}."


def _describe_maps(params: Params, moved: Tensor) -> str:
    most = divmod(int(moved.argmax()), moved.shape[1])
    here = moved[params.attention_layer, params.attention_head]
    return (
        f"Layer {params.attention_layer}, head {params.attention_head} gives {here:.1%} of its attention to other "
        f"tokens than before; most moves in layer {most[0]}, head {most[1]} ({moved.max():.1%})."
    )
