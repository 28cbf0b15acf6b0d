"""Targets, what was measured of them, and the verdict. Needs no torch.

The targets themselves, with all their numbers, are in tests/benchmarks/performance_targets.py alone.
"""

from __future__ import annotations

import math
import operator
import runpy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.errors import InputError, WorkbenchError

Group = Literal["attention", "lora", "quantization", "coverage", "gpu"]
Direction = Literal["at most", "less than", "at least", "more than"]
Verdict = Literal["passed", "failed", "not measured"]

ROOT = Path(__file__).parents[2]
"""Of the repository: the targets and the report of the tests' coverage lie outside of the package."""

_TABLE = ROOT / "tests" / "benchmarks" / "performance_targets.py"

_HOLDS: dict[Direction, Callable[[float, float], bool]] = {
    "at most": operator.le,
    "less than": operator.lt,
    "at least": operator.ge,
    "more than": operator.gt,
}


class NotMeasuredError(WorkbenchError):
    """A target cannot be measured here; the message says what it takes."""


@dataclass(frozen=True)
class Bound:
    """What a figure has to keep.

    Args:
        direction: on which side of the value, and whether the value itself will do.
        value: in the unit.
        unit: of the value, e.g. ``"ms"``; a share is in ``"%"``.
    """

    direction: Direction
    value: float
    unit: str

    def holds(self, value: float) -> bool:
        """Whether `value` keeps it, which what is no number does not."""
        return _HOLDS[self.direction](value, self.value)

    def __str__(self) -> str:
        return f"{self.direction} {self.amount(self.value)}"

    def amount(self, value: float) -> str:
        """A value of this unit to three digits, e.g. ``"0.359 ms"``; to more where it would be rounded to the bound."""
        digits = max(3, len(f"{abs(value):.0f}"))
        while float(f"{value:.{digits}g}") == self.value != value:
            digits += 1
        return f"{value:.{digits}g}{'' if self.unit == '×' else ' '}{self.unit}"


@dataclass(frozen=True)
class Target:
    """One figure that the software is to keep within a bound.

    Args:
        key: its name in records.
        group: what it belongs to.
        name: a few words.
        bound: what it has to keep.
        quantity: what is measured, a key of `engine.targets.measures.MEASURES`.
        settings: what it is measured with, by the names of that function's arguments.
        how: what is measured, a sentence.
        needs_gpu: whether it can be measured on a GPU only.
    """

    key: str
    group: Group
    name: str
    bound: Bound
    quantity: str
    how: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_gpu: bool = False


@dataclass(frozen=True)
class Figure:
    """What was measured, in the unit of the target's bound.

    Args:
        value: the median of the runs, of the worst kind of several, or what was counted; the verdict is on it.
        low, high: their 10th and 90th percentile; None of a figure that does not vary.
        runs: how many there were.
        runs_of: what they were.
        note: what else is to be known, a sentence or nothing.
    """

    value: float
    low: float | None = None
    high: float | None = None
    runs: int = 1
    runs_of: str = "runs"
    note: str = ""

    @classmethod
    def of_runs(cls, values: Sequence[float], runs_of: str, note: str = "") -> Figure:
        """Several runs as one figure.

        Args:
            values: one of each run.
            runs_of: what they were, e.g. ``"seeds"``.
            note: what else is to be known.

        Returns:
            Their median and spread; no number if one of them is none, which a median would not show.
        """
        if any(map(math.isnan, values)):
            return cls(math.nan, runs=len(values), runs_of=runs_of, note=note)
        if len(values) < 2:
            return cls(values[0], note=note)
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1], len(values), runs_of, note)

    @classmethod
    def of_worst(cls, groups: Mapping[str, Sequence[float]], runs_of: str) -> Figure:
        """Runs of several kinds, which have no common middle: the kind with the smallest median counts.

        Args:
            groups: one value of each run, by what they have in common, e.g. ``"FlashAttention first"``.
            runs_of: what they were.

        Returns:
            That median, the spread of all runs, and a note with every kind's median.
        """
        medians = {name: cls.of_runs(values, runs_of).value for name, values in groups.items()}
        every = cls.of_runs([value for values in groups.values() for value in values], runs_of)
        note = f"{'; '.join(f'{name}: {median:.3g}' for name, median in medians.items())}; the smaller counts."
        return replace(every, value=every.value if math.isnan(every.value) else min(medians.values()), note=note)


@dataclass(frozen=True)
class Row:
    """A target and what is known of it.

    Args:
        target: which.
        verdict: on the figure; a measurement that raised has failed.
        figure: what was measured; None if nothing was.
        note: why nothing was, or what is to be known about the figure; a sentence or nothing.
        seconds: that the measurement took.
    """

    target: Target
    verdict: Verdict = "not measured"
    figure: Figure | None = None
    note: str = ""
    seconds: float = 0.0


@lru_cache(maxsize=1)
def read_targets() -> tuple[Target, ...]:
    """All targets, in the order in which they are measured and shown.

    The file is run by its path, for `tests` is no part of what is installed with the engine.

    Raises:
        InputError: the file is not there.
    """
    return read_source(_TABLE)["TARGETS"]


def read_source(path: Path) -> dict[str, Any]:
    """What a Python file beside the package defines, by name.

    Raises:
        InputError: it is not there.
    """
    if not path.is_file():
        raise InputError(
            f"{path.relative_to(ROOT)} is not there: run this from a checkout of the whole repository, tests included."
        )
    return runpy.run_path(str(path))
