"""What the Whole model lab's ablation and throughput gave on a GPU, as it was recorded. Needs no torch."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from engine.experiments import full_model_ablation, full_model_throughput
from engine.experiments._flash_recorded import Recorded
from engine.experiments._full_model import SwitchParams

_RECORD = Path(__file__).parents[1] / "recorded" / "full_model_h200.json"

P = TypeVar("P", bound=SwitchParams)


def recorded_ablation(
    params: SwitchParams,
) -> Recorded[full_model_ablation.Params, full_model_ablation.Result] | None:
    """The ablation nearest to `params` in size that `tests.benchmarks.full_model_runs` recorded; None without one."""
    nearest = _nearest("full_model_ablation", full_model_ablation.Params, params)
    if nearest is None:
        return None
    given, plain, date = nearest
    rows = tuple(
        full_model_ablation.Row(**{name: _number(value) for name, value in row.items()}) for row in plain["rows"]
    )
    shown = {"rows": rows, "sentence": full_model_ablation.describe_rows(rows), "evidence": tuple(plain["evidence"])}
    return Recorded(given, full_model_ablation.Result(**plain | shown), date)


def recorded_throughput(
    params: SwitchParams,
) -> Recorded[full_model_throughput.Params, full_model_throughput.Result] | None:
    """Likewise the throughput."""
    nearest = _nearest("full_model_throughput", full_model_throughput.Params, params)
    if nearest is None:
        return None
    given, plain, date = nearest
    points = tuple(full_model_throughput.Point(**point) for point in plain["points"])
    sentence = full_model_throughput.describe_points(points)
    shown = {"points": points, "sentence": sentence, "evidence": tuple(plain["evidence"])}
    return Recorded(given, full_model_throughput.Result(**plain | shown), date)


def _nearest(experiment: str, kind: type[P], params: SwitchParams) -> tuple[P, dict[str, Any], str] | None:
    """What was asked for, what came out and when, of the run whose step is nearest in parameters times tokens."""
    runs = [run for run in _runs() if run["experiment"] == experiment]
    found = [(kind(**run["params"]), run["result"], run["recorded"]) for run in runs]
    return min(found, key=lambda each: abs(math.log(_work(each[0]) / _work(params))), default=None)


def _work(params: SwitchParams) -> int:
    return params.architecture().num_parameters * params.batch_size * params.length


@lru_cache(maxsize=1)
def _runs() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(_RECORD.read_text(encoding="utf-8"))["runs"]) if _RECORD.is_file() else ()


def _number(value: Any) -> Any:
    """What JSON has no word for is null in it, and a list was a tuple."""
    if isinstance(value, list):
        return tuple(_number(each) for each in value)
    return math.nan if value is None else value
