"""Softmax of a row that arrives in chunks: the naive one overflows, the online one does not.

Legend: T scores, N chunks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from engine.experiments import ExperimentParams
from engine.experiments._flash import Dtype, number_in_words

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

MAX_SCORES = 64
LARGEST: dict[Dtype, float] = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
"""Finite numbers of each format end here."""

_LARGEST_TYPED = 1e4
_QUOTED = 20


class Params(ExperimentParams):
    """A row of scores, and how it is read."""

    lane: ClassVar = "short"

    scores: str = Field(
        "0.6, 2.1, 1.4, 2.7, 0.3, 3.1, 1.8, 2.9, 3.4, 0.9, 2.2, 1.1",
        title="Scores",
        description=f'Up to {MAX_SCORES} numbers with commas or spaces between them, or "random".',
        max_length=2000,
        json_schema_extra={"widget": "line"},
    )
    chunk: int = Field(4, ge=1, le=MAX_SCORES, title="Chunk", description="Scores that are read at a time.")
    factor: float = Field(
        4.0,
        ge=1,
        le=1000,
        title="Size of the scores",
        description="Multiplies every score. exp(11.1) is more than float16 can hold, exp(88.8) more than float32 can.",
    )
    dtype: Dtype = Field("float16", title="Number format", description="In which the softmax is computed.")
    length: int = Field(
        16, ge=1, le=MAX_SCORES, title="Random scores", description='How many, where the scores are "random".'
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="Of random scores.")

    @field_validator("scores")
    @classmethod
    def _some_numbers(cls, text: str) -> str:
        if text.strip().lower() != "random":
            _numbers(text)
        return text

    @model_validator(mode="after")
    def _representable(self) -> Params:
        for position, score in enumerate(self.values(), 1):
            if abs(score * self.factor) > LARGEST[self.dtype]:
                raise ValueError(
                    f"Score {position} ({score:g}) times {self.factor:g} is more than {self.dtype} can hold "
                    f"({LARGEST[self.dtype]:,.0f}) even before exp: choose a smaller size or another format."
                )
        return self

    def values(self) -> list[float]:
        """The scores before they are multiplied."""
        if self.scores.strip().lower() == "random":
            return np.random.default_rng(self.seed).normal(size=self.length).round(3).tolist()
        return _numbers(self.scores)


@dataclass(frozen=True)
class Chunk:
    """The state after one chunk.

    Args:
        start, stop: its scores are those from `start` up to, not including, `stop`.
        maximum_before, maximum: m before and after; −∞ before the first chunk.
        rescale: exp(m before − m), by which the sum is multiplied.
        sum_before, sum: l before and after.
    """

    start: int
    stop: int
    maximum_before: float
    maximum: float
    rescale: float
    sum_before: float
    sum: float


@dataclass(frozen=True)
class Result:
    """Three ways to the same softmax.

    Args:
        scores: (T,), multiplied, as the format holds them.
        chunks: what the online softmax held after each.
        naive_exponentials: (T,), exp(score) in the format; infinite where it overflows.
        naive_sum: their sum in the format.
        naive: (T,), exp(score) / sum in the format; NaN or 0 where that is what comes out.
        online: (T,), in the format.
        reference: (T,), float64 softmax of the same scores.
        overflowed: positions, from 0, whose exponential is infinite in the format.
        naive_error, online_error: largest absolute difference to the reference; NaN if there are NaNs.
        largest: finite number of the format.
        exp_limit: logarithm of that: scores above it overflow.
        sentence: what happened.
    """

    scores: np.ndarray
    chunks: tuple[Chunk, ...]
    naive_exponentials: np.ndarray
    naive_sum: float
    naive: np.ndarray
    online: np.ndarray
    reference: np.ndarray
    overflowed: tuple[int, ...]
    naive_error: float
    online_error: float
    largest: float
    exp_limit: float
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Compute all three."""
    import torch

    from engine.flash.online import naive_softmax, softmax_of, stream_softmax

    scores = torch.tensor(params.values(), dtype=torch.float64).mul(params.factor).to(getattr(torch, params.dtype))
    states = list(stream_softmax(scores, params.chunk))
    exponentials = scores.exp()
    naive, online = naive_softmax(scores).double().numpy(), softmax_of(states).double().numpy()
    reference = scores.double().softmax(0).numpy()
    result = Result(
        scores=scores.double().numpy(),
        chunks=tuple(
            Chunk(
                state.columns.start,
                state.columns.stop,
                state.maximum_before.item(),
                state.maximum.item(),
                state.rescale.item(),
                state.sum_before.item(),
                state.sum.item(),
            )
            for state in states
        ),
        naive_exponentials=exponentials.double().numpy(),
        naive_sum=exponentials.sum().item(),
        naive=naive,
        online=online,
        reference=reference,
        overflowed=tuple(exponentials.isinf().nonzero().flatten().tolist()),
        naive_error=np.abs(naive - reference).max().item(),
        online_error=np.abs(online - reference).max().item(),
        largest=LARGEST[params.dtype],
        exp_limit=math.log(LARGEST[params.dtype]),
        sentence="",
    )
    return replace(result, sentence=_describe(params.dtype, result))


def _describe(dtype: Dtype, found: Result) -> str:
    rises = sum(after.maximum > after.maximum_before for after in found.chunks[1:])
    times = {0: "did not rise again", 1: "rose once more", 2: "rose twice more"}.get(rises, f"rose {rises} times more")
    online = f"its maximum {times} after the first chunk"
    right = f"the online softmax is within {number_in_words(found.online_error)} of float64 ({online})"
    if found.overflowed:
        many, total = len(found.overflowed), len(found.scores)
        return (
            f"The naive softmax fails: exp of {many} of {total} scores is infinite in {dtype}, which ends at "
            f"exp({found.exp_limit:.1f}), and infinity / infinity is no number; {right}."
        )
    if math.isinf(found.naive_sum):
        return (
            f"The naive softmax fails: every exponential fits into {dtype}, but their sum is infinite, so every weight "
            f"becomes 0; {right}."
        )
    if found.naive_sum == 0:
        return f"The naive softmax fails: every exponential is 0 in {dtype}, and 0 / 0 is no number; {right}."
    room = found.exp_limit - found.scores.max()
    return (
        f"Nothing overflows {dtype} here, the largest score is {room:.1f} below its limit of {found.exp_limit:.1f}: "
        f"the naive softmax is within {number_in_words(found.naive_error)} of float64, and {right}."
    )


def _numbers(text: str) -> list[float]:
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    if not words:
        raise ValueError('There are no scores: type a few numbers with commas between them, or "random".')
    if len(words) > MAX_SCORES:
        raise ValueError(f"There are {len(words):,} scores, and {MAX_SCORES} can be drawn: leave some out.")
    return [_number(word, position) for position, word in enumerate(words, 1)]


def _number(word: str, position: int) -> float:
    shown = word if len(word) <= _QUOTED else f"{word[:_QUOTED]}…"
    try:
        number = float(word.replace("−", "-"))
    except ValueError:
        raise ValueError(f"Score {position} ({shown!r}) is no number: write it like 1.5 or -2.") from None
    if not math.isfinite(number):
        raise ValueError(f"Score {position} ({shown!r}) is not finite: write a number like 1.5 or -2.")
    if abs(number) > _LARGEST_TYPED:
        raise ValueError(
            f"Score {position} ({shown}) is out of range: type numbers from {-_LARGEST_TYPED:,.0f} to "
            f"{_LARGEST_TYPED:,.0f}."
        )
    return number
