"""Each technique on and off, every row a real run: what it does to loss, time, memory and size.

Legend: B batch, T tokens of a text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from engine.errors import InputError
from engine.experiments import full_model
from engine.experiments._ending import Ending, see_through, stopped
from engine.experiments._full_model import SWITCHES
from engine.experiments._full_model_runs import RunParams, overlap
from engine.experiments._training_cost import weigh

if TYPE_CHECKING:
    from engine.experiments._on_workers.full_model_training import Ground
    from engine.runtime.jobs import Job

_UNTIMED = 2
"""First steps of a run: the first warms up, the second is weighed, which slows it down."""
_FEWEST = 3
"""Times from which on something is said of how they differ."""
_DECILES = 10
"""Of fewer times no tenth is cut off."""

NOTHING, EVERYTHING = "nothing", "everything"


class Params(RunParams):
    """What is to be taken apart, and with how long runs."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0
    stop_grace: ClassVar[float] = 120.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    steps: int = Field(
        40,
        ge=_UNTIMED + _FEWEST,
        le=500,
        title="Steps",
        description="Updates in each run; all but the first two are timed.",
    )
    seeds: int = Field(
        1,
        ge=1,
        le=3,
        title="Seeds",
        description="Runs of each row: losses of one seed cannot be told from luck.",
    )

    @model_validator(mode="after")
    def _check_switches(self) -> Params:
        if not self.switched_on():
            raise InputError("Nothing is switched on and so nothing to take apart: switch on one technique or more.")
        return self

    def rows(self) -> dict[str, frozenset[str]]:
        """What is on in each row, by its name: nothing, each alone, everything that is set, everything but one.

        Rows with equal switches are there once, under their first name.
        """
        everything = frozenset(self.switched_on())
        named = {NOTHING: frozenset()}
        named |= {SWITCHES[name]: frozenset({name}) for name in self.switched_on()}
        named |= {EVERYTHING: everything}
        named |= {f"all but {SWITCHES[name]}": everything - {name} for name in self.switched_on()}
        first: dict[frozenset[str], str] = {}
        for name, switches in named.items():
            first.setdefault(switches, name)
        return {name: switches for switches, name in first.items()}

    def memory_bytes(self) -> int:
        """What the row that takes most takes at its peak."""
        return max(self.step_bytes(**states(switches)) for switches in self.rows().values())


def states(switches: frozenset[str]) -> dict[str, bool]:
    """Of every switch, whether it is among `switches`."""
    return {name: name in switches for name in SWITCHES}


@dataclass(frozen=True)
class Row:
    """The runs with one set of switches.

    Args:
        name: of the row.
        switches: that are on, in the order of `SWITCHES`.
        first_loss, last_loss: of text that is never learned, before the first and after the last step, nats a token;
            one for each seed, NaN where it diverged.
        median_ms, low_ms, high_ms: of a step, its 10th and its 90th percentile, over all seeds; of fewer than ten steps
            the fastest and the slowest. NaN if none was timed.
        timed: steps that were timed; 0 if it diverged before.
        tokens_per_second: by the median.
        peak_bytes: of a step, weights and AdamW's means included; 0 if it diverged before a step was weighed.
        model_bytes: of the weights as they are stored.
        learning: numbers that learn.
        learns: the parts that they are in.
        learning_rate: the highest.
    """

    name: str
    switches: tuple[str, ...]
    first_loss: tuple[float, ...]
    last_loss: tuple[float, ...]
    median_ms: float
    low_ms: float
    high_ms: float
    timed: int
    tokens_per_second: float
    peak_bytes: int
    model_bytes: int
    learning: int
    learns: tuple[str, ...]
    learning_rate: float

    @property
    def mean_loss(self) -> float:
        """After the last step, over the seeds."""
        return statistics.fmean(self.last_loss)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """From its low to its high end."""
        return self.low_ms, self.high_ms

    @property
    def diverged(self) -> bool:
        """Whether a seed did."""
        return not all(map(math.isfinite, self.last_loss))


@dataclass(frozen=True)
class Result:
    """The rows so far.

    Args:
        rows: complete ones, in the order of `Params.rows`.
        total: how many there are to be.
        sentence: what they show.
        evidence: how it was measured, a line each.
        ended, ending: whether all are there, and why not.
        device: its name.
        versions: of what took part.
    """

    rows: tuple[Row, ...]
    total: int
    sentence: str
    evidence: tuple[str, ...]
    ended: Ending
    ending: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class _Run:
    """One row with one seed."""

    first_loss: float
    last_loss: float
    step_ms: list[float]
    peak_bytes: int
    model_bytes: int
    learning: int


