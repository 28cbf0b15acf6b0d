"""What a GPU gave for the targets, as it was recorded, and how a run is recorded. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.experiments import to_plain
from engine.experiments.targets import Figure, RecordedFigure, Result

_FOLDER = Path(__file__).parents[1] / "recorded"
_RECORD = _FOLDER / "targets_h200.json"


def write_record(result: Result, path: Path) -> None:
    """Write what was measured, with where and when, as `read_record` reads it.

    Args:
        result: of a run; what it did not measure is left out.
        path: of the file, which is written anew.
    """
    rows = [
        {
            "key": row.target.key,
            "bound": str(row.target.bound),
            "verdict": row.verdict,
            "figure": to_plain(row.figure),
            "note": row.note,
            "seconds": round(row.seconds, 3),
        }
        for row in result.rows
        if row.verdict != "not measured"
    ]
    record = {
        "what": "The targets that the software measures itself against, by python -m engine targets",
        "recorded": result.date,
        "device": result.device,
        "versions": result.versions,
        "evidence": result.evidence,
        "seconds": round(result.seconds, 1),
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, RecordedFigure]:
    """What a record says, by the targets' keys."""
    log = _read(path)
    return {
        row["key"]: RecordedFigure(
            row["figure"] and Figure(**row["figure"]), log["device"], log["recorded"], row["note"]
        )
        for row in log.get("rows", ())
    }


@lru_cache(maxsize=1)
def recorded_figures() -> Mapping[str, RecordedFigure]:
    """What a GPU gave, by the targets' keys: from the targets' own record, else from a benchmark's of the same."""
    return {**dict(_from_benchmarks()), **read_record(_RECORD)}


def _from_benchmarks() -> Iterator[tuple[str, RecordedFigure]]:
    attention = _read(_FOLDER / "attention_forward_h200.json")
    for point in attention["runs"][-1] if attention else ():
        time = point["evidence"]
        where = time["device"], attention["recorded"]
        figure = Figure(time["median_ms"], time["low_ms"], time["high_ms"], time["runs"])
        yield f"attention_time_{point['length']}", RecordedFigure(figure, *where)
        yield f"attention_memory_{point['length']}", RecordedFigure(Figure(point["peak_mb"]), *where)
    flash = _read(_FOLDER / "flash_attention_h200.json")
    for run in flash.get("runs", ()):
        if contract := run.get("contract"):
            where = flash["device"], run["recorded"]
            ratios = {
                f"{first}Attention first": [seconds["StandardAttention"] / seconds["FlashAttention"]]
                for first, seconds in contract["ten_cold_calls_s"].items()
            }
            yield "flash_speedup", RecordedFigure(Figure.of_worst(ratios, "processes"), *where)
            peaks = contract["peak_bytes"]
            saving = 100 * (1 - peaks["FlashAttention"] / peaks["StandardAttention"])
            yield "flash_memory", RecordedFigure(Figure(saving), *where)
    memory = _read(_FOLDER / "memory_prediction_h200.json")
    if memory:
        plain, paged = memory["paged"]["attempts"]
        if not plain["completed"]:
            figure = Figure(len(paged["losses"]))
            yield "paged_optimizer", RecordedFigure(figure, memory["device"], memory["recorded"])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
