"""How fast a mixture of experts is on a GPU, ours beside other ways to compute it: a record. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.experiments._flash_recorded import Recorded

Direction = Literal["forward", "forward and backward"]
LoadKind = Literal["even", "uneven"]

OURS = "ours"
TARGET = 500.0
"""TFLOP/s that ours is to reach, forward and under an even load, at the recorded size."""

_RECORD = Path(__file__).parents[1] / "recorded" / "moe_feed_forward_h200.json"
_DIRECTIONS: dict[str, Direction] = {"forward": "forward", "both": "forward and backward"}


@dataclass(frozen=True)
class LayerSize:
    """What was computed.

    Args:
        num_tokens, d_model, ffn_dim, num_experts, top_k: N, D, F, E and K.
        direction: the pass.
    """

    num_tokens: int
    d_model: int
    ffn_dim: int
    num_experts: int
    top_k: int
    direction: Direction


@dataclass(frozen=True)
class Way:
    """One way to compute the layer.

    Args:
        name: as tests/benchmarks/moe_feed_forward.py calls it.
        load: whether a fresh router spread the tokens, or one with a bias that grows from expert to expert.
        tflops: 10¹² FLOP/s of the experts' products, over the time of all that the layer does.
        median_ms, low_ms, high_ms: of the timed runs: median, 10th and 90th percentile.
        runs: how many were timed.
        peak_bytes: allocated at the peak beyond what was there.
        error: of the output, relative, against the layer in float32 with the routing of ours.
    """

    name: str
    load: LoadKind
    tflops: float
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    peak_bytes: int
    error: float


@dataclass(frozen=True)
class LayerSpeeds:
    """Every way that was recorded, and what the device can do.

    Args:
        ways: in the order of the record.
        peak_flops: FLOP/s of one large dense product in the same run.
        busiest: load ÷ fair share of the busiest expert, by load.
        device: its name.
        versions: of what took part.
        evidence: how it was measured, a line each.
    """

    ways: tuple[Way, ...]
    peak_flops: float
    busiest: dict[LoadKind, float]
    device: str
    versions: dict[str, str]
    evidence: tuple[str, ...]

    def way(self, name: str, load: LoadKind = "even") -> Way | None:
        """One of them; None if it was not recorded, or failed."""
        return next((way for way in self.ways if (way.name, way.load) == (name, load)), None)


@lru_cache(maxsize=2)
def recorded_layer(direction: Direction) -> Recorded[LayerSize, LayerSpeeds] | None:
    """What `tests.benchmarks.moe_feed_forward` recorded in this direction; None if there is no such record."""
    if not _RECORD.is_file():
        return None
    log = json.loads(_RECORD.read_text(encoding="utf-8"))
    run = log["runs"][-1]
    tables = [table for table in run["tables"] if _DIRECTIONS[table["direction"]] == direction]
    if not tables:
        return None
    found = LayerSpeeds(
        ways=tuple(_way(table, name, row) for table in tables for name, row in table["rows"].items()),
        peak_flops=run["ceilings"]["flops"],
        busiest={table["load"]: 1 + table["max_violation"] for table in tables},
        device=log["device"],
        versions=log["versions"],
        evidence=_evidence(run["ceilings"], tables),
    )
    return Recorded(LayerSize(**run["size"], direction=direction), found, run["recorded"])


def _way(table: dict[str, Any], name: str, row: dict[str, Any]) -> Way:
    times = {field: row["evidence"][field] for field in ("median_ms", "low_ms", "high_ms", "runs")}
    return Way(
        name=name,
        load=table["load"],
        tflops=row["tflops"],
        peak_bytes=row["peak_bytes"],
        error=row["errors"][0],
        **times,
    )


def _evidence(ceilings: dict[str, Any], tables: list[dict[str, Any]]) -> tuple[str, ...]:
    product, ours = ceilings["product"], tables[0]["rows"][OURS]["evidence"]
    return (
        f"dense product: {product['shape']}, {product['low_ms']:.3g} to {product['high_ms']:.3g} ms",
        f"a way: median of at least 10 runs after {ours['warmup']} that do not count; whiskers go from the 10th to the "
        "90th percentile",
        "uneven load: by a bias that grows from expert to expert, which transformers' block does not have",
        "work: 2·N·K·3·D·F FLOPs forward, three times as many with the backward pass; routing, gathering and combining "
        "count as time and not as work",
    )