def run(params: Params, job: Job) -> Result:
    """Make the runs of one row after the other until the last, or a cancellation; complete rows are kept.

    Raises:
        InputError: the text is too short.
    """
    from engine.experiments._on_workers.full_model_training import Ground
    from engine.measure import device_name, versions

    ground = Ground(params, job.device)
    if params.flash:
        ground.settle_attention()
    wanted, rows = params.rows(), []
    where, software = device_name(job.device), versions()

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            rows=tuple(rows),
            total=len(wanted),
            sentence=describe_rows(rows, ended),
            evidence=_evidence(params, ground.batch_size),
            ended=ended,
            ending=ending,
            device=where,
            versions=software,
        )

    for number, (name, switches) in enumerate(wanted.items()):
        runs = []
        for index in range(params.seeds):
            place = number * params.seeds + index
            found = _run_once(params, ground, switches, params.seed + index, job, place, len(wanted) * params.seeds)
            if found is None:
                ended, words = stopped(params, job)
                return result(ended, f"{words} after {len(rows)} of {len(wanted)} rows, which are shown.")
            runs.append(found)
        rows.append(_row(name, switches, runs, params, ground.batch_size * params.length))
        job.show(lambda: result("running", f"{len(rows)} of {len(wanted)} rows so far."))
    return result("finished", f"All {len(wanted)} rows are there.")


def _run_once(
    params: Params, ground: Ground, switches: frozenset[str], seed: int, job: Job, place: int, places: int
) -> _Run | None:
    """A run of one row, its steps timed while nobody else measures; None if the job is to stop."""
    from engine.experiments._on_workers.full_model_training import persevere
    from engine.measure import exclusive
    from engine.quantization.production import get_model_memory_mb

    model = ground.build(seed, **states(switches))
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model_bytes = round(1e6 * get_model_memory_mb(model))
    step_ms: list[float] = []
    pause, peak_bytes, last_loss = 1, 0, math.nan
    trainer = ground.trainer(
        model,
        seed,
        rate=params.rate(**states(switches)),
        on_step=lambda report: step_ms.append(1e3 * ground.batch_size * params.length / report.tokens_per_second),
        cancelled=lambda: job.cancelled or trainer.step >= pause,
    )
    first_loss = ground.loss(model)

    def train() -> None:
        nonlocal pause, peak_bytes, last_loss
        persevere(trainer, lambda: trainer.train_steps(params.steps))
        while trainer.step < params.steps and not job.cancelled:
            pause = trainer.step + 1
            if pause == _UNTIMED:
                peak_bytes = persevere(trainer, lambda: weigh(trainer))
            else:
                with exclusive(job.device):
                    persevere(trainer, trainer.resume)
            job.report(place * params.steps + trainer.step, places * params.steps, run=place + 1)
        if trainer.step == params.steps:
            last_loss = persevere(trainer, lambda: ground.loss(model))

    ended, _ = see_through(train, trainer, params, job)
    if ended not in ("finished", "diverged"):
        return None
    return _Run(first_loss, last_loss, step_ms[_UNTIMED:], peak_bytes, model_bytes, learning)


def _row(name: str, switches: frozenset[str], runs: list[_Run], params: Params, tokens: int) -> Row:
    times = sorted(ms for one in runs for ms in one.step_ms)
    spread = statistics.quantiles(times, n=10, method="inclusive") if len(times) >= _DECILES else times or [math.nan]
    median = statistics.median(times or [math.nan])
    return Row(
        name=name,
        switches=tuple(switch for switch in SWITCHES if switch in switches),
        first_loss=tuple(one.first_loss for one in runs),
        last_loss=tuple(one.last_loss for one in runs),
        median_ms=median,
        low_ms=spread[0],
        high_ms=spread[-1],
        timed=len(times),
        tokens_per_second=1e3 * tokens / median,
        peak_bytes=max(one.peak_bytes for one in runs),
        model_bytes=runs[0].model_bytes,
        learning=runs[0].learning,
        learns=_learning_parts(params, switches),
        learning_rate=params.rate(**states(switches)),
    )


def _learning_parts(params: Params, switches: frozenset[str]) -> tuple[str, ...]:
    """Parts of the model in which numbers learn."""
    counts = full_model.predict(params, on_cuda=False, **states(switches)).parameters
    return tuple(
        part if count.learning == count.total else f"some {part}" for part, count in counts.items() if count.learning
    )


