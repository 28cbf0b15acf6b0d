"""A training step with the techniques that are on, carried out: its time, its memory, its loss, on this device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.errors import DoesNotFitError
from engine.experiments import full_model
from engine.experiments._full_model import SwitchParams

if TYPE_CHECKING:
    from engine.measure import Evidence
    from engine.runtime.jobs import Job

ALL_WEIGHTS = "PyTorch's products, with all weights held"
"""What computes attention where FlashAttention is off."""

_MARGIN = 1.2
_STEPS = 8  # at least, those that are not timed included
SLOW = 4e11
"""FLOPs that two processor cores need some ten seconds for: enough for each model at its first settings."""


class Params(SwitchParams):
    """A model, what is on it, and a batch."""

    time_limit: ClassVar[float] = 60.0
    cacheable: ClassVar[bool] = False

    def memory_bytes(self) -> int:
        """What is predicted of a step and the plain model, which is there before it, with a margin."""
        return _needed(self, full_model.predict(self, on_cuda=False))


@dataclass(frozen=True)
class Step:
    """What a training step took.

    Args:
        on: names of the switches that are on.
        evidence: of its time; of several rounds the medians of theirs.
        rounds: the median time of each, in milliseconds; in turns with others if there are several.
        tokens: of the batch.
        model_bytes: of the model as it is stored.
        state_bytes: of the optimizer's state.
        peak_bytes: at the fullest moment of a step, model, state and batch included.
        predicted_bytes: the same as it was predicted.
        loss: of the first step, on random tokens, in nats a token.
        attention: what computed it.
        seconds: of building, of all steps and of weighing.
    """

    on: tuple[str, ...]
    evidence: Evidence
    rounds: tuple[float, ...]
    tokens: int
    model_bytes: int
    state_bytes: int
    peak_bytes: int
    predicted_bytes: int
    loss: float
    attention: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """In the median step."""
        return 1e3 * self.tokens / self.evidence.median_ms

    @property
    def error(self) -> float:
        """Of the predicted memory, as a share of what was measured."""
        return self.predicted_bytes / self.peak_bytes - 1


def run(params: Params, job: Job) -> Step:
    """Build the model, take a few steps on random tokens, and weigh one.

    Raises:
        DoesNotFitError: it would take a processor too long.
    """
    from engine.experiments._on_workers.full_model_step import measure

    check_time(params, job.device)
    job.report(0, 1)
    return measure(params, job.device)


def check_time(params: SwitchParams, device: str, **switches: bool) -> None:
    """Refuse what takes a processor too long for a move of a control.

    Raises:
        DoesNotFitError: it does; the sentence says by how much.
    """
    predicted = full_model.predict(params, on_cuda=device.startswith("cuda"), **switches)
    flops = _STEPS * params.batch_size * params.length * predicted.flops.step
    if not device.startswith("cuda") and flops > SLOW:
        raise DoesNotFitError(
            f"The steps that are timed come to {flops / 1e9:,.0f} GFLOP; a processor follows every move up to "
            f"{SLOW / 1e9:,.0f}: choose a smaller width, depth, batch or length, {_less(flops / SLOW)} in all."
        )


def _less(ratio: float) -> str:
    """By how much something must shrink that is so many times too large, e.g. ``"about 2% less"``."""
    return f"about {math.ceil(100 - 100 / ratio)}% less" if ratio < 2 else f"{ratio:,.1f} times less"


def needed_bytes(params: SwitchParams) -> int:
    """What measuring takes at its peak as the switches are set, with each of them flipped, and with none on."""
    found = full_model.compute(params)
    return _needed(params, found.chosen, found.off, *found.flipped.values())


def _needed(params: SwitchParams, *predicted: full_model.Prediction) -> int:
    most = max(each.memory.peak.total for each in predicted)
    return round(_MARGIN * (most + 8 * params.architecture().num_parameters))
