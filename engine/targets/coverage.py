"""The share of the engine that the tests reach, tier by tier, as the last run of the whole suite wrote it.

Needs no torch.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.targets.target import ROOT, Figure, NotMeasuredError, read_source

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

_REPORT = ROOT / "coverage.json"
_SOURCES = ("engine", "ui", "app_pages", "app.py", "tests")
"""A report is as old as the newest of these: other tests reach other lines."""

_OF = {"lines": 0, "branches": 1}


@lru_cache(maxsize=1)
def read_tiers() -> dict[str, Any]:
    """What tests/coverage_tiers.py defines: the tiers with their bounds, and how to count them.

    Raises:
        InputError: the file is not there.
    """
    return read_source(ROOT / "tests" / "coverage_tiers.py")


def covered_share(job: Job, tier: str, of: Literal["lines", "branches"]) -> Figure:
    """Per cent of a tier's lines or branches that `make test` covered, with a note that says when.

    Raises:
        NotMeasuredError: there is no report, it is older than a source or a test, or it lacks a file of this tier.
    """
    if not _REPORT.is_file():
        raise NotMeasuredError("Not measured yet: run make test.")
    report = json.loads(_REPORT.read_text(encoding="utf-8"))
    written = datetime.datetime.fromisoformat(report["meta"]["timestamp"])
    _check_fresh(written)
    tiers = read_tiers()
    paths = next(each.paths for each in tiers["TIERS"] if each.name == tier)
    _check_whole(report["files"], paths)
    share = tiers["shares"](tiers["read"](_REPORT), paths)[_OF[of]]
    return Figure(share, note=f"By the run of make test of {written:%Y-%m-%d %H:%M}.")


def _check_fresh(written: datetime.datetime) -> None:
    """Refuse a report older than a source or a test."""
    newest = max(_python_files(_SOURCES), key=lambda path: path.stat().st_mtime)
    changed = datetime.datetime.fromtimestamp(newest.stat().st_mtime)
    if changed > written:
        raise NotMeasuredError(
            f"Stale: {newest.relative_to(ROOT).as_posix()} was changed {changed:%Y-%m-%d %H:%M}, after the run of "
            f"make test of {written:%Y-%m-%d %H:%M}. Run make test."
        )


def _check_whole(reported: Collection[str], paths: Sequence[str]) -> None:
    """Refuse a report that lacks a file under `paths`, or has one that is gone."""
    there = {path.relative_to(ROOT).as_posix() for path in _python_files(paths)}
    of_tier = {name for name in reported if any(name == path or name.startswith(f"{path}/") for path in paths)}
    if apart := sorted(there ^ of_tier):
        more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
        what = "lacks" if apart[0] in there else "still has"
        raise NotMeasuredError(f"Partial: the report of the tests {what} {apart[0]}{more}. Run make test, all of it.")


def _python_files(places: Sequence[str]) -> Iterator[Path]:
    for place in places:
        yield from (ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place]
