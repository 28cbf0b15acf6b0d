"""The roofline of this device, and every backend's runs on it: FLOP a byte against FLOP a second.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engine.experiments import _flash_cost
from engine.experiments._ending import Ending, stopped
from engine.experiments._flash import RUNS_WORDS, Peaks, Stop, SweepParams, why_above_peak

if TYPE_CHECKING:
    from engine.experiments import flash_speed
    from engine.runtime.jobs import Job


_FAR = 0.3
"""Below this share of the roof, neither arithmetic nor memory is what holds a kernel up."""


class Params(SweepParams):
    """The settings of the sweep."""

    runs: int = Field(3, ge=3, le=50, title="Runs a point", description=RUNS_WORDS)


@dataclass(frozen=True)
class Point:
    """One backend at one length.

    Args:
        backend, label: which, and what it is called.
        model: by which model its bytes are counted: ``"standard"`` or ``"flash"``.
        length, batch: T and B.
        flops: that the pass takes, the mask's saving counted.
        moved_bytes: between memory and chip, as `_flash_cost.moved_bytes` models it.
        intensity: `flops` / `moved_bytes`.
        flops_per_second, low, high: reached: at the median time, at the 90th and at the 10th percentile.
        roof: FLOP/s at this intensity by the device's measured peaks. `flops_per_second` may be above it where caches
            serve what is counted as memory, or a kernel is faster than the large product.
    """

    backend: str
    label: str
    model: str
    length: int
    batch: int
    flops: float
    moved_bytes: float
    intensity: float
    flops_per_second: float
    low: float
    high: float
    roof: float


@dataclass(frozen=True)
class Path:
    """How the modelled intensity moves with the length.

    Args:
        name, label: ``"standard"`` or ``"flash"``, and in words.
        lengths: (N,).
        intensity: (N,), FLOP a byte.
    """

    name: str
    label: str
    lengths: np.ndarray
    intensity: np.ndarray


@dataclass(frozen=True)
class Result:
    """The roof and the points under it.

    Args:
        peaks: of the device; its `ridge` is where the two roofs meet.
        points: in the order in which they were measured.
        stops, absent: as `flash_speed.Result`'s.
        total: points that there are to be, stops included.
        memory: which memory the bytes are counted to, in a sentence.
        on_gpu: whether it ran on one.
        evidence: how it was measured, a line each.
        ended, ending: whether all points are there, and why not.
        sentence: what the picture shows.
        device: its name.
        versions: of what took part.
    """

    peaks: Peaks
    points: tuple[Point, ...]
    stops: tuple[Stop, ...]
    absent: dict[str, str]
    total: int
    memory: str
    on_gpu: bool
    evidence: tuple[str, ...]
    ended: Ending
    ending: str
    sentence: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Measure the roof, then the sweep.

    Raises:
        DoesNotFitError: the longest sequence would not fit even without the T × T matrix.
    """
    from engine import memory
    from engine.experiments._flash_sweep import Measured, Sweep, measure_peaks
    from engine.measure import device_name, versions

    on_gpu = job.device.startswith("cuda")
    _flash_cost.check_fits(params, memory.free(job.device), on_gpu=on_gpu)
    where, software = device_name(job.device), versions()
    peaks = measure_peaks(job.device, params.dtype)
    sweep = Sweep(params, job, peaks, weigh=False)
    points: list[Point] = []
    stops: list[Stop] = []

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            peaks=peaks,
            points=tuple(points),
            stops=tuple(stops),
            absent=sweep.absent,
            total=sweep.total,
            memory=_memory_words(on_gpu),
            on_gpu=on_gpu,
            evidence=(*peaks.evidence, f"every point: median of {_runs_in_words(params, on_gpu)}, {params.direction}"),
            ended=ended,
            ending=ending,
            sentence=_describe(params, peaks, tuple(points), on_gpu=on_gpu),
            device=where,
            versions=software,
        )

    job.report(0, sweep.total)
    job.show(lambda: result("running", "The roof was measured."))
    for found in sweep:
        if isinstance(found, Measured):
            backend, taken = found.backend, found.evidence
            times = (taken.median_ms, taken.low_ms, taken.high_ms)
            points.append(_point(params, backend.name, backend.label, found.length, times, peaks))
        else:
            stops.append(found)
        job.report(len(points) + len(stops), sweep.total, tokens=found.length, **sweep.share_of_time())
        job.show(lambda: result("running", f"{len(points) + len(stops)} of {sweep.total} points so far."))
    if (done := len(points) + len(stops)) < sweep.total:
        ended, words = stopped(params, job)
        return result(ended, f"{words} after {done} of {sweep.total} points, which are shown.")
    return result("finished", f"All {sweep.total} points are there.")


def predict_paths(params: SweepParams) -> tuple[Path, ...]:
    """Where both models lie on the axis of intensity at every length; needs no torch."""
    return tuple(
        Path(
            name,
            label,
            np.array(params.lengths),
            np.array(
                [
                    _flash_cost.flops(params, length) / _flash_cost.moved_bytes(params, name, length)
                    for length in params.lengths
                ]
            ),
        )
        for name, label in _flash_cost.LABELS.items()
    )


