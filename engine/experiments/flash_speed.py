"""Attention's time and memory against sequence length, backend by backend, measured live.

Legend: B batch, H heads, T tokens, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.experiments import _flash_cost
from engine.experiments._ending import Ending, stopped
from engine.experiments._flash import Peaks, Stop, SweepParams, bytes_in_words, why_above_peak
from engine.experiments._flash_cost import Predicted, predict

if TYPE_CHECKING:
    from engine.experiments._flash_sweep import Measured
    from engine.runtime.jobs import Job


class Params(SweepParams):
    """A shape, lengths, and who computes."""


@dataclass(frozen=True)
class Point:
    """One backend at one length.

    Args:
        backend, label: which, and what it is called.
        length: T.
        batch: B at this length.
        median_ms, low_ms, high_ms: of the timed runs: median, 10th and 90th percentile.
        runs: how many were timed.
        peak_bytes: that a run allocates at its peak beyond its inputs, measured. For gradients that is forward and
            backward together, as the forward pass keeps what the backward pass reads.
        predicted_bytes: the same, predicted.
        predicted_ms: the longer of computing and moving bytes at the device's peaks, as `_flash_cost.least_ms` models
            it.
        tflops: 10¹² FLOP/s reached, where only pairs that the mask lets through count.
        peak_share: of the measured speed of a large product, from 0 to 1 and a little above at most.
    """

    backend: str
    label: str
    length: int
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    peak_bytes: int
    predicted_bytes: int
    predicted_ms: float
    tflops: float
    peak_share: float


@dataclass(frozen=True)
class Result:
    """The points so far.

    Args:
        points: in the order in which they were measured: by length, then backend.
        stops: where lines end before the longest sequence, and why.
        absent: backends that were asked for and do not exist here, by label, with the reason in a sentence.
        predicted: one line for standard attention and one for flash.
        total: points that there are to be, stops included.
        peaks: of the device.
        free_bytes: memory of the device that was free at the start.
        on_gpu: whether it ran on one.
        evidence: how it was measured, a line each.
        ended, ending: whether all points are there, and why not.
        sentence: what the points show.
        device: its name.
        versions: of what took part.
    """

    points: tuple[Point, ...]
    stops: tuple[Stop, ...]
    absent: dict[str, str]
    predicted: tuple[Predicted, ...]
    total: int
    peaks: Peaks
    free_bytes: int
    on_gpu: bool
    evidence: tuple[str, ...]
    ended: Ending
    ending: str
    sentence: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Measure every backend at the shortest length, then at the next, until the longest, or a cancellation.

    Raises:
        DoesNotFitError: the longest sequence would not fit even without the T × T matrix.
    """
    from engine import memory
    from engine.experiments._flash_sweep import Measured, Sweep, describe, measure_peaks
    from engine.measure import device_name, versions

    free = memory.free(job.device)
    on_gpu = job.device.startswith("cuda")
    _flash_cost.check_fits(params, free, on_gpu=on_gpu)
    where, software = device_name(job.device), versions()
    peaks = measure_peaks(job.device, params.dtype)
    sweep = Sweep(params, job, peaks, weigh=True)
    predicted = predict(params, peaks, on_gpu=on_gpu)
    points: list[Point] = []
    stops: list[Stop] = []
    last = choice = ""
    why_above = why_above_peak(params.dtype, on_gpu=on_gpu)

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            points=tuple(points),
            stops=tuple(stops),
            absent=sweep.absent,
            predicted=predicted,
            total=sweep.total,
            peaks=peaks,
            free_bytes=free,
            on_gpu=on_gpu,
            evidence=(*((f"last point: {last}",) if last else ()), *peaks.evidence, _how_weighed(on_gpu)),
            ended=ended,
            ending=ending,
            sentence=" ".join(filter(None, (describe_points(tuple(points), tuple(stops), why_above), choice))),
            device=where,
            versions=software,
        )

    job.report(0, sweep.total)
    for found in sweep:
        if isinstance(found, Measured):
            points.append(_point(params, found, peaks, on_gpu=on_gpu))
            last = f"{found.backend.label}, {describe(found.evidence)}"
            numbers = {"tokens": found.length, "ms": found.evidence.median_ms}
        else:
            stops.append(found)
            numbers = {"tokens": found.length}
        done = len(points) + len(stops)
        job.report(done, sweep.total, **numbers, **sweep.share_of_time())
        job.show(lambda: result("running", f"{len(points) + len(stops)} of {sweep.total} points so far."))
    if (done := len(points) + len(stops)) < sweep.total:
        ended, words = stopped(params, job)
        return result(ended, f"{words} after {done} of {sweep.total} points, which are shown.")
    if chooses(params, on_gpu=on_gpu):
        choice = describe_choice(params, tuple(points), sweep.correct())
    return result("finished", f"All {sweep.total} points are there.")


def _point(params: Params, found: Measured, peaks: Peaks, *, on_gpu: bool) -> Point:
    name, length, evidence = found.backend.name, found.length, found.evidence
    speed = _flash_cost.flops(params, length) / evidence.median_ms * 1e3
    return Point(
        backend=name,
        label=found.backend.label,
        length=length,
        batch=params.batch_at(length),
        median_ms=evidence.median_ms,
        low_ms=evidence.low_ms,
        high_ms=evidence.high_ms,
        runs=evidence.runs,
        peak_bytes=found.peak_bytes,
        predicted_bytes=_flash_cost.held_bytes(params, name, length, on_gpu=on_gpu),
        predicted_ms=_flash_cost.least_ms(params, _flash_cost.model_of(name), length, peaks),
        tflops=speed / 1e12,
        peak_share=speed / peaks.flops,
    )


