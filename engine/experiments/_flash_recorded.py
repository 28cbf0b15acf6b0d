"""What the FlashAttention lab's sweeps gave on a GPU, as it was recorded. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from engine.experiments import flash_decode, flash_roofline, flash_speed
from engine.experiments._flash import Peaks, Stop, SweepParams, why_above_peak
from engine.experiments._flash_cost import held_bytes, least_ms, model_of, predict

P, R = TypeVar("P"), TypeVar("R")

_FOLDER = Path(__file__).parents[1] / "recorded"
_SWEEPS = _FOLDER / "flash_sweeps_h200.json"
_BENCHMARK = _FOLDER / "flash_attention_h200.json"


@dataclass(frozen=True)
class Recorded(Generic[P, R]):
    """One run of an experiment on a GPU.

    Args:
        params: what was asked for.
        found: what came out; it knows its device and versions.
        date: when.
    """

    params: P
    found: R
    date: str


def recorded_speed(params: SweepParams) -> Recorded[flash_speed.Params, flash_speed.Result] | None:
    """The sweep that is closest to these settings: in direction first, then in mask, then in head width."""

    def apart(run: dict[str, Any]) -> tuple[bool, bool, int]:
        given = flash_speed.Params(**run["params"])
        return given.grad != params.grad, given.causal != params.causal, abs(given.head_dim - params.head_dim)

    run = min(_runs("flash_speed"), key=apart, default=None)
    if run is None:
        return None
    given, plain = flash_speed.Params(**run["params"]), dict(run["result"])
    peaks = _peaks(plain)
    points = tuple(flash_speed.Point(**point, **_predicted(given, point, peaks)) for point in plain["points"])
    predicted = predict(given, peaks, on_gpu=True)
    plain |= _shared(plain) | {"points": points, "predicted": predicted, "peaks": peaks}
    why_above = why_above_peak(given.dtype, on_gpu=True)
    plain["sentence"] = flash_speed.describe_points(points, plain["stops"], why_above)
    return Recorded(given, flash_speed.Result(**plain), run["recorded"])


def recorded_roofline(params: SweepParams) -> Recorded[flash_speed.Params, flash_roofline.Result] | None:
    """The same sweep below the roof of its device."""
    recorded = recorded_speed(params)
    if recorded is None:
        return None
    return Recorded(recorded.params, flash_roofline.below_roof(recorded.params, recorded.found), recorded.date)


def recorded_decode() -> Recorded[flash_decode.Params, flash_decode.Result] | None:
    """One query against long caches."""
    run = next(_runs("flash_decode"), None)
    if run is None:
        return None
    params, plain = flash_decode.Params(**run["params"]), dict(run["result"])
    points = tuple(flash_decode.Point(**point) for point in plain["points"])
    merge = flash_decode.Merge(
        **{name: np.array(value) if isinstance(value, list) else value for name, value in plain["merge"].items()}
    )
    plain |= _shared(plain) | {"points": points, "merge": merge, "peaks": _peaks(plain)}
    plain["sentence"] = flash_decode.describe_points(params, points, on_gpu=True)
    return Recorded(params, flash_decode.Result(**plain), run["recorded"])


def recorded_precisions() -> tuple[dict[str, float], str] | None:
    """Root mean square errors of float32 attention by how it is computed, (2, 8, 2048, 64), and where and when."""
    if not _BENCHMARK.exists():
        return None
    log = json.loads(_BENCHMARK.read_text(encoding="utf-8"))
    run = next(run for run in log["runs"] if "precisions" in run)
    where = (
        f"recorded on an {log['device'].removeprefix('NVIDIA ')}, {run['recorded']}, torch {log['versions']['torch']}"
    )
    return run["precisions"], where


def _runs(experiment: str) -> Iterator[dict[str, Any]]:
    return (run for run in _sweeps() if run["experiment"] == experiment)


@lru_cache(maxsize=1)
def _sweeps() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(_SWEEPS.read_text(encoding="utf-8"))["runs"]) if _SWEEPS.exists() else ()


def _predicted(params: flash_speed.Params, point: dict[str, Any], peaks: Peaks) -> dict[str, float]:
    """What is said of a point beforehand, as it is said now."""
    backend, length = point["backend"], point["length"]
    return {
        "predicted_bytes": held_bytes(params, backend, length, on_gpu=True),
        "predicted_ms": least_ms(params, model_of(backend), length, peaks),
    }


def _peaks(plain: dict[str, Any]) -> Peaks:
    return Peaks(**plain["peaks"] | {"evidence": tuple(plain["peaks"]["evidence"])})


def _shared(plain: dict[str, Any]) -> dict[str, Any]:
    return {"stops": tuple(Stop(**stop) for stop in plain["stops"]), "evidence": tuple(plain["evidence"])}