def _evidence(params: Params, batch: int) -> tuple[str, ...]:
    seeds = f"{params.seeds} seed{'s' if params.seeds > 1 else ''}, from {params.seed}"
    lines = [
        f"each row: {params.steps} steps of {batch} × {params.length} tokens, {seeds}; all rows read the same batches",
        "time: every step but the first, which warms up, and the second, which is weighed; each while nothing else is "
        "measured on the device; median, 10th and 90th percentile, of fewer than ten steps the fastest and the slowest",
        "memory: weights as they are stored and AdamW's means of what learns, and on top of them what the second step "
        "allocates at its peak",
    ]
    if params.flash:
        lines.append("FlashAttention chooses its kernel by measuring, before the first row and outside of all times")
    return tuple(lines)


def describe_rows(rows: Sequence[Row], ended: Ending = "finished") -> str:
    """Which technique saves most memory and which costs most time, alone, what all do together, and whether they
    differ in loss beyond what seeds differ in."""
    plain, alone = _base(rows)
    if plain is None or not alone:
        return "The first rows are not there yet."
    said = [_memory_sentence(rows), _time_sentence(rows)]
    whole = max(rows, key=lambda row: len(row.switches))
    if len(whole.switches) > 1 and min(whole.timed, plain.timed) >= _FEWEST:
        told = (
            f"its time cannot be told from that with nothing on, {plain.median_ms:.3g} ms"
            if overlap(whole.spread_ms, plain.spread_ms)
            else f"{whole.median_ms / plain.median_ms:.2g} times the time"
        )
        said.append(
            f"With {len(whole.switches)} techniques on a step takes {whole.peak_bytes / plain.peak_bytes:.0%} of the "
            f"memory that it takes with nothing on, and {told}."
        )
    said.append(_loss_sentence(rows))
    if ended != "finished":
        said.append("Not all rows are there.")
    return " ".join(said)


def _base(rows: Sequence[Row]) -> tuple[Row | None, list[Row]]:
    """Of `rows` the one with nothing on, and those of one technique alone."""
    plain = next((row for row in rows if not row.switches), None)
    return plain, [row for row in rows if len(row.switches) == 1]


def _memory_sentence(rows: Sequence[Row]) -> str:
    plain, alone = _base([row for row in rows if row.peak_bytes])
    if plain is None or not alone:
        return "Memory cannot be compared: too few rows came as far as the step that is weighed."
    best = min(alone, key=lambda row: row.peak_bytes)
    size, unit, digits = (1e9, "GB", 2) if plain.peak_bytes >= 1e9 else (1e6, "MB", 1)
    before, after = (f"{row.peak_bytes / size:.{digits}f}" for row in (plain, best))
    if best.peak_bytes >= plain.peak_bytes:
        return f"Alone, none makes a step take less memory than nothing on, {before} {unit}."
    return f"Alone, {best.name} saves most memory: a step takes {after} {unit} at its peak instead of {before}."


def _time_sentence(rows: Sequence[Row]) -> str:
    plain, alone = _base([row for row in rows if row.timed >= _FEWEST])
    if plain is None or not alone:
        return "Times cannot be compared: too few rows came as far as steps that are timed."
    slowest = max(alone, key=lambda row: row.median_ms)
    if slowest.median_ms <= plain.median_ms or overlap(slowest.spread_ms, plain.spread_ms):
        return "Alone, none makes a step longer by more than single steps differ."
    return (
        f"Alone, {slowest.name} costs most time: {slowest.median_ms:.3g} ms a step ({slowest.low_ms:.3g} to "
        f"{slowest.high_ms:.3g}) instead of {plain.median_ms:.3g} ({plain.low_ms:.3g} to {plain.high_ms:.3g})."
    )


def _loss_sentence(rows: Sequence[Row]) -> str:
    early = [row.name for row in rows if not row.timed]
    later = [row.name for row in rows if row.diverged and row.timed]
    done = [row for row in rows if not row.diverged]
    told = f" Diverged: {', '.join(later)}." if later else ""
    if early:
        told += f" Diverged before a step was timed: {', '.join(early)}."
    if len(done) < 2:
        return f"Losses cannot be compared.{told}"
    best, worst = (pick(done, key=lambda row: row.mean_loss) for pick in (min, max))
    ends = (f"{row.mean_loss:.2f} ({row.name})" for row in (best, worst))
    words = f"Held-out loss at the end is from {' to '.join(ends)}"
    if len(best.last_loss) == 1:
        return f"{words}; with one seed that may be luck, and rates differ as the table says.{told}"
    spread = max(max(row.last_loss) - min(row.last_loss) for row in done)
    apart = "more" if worst.mean_loss - best.mean_loss > spread else "no more"
    return (
        f"{words}, which is {apart} than the {spread:.2f} by which seeds of one row differ at most; rates differ as "
        f"the table says.{told}"
    )
