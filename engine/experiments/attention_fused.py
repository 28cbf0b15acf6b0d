"""The same pass through a fused kernel, which never holds the weights: how far apart, and how fast.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine.errors import InputError
from engine.experiments import _attention

if TYPE_CHECKING:
    from engine.measure import Evidence
    from engine.runtime.jobs import Job


class Params(_attention.TextParams):
    """A model and a text."""

    lane: ClassVar = "long"
    cacheable: ClassVar[bool] = False


@dataclass(frozen=True)
class Result:
    """Both ways through the model.

    Args:
        difference: largest absolute difference between both outputs: logits over all positions, or hidden states for a
            model without a vocabulary head.
        spread: standard deviation of the same numbers, as a measure of what is large.
        what: "logits" or "hidden states".
        eager: evidence of the pass that keeps every map, as in `engine.measure.Evidence`.
        fused: evidence of the fused pass.
        sentence: both in words.
    """

    difference: float
    spread: float
    what: str
    eager: dict[str, Any]
    fused: dict[str, Any]
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Compare `engine.tracing.trace` with `torch.nn.functional.scaled_dot_product_attention` inside the same model."""
    from engine import tracing
    from engine.measure import measure_time

    if params.weights == "untrained":
        raise InputError(
            "The untrained layer is not part of a model that a fused kernel could run: choose trained weights."
        )
    model, ids = _attention.read(params, job)
    ids = list(ids)
    job.report(0, 3)
    seen = tracing.trace(model, ids)
    difference = tracing.fused_difference(model, seen)
    what, values, apart = (
        ("hidden states", seen.hidden, difference.hidden)
        if seen.logits is None
        else ("logits", seen.logits, difference.logits)
    )
    shape = f"one pass of {model.name} over {len(ids)} tokens, every position"
    job.report(1, 3)
    eager = measure_time(
        lambda: tracing.trace(model, ids), job.device, dtype=model.dtype, shape=f"{shape}, every map kept", runs=7
    )
    job.report(2, 3)
    fused = measure_time(
        lambda: tracing.fused_pass(model, ids), job.device, dtype=model.dtype, shape=f"{shape}, fused kernel", runs=7
    )
    job.report(3, 3)
    spread = values.float().std().item()
    return Result(
        difference=apart,
        spread=spread,
        what=what,
        eager=asdict(eager),
        fused=asdict(fused),
        sentence=(
            f"The {what} of the two ways differ by at most {apart:.1g}, {apart / spread:.1g} of their standard "
            f"deviation. {_compared(eager, fused)}"
        ),
    )


def _compared(eager: Evidence, fused: Evidence) -> str:
    if eager.low_ms <= fused.high_ms and fused.low_ms <= eager.high_ms:
        return "Their times overlap: at this length these runs show no difference."
    return f"The pass that keeps every map takes {eager.median_ms / fused.median_ms:.2g} times as long."
