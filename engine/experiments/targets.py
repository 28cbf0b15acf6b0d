"""The targets that the software measures itself against, all measured on this device."""

from __future__ import annotations

import datetime
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from engine.errors import JobCancelledError, WorkbenchError
from engine.experiments import ExperimentParams, Lane
from engine.experiments._ending import Ending, stopped
from engine.experiments._part import JobPart
from engine.targets.target import Figure, Group, NotMeasuredError, Row, Target, Verdict, read_targets

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

GROUPS: dict[Group, str] = {
    "attention": "Attention",
    "lora": "LoRA",
    "quantization": "Quantization",
    "coverage": "Coverage of the tests",
    "gpu": "On a GPU",
}
"""What the groups are called."""

_SHARES = {"LoRA quality": 150.0, "quantized perplexity": 10.0, "cold speed-up": 10.0}
"""How much longer than another a measurement takes, about."""

_PEAK_BYTES: dict[Group, int] = {
    "attention": 200_000_000,
    "lora": 1_000_000_000,  # the storyteller, its copy that learns, gradients, AdamW's means and activations
    "quantization": 1_000_000_000,
    "coverage": 0,
    "gpu": 8_000_000_000,  # the production model's bound
}
"""That the measurements of a group allocate at most, about."""


class Params(ExperimentParams):
    """Which targets are measured."""

    lane: ClassVar[Lane] = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0  # perplexity of one model, or a process that makes cold calls
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    groups: tuple[Group, ...] = Field(
        tuple(GROUPS), min_length=1, title="Targets", description="Which of them: all when left out."
    )

    def memory_bytes(self) -> int:
        """What the largest measurement of these groups allocates; those for a GPU are not made where there is none."""
        from engine.runtime.devices import visible_gpus

        return max((_PEAK_BYTES[group] for group in self.groups if group != "gpu" or visible_gpus()), default=0)


@dataclass(frozen=True)
class RecordedFigure:
    """What a GPU gave for one target.

    Args:
        figure: what was measured; None of a target that failed without one.
        device: where.
        date: when, as 2026-01-31.
        note: why there is no figure, or what is to be known about it.
    """

    figure: Figure | None
    device: str
    date: str
    note: str = ""

    @property
    def provenance(self) -> str:
        """Where and when, in a few words."""
        return f"{self.device.removeprefix('NVIDIA ')}, {self.date}"


