"""What can be measured of a target: the functions by name, and one call for any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.targets import attention, coverage, finetuning, paging, production, quantization
from engine.targets.target import Figure, NotMeasuredError, Target

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


MEASURES: dict[str, Callable[..., Figure]] = {
    "attention time": attention.forward_time,
    "attention memory": attention.forward_memory,
    "cold speed-up": attention.cold_speedup,
    "peak saving": attention.peak_saving,
    "LoRA parameters": finetuning.parameter_share,
    "LoRA quality": finetuning.relative_quality,
    "quantized size": quantization.size_share,
    "quantized perplexity": quantization.perplexity_increase,
    "quantized output": quantization.output_error,
    "coverage": coverage.covered_share,
    "production time": production.reading_time,
    "production memory": production.training_memory,
    "paged steps": paging.paged_steps,
}
"""Each takes the job and the target's settings."""


def measure(target: Target, job: Job) -> Figure:
    """Measure one target on the job's device.

    Raises:
        NotMeasuredError: it cannot be measured here.
        Exception: whatever the measurement raises.
    """
    if target.needs_gpu and not job.device.startswith("cuda"):
        raise NotMeasuredError("Needs a GPU.")
    return MEASURES[target.quantity](job, **target.settings)
