"""What a mixture of LoRA experts costs on a GPU, beside its base layer and beside PEFT's figures: a record.

Needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.experiments._flash_recorded import Recorded

BASE, WHOLE, CHOSEN = "base layer", "base layer + mixture", "chosen"
"""What the record calls the layer alone, the layer with its mixture, and the form that the mixture takes by itself."""

CAPTURED = ", captured"
"""Follows a name in the record if the kernels ran as one CUDA graph, without waiting for the CPU to launch each."""

PEFT_MS, PEFT_BYTES = 2.56, 1.30e9
"""A training step of 128 experts as PEFT reports it for its batched form, on an H100: what ours is to stay below."""

_RECORD = Path(__file__).parents[1] / "recorded" / "moe_lora_h200.json"


@dataclass(frozen=True)
class MixtureSize:
    """What was computed.

    Args:
        num_tokens, in_features, out_features, num_experts, rank, top_k: N, I, O, E, R and K.
    """

    num_tokens: int
    in_features: int
    out_features: int
    num_experts: int
    rank: int
    top_k: int


@dataclass(frozen=True)
class Timing:
    """One row of the record.

    Args:
        name: as tests/benchmarks/moe_lora.py calls it.
        median_ms, low_ms, high_ms: of the timed runs: median, 10th and 90th percentile.
        runs: how many were timed.
        peak_bytes: allocated at the peak beyond what was there; 0 of a CUDA graph, whose memory is there before.
        kernels_ms: what the GPU's kernels take of it; None where that was not recorded.
    """

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    peak_bytes: int
    kernels_ms: float | None = None


@dataclass(frozen=True)
class MixtureCosts:
    """Forward passes of one mixture, and training steps of a larger one.

    Args:
        forward: every way, the base layer alone first.
        steps: forward and backward of the larger mixture in each form, by its size; they differ in K.
        device: its name.
        versions: of what took part.
        evidence: how it was measured, a line each.
    """

    forward: tuple[Timing, ...]
    steps: dict[MixtureSize, tuple[Timing, ...]]
    device: str
    versions: dict[str, str]
    evidence: tuple[str, ...]

    def timing(self, name: str) -> Timing:
        """A forward pass by its name."""
        return next(timing for timing in self.forward if timing.name == name)

    def added(self, way: str = "") -> Timing:
        """What the mixture adds to its base layer: the difference of the medians, and the widest of the spreads'.

        Args:
            way: `CAPTURED` as CUDA graphs; one kernel after the other when left out.
        """
        whole, base = self.timing(WHOLE + way), self.timing(BASE + way)
        return Timing(
            name="added",
            median_ms=whole.median_ms - base.median_ms,
            low_ms=whole.low_ms - base.high_ms,
            high_ms=whole.high_ms - base.low_ms,
            runs=min(whole.runs, base.runs),
            peak_bytes=whole.peak_bytes - base.peak_bytes,
        )


@lru_cache(maxsize=1)
def recorded_mixture() -> Recorded[MixtureSize, MixtureCosts] | None:
    """What `tests.benchmarks.moe_lora` recorded; None if there is no such record."""
    if not _RECORD.is_file():
        return None
    log = json.loads(_RECORD.read_text(encoding="utf-8"))
    run = log["runs"][-1]
    forward, base = run["forward"], run["forward"]["rows"][BASE]["evidence"]
    found = MixtureCosts(
        forward=_timings(forward["rows"]),
        steps={MixtureSize(**step["size"]): _timings(step["rows"]) for step in run["training"]},
        device=log["device"],
        versions=log["versions"],
        evidence=(
            f"a row: median of the runs that are counted beside it, after {base['warmup']} that do not count",
            "spread: from the 10th to the 90th percentile; of what is added, the least and the most that the ends of "
            "both spreads allow",
            "a CUDA graph: the same kernels, launched all at once; its memory is there beforehand and not counted",
            "a training step: forward and backward pass of the mixture alone, without a base layer and an optimizer",
        ),
    )
    return Recorded(MixtureSize(**forward["size"]), found, run["recorded"])


def _timings(rows: dict[str, Any]) -> tuple[Timing, ...]:
    return tuple(
        Timing(
            name=name,
            peak_bytes=row["peak_bytes"],
            kernels_ms=row.get("kernels_ms"),
            **{field: row["evidence"][field] for field in ("median_ms", "low_ms", "high_ms", "runs")},
        )
        for name, row in rows.items()
    )