@dataclass(frozen=True)
class Result:
    """The targets, up to where the measuring ended or, while it is running, up to where it is.

    Args:
        rows: every target that was asked for, measured or not, in the order of the table.
        sentence: what came out, in words.
        ended, ending: why it ended, or that it has not.
        seconds: that it took.
        date: when, as 2026-01-31.
        device: where, its name.
        versions: of what took part.
        evidence: how it was measured, a line each.
    """

    rows: tuple[Row, ...]
    sentence: str
    ended: Ending
    ending: str
    seconds: float
    date: str
    device: str
    versions: dict[str, str]
    evidence: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether a target that was measured was missed."""
        return any(row.verdict == "failed" for row in self.rows)

    @property
    def measured(self) -> bool:
        """Whether any target was."""
        return any(row.verdict != "not measured" for row in self.rows)


def run(params: Params, job: Job) -> Result:
    """Measure one target after the other; what raises has failed, and the others go on.

    The rows so far are shown on the way, and kept where the run is stopped.

    Raises:
        InputError: the table of targets is not there.
    """
    from engine.measure import device_name, versions

    rows = [_before(row.target, job.device) for row in unmeasured(params.groups)]
    where, software, began = device_name(job.device), versions() | _other_versions(), time.monotonic()

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            rows=tuple(rows),
            sentence=describe(rows),
            ended=ended,
            ending=ending,
            seconds=time.monotonic() - began,
            date=datetime.date.today().isoformat(),
            device=where,
            versions=software,
            evidence=EVIDENCE,
        )

    weights = [_share(row.target, job.device) for row in rows]
    total = sum(weights) or 1.0  # none takes any time where all need a GPU
    for index, row in enumerate(rows):
        rows[index] = Row(row.target, note="Being measured.")
        job.show(lambda index=index: result("running", f"{index} of {len(rows)} targets so far."))
        part = _part(job, index, len(rows), sum(weights[:index]) / total, weights[index] / total)
        try:
            if job.cancelled:
                raise JobCancelledError("Cancelled.")
            rows[index] = _measured(row.target, part)
        except JobCancelledError:
            rows[index] = row
            ended, words = stopped(params, job)
            return result(ended, f"{words} after {index} of {len(rows)} targets, which are shown.")
        part.report(1, 1)
    return result("finished", f"All {len(rows)} targets were gone through.")


def unmeasured(groups: Sequence[Group] = tuple(GROUPS)) -> list[Row]:
    """The rows before anything is measured.

    Raises:
        InputError: the table of targets is not there.
    """
    return [Row(target) for target in read_targets() if target.group in groups]


def describe(rows: Sequence[Row]) -> str:
    """How many targets are met, which are not, and what could not be measured, in a sentence or two."""
    count = Counter(row.verdict for row in rows)
    measured = count["passed"] + count["failed"]
    if not measured:
        return f"None of the {len(rows)} targets is measured here yet."
    words = f"{count['passed']} of the {measured} targets that were measured here {_are(count['passed'])} met"
    failed = [row.target.name for row in rows if row.verdict == "failed"]
    sentence = f"{words}; missed: {'; '.join(failed)}." if failed else f"{words}."
    if not count["not measured"]:
        return sentence
    gpu = sum(row.verdict == "not measured" and row.target.needs_gpu for row in rows)
    reasons = [f"{gpu} need a GPU" if gpu != 1 else "1 needs a GPU"] if gpu else []
    if rest := count["not measured"] - gpu:
        reasons.append(f"{rest} {_are(rest)} not measured yet")
    return f"{sentence} Of the others, {' and '.join(reasons)}."


def describe_recorded(rows: Sequence[Row], recorded: Mapping[str, RecordedFigure]) -> str:
    """That nothing is measured yet, and how many targets a GPU met."""
    found = [(row.target.bound, recorded[row.target.key].figure) for row in rows if row.target.key in recorded]
    met = sum(figure is not None and bound.holds(figure.value) for bound, figure in found)
    others = sum(row.target.group != "coverage" for row in rows) - len(found)
    devices = sorted({each.device.removeprefix("NVIDIA ") for each in recorded.values()})
    words = f"None of the {len(rows)} targets is measured here yet"
    if not found:
        return f"{words}, and nothing is recorded of a GPU."
    rest = f"; {others} {_are(others)} not recorded yet" if others else ""
    return f"{words}. Of {len(found)} that were recorded on a GPU ({', '.join(devices)}), {met} {_are(met)} met{rest}."


EVIDENCE = (
    "the verdict is on the median, the worse one of two where it matters who comes first, or on what was counted; a "
    "figure just at a bound of “at most” or “at least” keeps it, at one of “less than” or “more than” it does not",
    "spread: the 10th and the 90th percentile of timed runs, of processes or of seeds; of perplexity, 1.28 standard "
    "errors of the estimate on either side",
    "times on a CPU are of 10 runs after 2 that do not count, on a GPU of 100 ms of runs after 25 ms that do not "
    "count; what else the machine does meanwhile counts in",
    "1 MB is 10⁶ bytes, 1 GB is 10⁹",
)
"""How targets are measured."""


def _measured(target: Target, part: JobPart) -> Row:
    from engine.targets.measures import measure

    began = time.monotonic()

    def row(verdict: Verdict, figure: Figure | None = None, note: str = "") -> Row:
        return Row(target, verdict, figure, note, time.monotonic() - began)

    try:
        figure = measure(target, part)
    except NotMeasuredError as error:
        return row("not measured", note=str(error))
    except JobCancelledError:
        raise
    except Exception as error:  # a measurement that cannot be made here has failed, and says why; the next may not
        return row("failed", note=_reason(error))
    if not math.isfinite(figure.value):
        return row("failed", note=f"What was measured is no number. {figure.note}".rstrip())
    return row("passed" if target.bound.holds(figure.value) else "failed", figure, figure.note)


def _before(target: Target, device: str) -> Row:
    """Not measured yet, or not to be measured here."""
    return Row(target, note="Needs a GPU." if target.needs_gpu and not device.startswith("cuda") else "")


def _share(target: Target, device: str) -> float:
    """How long it takes, next to the others."""
    return _SHARES.get(target.quantity, 1.0) if device.startswith("cuda") or not target.needs_gpu else 0.0


def _reason(error: Exception) -> str:
    """An error in a sentence."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, WorkbenchError) and first else f"{type(error).__name__}: {first}".rstrip(": ")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _other_versions() -> dict[str, str]:
    """Of the libraries that the pretrained model and 4 bits depend on."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("transformers", "bitsandbytes")}


def _part(job: Job, index: int, targets: int, before: float, share: float) -> JobPart:
    """The job of the target `index` of `targets`: it takes `share` of the whole time, after `before` of it."""

    def report(step: int, total: int, **_: float) -> None:
        job.report(index + step // total, targets, share_of_time=before + share * step / total)

    return JobPart(job, report)