def _how_weighed(on_gpu: bool) -> str:
    how = (
        "the peak of PyTorch's CUDA allocator"
        if on_gpu
        else "the highest running sum of the allocations that PyTorch's profiler saw"
    )
    return f"memory: {how} in one run, inputs not counted"


def chooses(params: SweepParams, *, on_gpu: bool) -> bool:
    """Whether a sweep times what `engine.flash.FlashAttention` ranks backends by.

    It ranks the passes for gradients together and never the backward one alone, and on a GPU it computes float32 in
    half precision.
    """
    return params.direction != "backward" and not (on_gpu and params.dtype == "float32")


def describe_choice(params: SweepParams, points: tuple[Point, ...], correct: set[str]) -> str:
    """What `engine.flash.FlashAttention` would take at the longest length, by its own rule.

    Args:
        params: of the sweep, for which `chooses` holds.
        points: of which those at the longest length count.
        correct: names of the backends that err at most twice as much as standard attention at the shortest length.
    """
    longest = max((point.length for point in points), default=0)
    row = sorted((point for point in points if point.length == longest), key=lambda point: point.median_ms)
    chosen = next((point for point in row if point.backend in correct), None)
    if chosen is None:
        return ""
    said = (
        f"FlashAttention takes the fastest that errs at most twice as much as standard attention: at {longest:,} "
        f"tokens, of those measured here, it would take {chosen.label}, if errors are what they are at "
        f"{params.lengths[0]:,} tokens."
    )
    wrong = [point.label for point in row[: row.index(chosen)]]
    if not wrong:
        return said
    verbs = ("is", "errs") if len(wrong) == 1 else ("are", "err")
    return f"{said} {' and '.join(wrong)} {verbs[0]} faster, but {verbs[1]} more than that."


def describe_points(points: tuple[Point, ...], stops: tuple[Stop, ...], why_above: str) -> str:
    """The fastest without the matrix beside standard attention, at the longest length of both, and why lines end.

    Args:
        points, stops: as `Result`'s.
        why_above: how a kernel can be faster than the large product.
    """
    ends = _ends(stops)
    by_length: dict[int, dict[str, Point]] = {}
    for point in points:
        by_length.setdefault(point.length, {})[point.backend] = point
    others = {point.backend for point in points if point.backend != "standard"}
    others = {name for name in others if _flash_cost.model_of(name) == "flash"} or others
    compared = [length for length, row in by_length.items() if "standard" in row and others & row.keys()]
    if not compared:
        return " ".join(filter(None, (_alone(points, why_above), ends)))
    longest = max(compared)
    row = by_length[longest]
    standard = row["standard"]
    best = min((row[name] for name in others & row.keys()), key=lambda point: point.median_ms)
    said = (
        f"At {longest:,} tokens {best.label} takes {best.median_ms:.3g} ms, standard attention {standard.median_ms:.3g}"
    )
    if _overlap(best, standard):
        said += ": their spreads overlap, so these runs show no difference"
    else:
        slower, faster = sorted((best, standard), key=lambda point: -point.median_ms)
        said += (
            f", {'which is' if slower is standard else 'and that is'} {slower.median_ms / faster.median_ms:.1f} times "
        )
        said += "as long" if slower is standard else "faster"
    said += "."
    if best.peak_share > _flash_cost.ABOVE:
        said += f" That is {best.peak_share:.0%} of the large product that stands for the peak, {why_above}."
    return " ".join(filter(None, (said, _memory_words(by_length, longest, best), ends)))


def _memory_words(by_length: dict[int, dict[str, Point]], longest: int, best: Point) -> str:
    """How both grow with the length, by measurement."""
    standard = by_length[longest]["standard"]
    if not best.peak_bytes or not standard.peak_bytes:
        return ""
    said = (
        f"Beyond its inputs it holds {bytes_in_words(best.peak_bytes)}, standard attention "
        f"{bytes_in_words(standard.peak_bytes)}, {standard.peak_bytes / best.peak_bytes:.3g} times as much"
    )
    before = by_length.get(longest // 2, {})
    if "standard" in before and best.backend in before and before[best.backend].peak_bytes:
        grown = standard.peak_bytes / before["standard"].peak_bytes
        said += (
            f"; from {longest // 2:,} to {longest:,} tokens that grew {grown:.1f}-fold, and its own "
            f"{best.peak_bytes / before[best.backend].peak_bytes:.1f}-fold"
        )
    return f"{said}."


def _alone(points: tuple[Point, ...], why_above: str) -> str:
    """Without standard attention to compare with: the fastest at the longest length."""
    if not points:
        return ""
    longest = max(point.length for point in points)
    best = min((point for point in points if point.length == longest), key=lambda point: point.median_ms)
    said = f"At {longest:,} tokens {best.label} takes {best.median_ms:.3g} ms: {best.tflops:.3g} TFLOP/s, "
    if best.peak_share > _flash_cost.ABOVE:
        return f"{said}more than the large product reached here, {why_above}."
    return f"{said}{best.peak_share:.0%} of what a large product reaches here."


def _ends(stops: tuple[Stop, ...]) -> str:
    return " ".join(f"{stop.label}: {stop.reason}" for stop in stops if stop.kind != "cannot")


def _overlap(one: Point, other: Point) -> bool:
    return one.low_ms <= other.high_ms and other.low_ms <= one.high_ms