def intensity_in_words(intensity: float) -> str:
    """E.g. ``"15.9"``, ``"4,060"``."""
    return f"{intensity:,.0f}" if intensity >= 100 else f"{intensity:.3g}"


def describe_paths(paths: tuple[Path, ...]) -> str:
    """How far both models move from the shortest to the longest sequence."""
    lengths = paths[0].lengths
    moves = [
        f"{path.label} from {intensity_in_words(path.intensity[0])} to {intensity_in_words(path.intensity[-1])} "
        f"(× {path.intensity[-1] / path.intensity[0]:.1f})"
        for path in paths
    ]
    return (
        f"By arithmetic alone, from {lengths[0]:,} to {lengths[-1]:,} tokens the FLOP for each byte moved change for "
        f"{' and for '.join(moves)}."
    )


def below_roof(params: SweepParams, found: flash_speed.Result) -> Result:
    """The points of a sweep that was timed before, below the roof of its device; needs no torch."""
    points = tuple(
        _point(params, one.backend, one.label, one.length, (one.median_ms, one.low_ms, one.high_ms), found.peaks)
        for one in found.points
    )
    return Result(
        peaks=found.peaks,
        points=points,
        stops=found.stops,
        absent=found.absent,
        total=found.total,
        memory=_memory_words(found.on_gpu),
        on_gpu=found.on_gpu,
        evidence=found.evidence,
        ended=found.ended,
        ending=found.ending,
        sentence=_describe(params, found.peaks, points, on_gpu=found.on_gpu),
        device=found.device,
        versions=found.versions,
    )


def _point(
    params: SweepParams, backend: str, label: str, length: int, times: tuple[float, float, float], peaks: Peaks
) -> Point:
    """A backend at a length that takes `times`: the median, the 10th and the 90th percentile, in milliseconds."""
    model, (median, low, high) = _flash_cost.model_of(backend), times
    flops = _flash_cost.flops(params, length)
    moved = _flash_cost.moved_bytes(params, model, length)
    intensity = flops / moved
    return Point(
        backend=backend,
        label=label,
        model=model,
        length=length,
        batch=params.batch_at(length),
        flops=flops,
        moved_bytes=moved,
        intensity=intensity,
        flops_per_second=flops / median * 1e3,
        low=flops / high * 1e3,
        high=flops / low * 1e3,
        roof=min(peaks.flops, intensity * peaks.bandwidth),
    )


def _memory_words(on_gpu: bool) -> str:
    counted = (
        "of standard attention every pass over its matrices, of flash attention every tensor once, as caches keep keys "
        "and values while tiles read them again"
    )
    if on_gpu:
        return f"Bytes to and from the GPU's memory (HBM) by a model: {counted}."
    return (
        f"Bytes to and from main memory by a model: {counted}. A processor's caches hold short sequences whole, so "
        "that points can lie above the slope."
    )


def _runs_in_words(params: Params, on_gpu: bool) -> str:
    return f"the runs of {10 * params.runs} ms, three at least" if on_gpu else f"{params.runs} runs"


def _describe(params: SweepParams, peaks: Peaks, points: tuple[Point, ...], *, on_gpu: bool) -> str:
    """Where the roofs meet, and on which side of that the two models' longest points lie."""
    roof = f"This device turns from memory-bound to compute-bound at {peaks.ridge:.3g} FLOP a byte."
    if not points:
        return roof
    said = [roof]
    for model, label in _flash_cost.LABELS.items():
        of_model = [point for point in points if point.model == model]
        if not of_model:
            continue
        length = max(point.length for point in of_model)
        best = max((point for point in of_model if point.length == length), key=lambda point: point.flops_per_second)
        said.append(
            f"At {length:,} tokens {label} does {intensity_in_words(best.intensity)} FLOP for every byte that it is "
            "counted to move"
        )
        if best.flops_per_second > _flash_cost.ABOVE * best.roof:
            said[-1] += f". {_above(best, peaks, why_above_peak(params.dtype, on_gpu=on_gpu))}."
            continue
        side, other = ("memory", "arithmetic") if best.intensity < peaks.ridge else ("arithmetic", "memory")
        said[-1] += f", where {side} and not {other} would be the limit. {_reached(params, best)}."
    return " ".join(said)


def _reached(params: SweepParams, point: Point) -> str:
    """How near the roof a point comes, and what else may hold it up."""
    reached = point.flops_per_second / point.roof
    said = f"{point.label} reaches {reached:.0%} of it"
    if reached >= _FAR:
        return said
    uncounted = "starting kernels and taking exponentials"
    if point.model == "standard":
        uncounted = "starting kernels, taking exponentials and further passes over the matrix"
        uncounted += " such as the mask's" * params.causal
    return (
        f"{said}, far from it, so something else is the limit: too little work to fill the device, or what is not "
        f"counted here, like {uncounted}"
    )


def _above(point: Point, peaks: Peaks, why_above: str) -> str:
    """Why a point is above the roof, where no limit can be told from it."""
    said = (
        f"{point.label} reaches {point.flops_per_second / point.roof:.0%} of what that would allow, so the count does "
        "not hold on this device"
    )
    if point.roof < peaks.flops:
        return f"{said}: caches serve what is counted as memory"
    return f"{said}: that is more than the large product that stands for arithmetic, {why_above}"
