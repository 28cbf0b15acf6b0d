"""One new query against a long cache: so little arithmetic that memory sets the pace, if the cache is read in parts.

Legend: B batch, H heads, G key/value heads, T tokens in the cache, d head width, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from engine.errors import DoesNotFitError
from engine.experiments import ExperimentParams
from engine.experiments._ending import Ending, stopped
from engine.experiments._flash import (
    BACKENDS,
    ELEMENT_BYTES,
    GB,
    RUNS_WORDS,
    BackendName,
    Dtype,
    Peaks,
    Stop,
    bytes_in_words,
)
from engine.experiments._flash_cost import SAFE

if TYPE_CHECKING:
    from engine.experiments._flash_cache import Way
    from engine.measure import Evidence
    from engine.runtime.jobs import Job

_FAR = 0.5
"""Below this share of a copy's speed, memory is not what most of the time goes into."""

MIN_LENGTH = 1024
MAX_LENGTH = 2**18


class Params(ExperimentParams):
    """A cache, and who reads it."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 900.0
    stop_grace: ClassVar[float] = 60.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    max_length: int = Field(
        16384,
        ge=MIN_LENGTH,
        le=MAX_LENGTH,
        title="Longest cache",
        description=f"Tokens already read. Lengths double from {MIN_LENGTH:,} up to this one.",
    )
    heads: int = Field(8, ge=1, le=64, title="Heads", description="Query heads.")
    kv_heads: int = Field(
        2,
        ge=1,
        le=64,
        title="Key/value heads",
        description="Query heads share them in equal groups: fewer heads, a smaller cache, fewer bytes to read.",
    )
    head_dim: int = Field(
        64, ge=16, le=256, multiple_of=8, title="Head width", description="Numbers in each query, key and value (d)."
    )
    batch: int = Field(1, ge=1, le=64, title="Batch", description="Sequences, each with a cache of its own.")
    dtype: Dtype = Field("float32", title="Number format", description="Of the cache and of the query.")
    splits: int = Field(
        8, ge=1, le=64, title="Splits", description="Parts of the cache that are read side by side, then merged."
    )
    backends: tuple[BackendName, ...] = Field(
        BACKENDS,
        min_length=1,
        max_length=len(BACKENDS),
        title="Backends",
        description="Implementations to measure beside our own split. What does not exist here is left out.",
    )
    runs: int = Field(7, ge=3, le=50, title="Runs a point", description=RUNS_WORDS)
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="Of the random numbers.")

    @field_validator("max_length")
    @classmethod
    def _doubles(cls, length: int) -> int:
        if length & (length - 1):
            below = 1 << (length.bit_length() - 1)
            raise ValueError(
                f"The longest cache is {length:,} tokens, and lengths double from {MIN_LENGTH:,}: choose {below:,} or "
                f"{min(2 * below, MAX_LENGTH):,}."
            )
        return length

    @model_validator(mode="after")
    def _groups(self) -> Params:
        if self.heads % self.kv_heads:
            fitting = ", ".join(str(count) for count in range(1, self.heads + 1) if self.heads % count == 0)
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} key/value heads in equal groups: choose one of "
                f"{fitting}."
            )
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """1024, 2048, … up to the longest."""
        return tuple(MIN_LENGTH << step for step in range((self.max_length // MIN_LENGTH).bit_length()))

    def cache_bytes(self, length: int) -> int:
        """2·B·G·T·d numbers: keys and values."""
        return 2 * self.batch * self.kv_heads * length * self.head_dim * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Point:
    """One way at one length.

    Args:
        backend, label: which, and what it is called; ``"split"`` is our own, ``"whole"`` the same without splits.
        length: T.
        median_ms, low_ms, high_ms: of the timed runs: median, 10th and 90th percentile.
        runs: how many were timed.
        cache_bytes: of keys and values, which have to be read once.
        bandwidth: `cache_bytes` / the median, in bytes/s.
        bandwidth_share: of the measured speed of a large copy; above 1 where a processor's cache holds it all, and
            where reading alone is faster than copying.
    """

    backend: str
    label: str
    length: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    cache_bytes: int
    bandwidth: float
    bandwidth_share: float


@dataclass(frozen=True)
class Merge:
    """How the parts of the shortest cache are put together, for query head 0 of the first sequence.

    Args:
        starts: (S,), the first token of each part; `length` is where the last ends.
        length: T.
        maximum: (S,), the largest score m of the part.
        sum: (S,), l = Σ exp(score − m) of the part.
        rescale: (S,), exp(m − the largest m).
        share: (S,), the part's share of the whole: rescale · l / Σ rescale · l.
        logsumexp: of all scores: M + log Σ rescale · l.
        difference: largest absolute difference between the merged output and the whole's, in float64, all heads.
    """

    starts: np.ndarray
    length: int
    maximum: np.ndarray
    sum: np.ndarray
    rescale: np.ndarray
    share: np.ndarray
    logsumexp: float
    difference: float


@dataclass(frozen=True)
class Result:
    """The points so far.

    Args:
        points: in the order in which they were measured: by length, then backend.
        merge: the split's arithmetic.
        stops, absent: as `flash_speed.Result`'s.
        total: points that there are to be, stops included.
        peaks: of the device.
        on_gpu: whether it ran on one.
        evidence: how it was measured, a line each.
        ended, ending: whether all points are there, and why not.
        sentence: what the points show.
        device: its name.
        versions: of what took part.
    """

    points: tuple[Point, ...]
    merge: Merge
    stops: tuple[Stop, ...]
    absent: dict[str, str]
    total: int
    peaks: Peaks
    on_gpu: bool
    evidence: tuple[str, ...]
    ended: Ending
    ending: str
    sentence: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Read the shortest cache in every way, then the next, until the longest, or a cancellation.

    Raises:
        DoesNotFitError: the longest cache does not fit; the message says which does.
    """
    from engine import memory
    from engine.experiments._flash_cache import list_ways
    from engine.experiments._flash_sweep import attempt, describe, measure_peaks
    from engine.measure import device_name, versions

    _check_fits(params, memory.free(job.device))
    where, software = device_name(job.device), versions()
    ways, absent = list_ways(params, job.device)
    peaks = measure_peaks(job.device, params.dtype)
    merged = _merge(params, job.device)
    total = len(ways) * len(params.lengths)
    on_gpu = job.device.startswith("cuda")
    points: list[Point] = []
    stops: list[Stop] = []
    last = ""

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            points=tuple(points),
            merge=merged,
            stops=tuple(stops),
            absent=absent,
            total=total,
            peaks=peaks,
            on_gpu=on_gpu,
            evidence=(*((f"last point: {last}",) if last else ()), *peaks.evidence),
            ended=ended,
            ending=ending,
            sentence=describe_points(params, tuple(points), on_gpu=on_gpu),
            device=where,
            versions=software,
        )

    def draft() -> Result:
        return result("running", f"{len(points) + len(stops)} of {total} points so far.")

    for index, length in enumerate(params.lengths):
        for way in list(ways):
            if job.cancelled:
                ended, words = stopped(params, job)
                done = len(points) + len(stops)
                return result(ended, f"{words} after {done} of {total} points, which are shown.")
            found = _too_much(params, way, length, memory.free(job.device)) or attempt(
                lambda way=way, length=length: _measure(params, way, length, job.device),
                way.name,
                way.label,
                length,
                job.device,
            )
            if isinstance(found, Stop):
                stops.append(found)
                ways.remove(way)
                total -= len(params.lengths) - index - 1
            else:
                points.append(_point(params, way, length, found, peaks))
                last = f"{way.label}, {describe(found)}"
            job.report(len(points) + len(stops), total, tokens=length)
            job.show(draft)
    return result("finished", f"All {total} points are there.")


def _measure(params: Params, way: Way, length: int, device: str) -> Evidence:
    from engine.experiments._flash_cache import draw_cache
    from engine.measure import measure_time

    Q, K, V = draw_cache(params, length, device)
    groups = f"{params.heads} heads on {params.kv_heads}"
    return measure_time(
        lambda: way.run(Q, K, V),
        device,
        dtype=Q.dtype,
        shape=f"one query, {params.batch} × {groups} × {length:,} tokens × {params.head_dim}",
        runs=params.runs,
    )


def _point(params: Params, way: Way, length: int, evidence: Evidence, peaks: Peaks) -> Point:
    nbytes = params.cache_bytes(length)
    bandwidth = nbytes / evidence.median_ms * 1e3
    return Point(
        backend=way.name,
        label=way.label,
        length=length,
        median_ms=evidence.median_ms,
        low_ms=evidence.low_ms,
        high_ms=evidence.high_ms,
        runs=evidence.runs,
        cache_bytes=nbytes,
        bandwidth=bandwidth,
        bandwidth_share=bandwidth / peaks.bandwidth,
    )


def _merge(params: Params, device: str) -> Merge:
    """The split's arithmetic in float64, on the shortest cache."""
    from engine.attention import attend
    from engine.experiments._flash_cache import draw_cache
    from engine.flash.split import attend_parts, merge

    length = params.lengths[0]
    Q, K, V = (tensor.double() for tensor in draw_cache(params, length, device))
    parts = attend_parts(Q, K, V, params.splits)
    merged = merge(parts)
    maximum, total, rescale = (
        tensor[0, 0, :, 0].cpu().numpy() for tensor in (parts.maximum, parts.sum, merged.rescale)
    )
    return Merge(
        starts=np.array(parts.starts),
        length=length,
        maximum=maximum,
        sum=total,
        rescale=rescale,
        share=rescale * total / (rescale * total).sum(),
        logsumexp=merged.logsumexp[0, 0, 0].item(),
        difference=(merged.output - attend(Q, K, V)[0]).abs().max().item(),
    )


def _check_fits(params: Params, free: int) -> None:
    fitting = [length for length in params.lengths if _needed(params, length) <= SAFE * free]
    if len(fitting) == len(params.lengths):
        return
    way_out = (
        f"the longest that fits is {fitting[-1]:,} tokens"
        if fitting
        else "none fits, choose a smaller batch or fewer key/value heads"
    )
    raise DoesNotFitError(
        f"A cache of {params.max_length:,} tokens takes {params.cache_bytes(params.max_length) / GB:.1f} GB, and "
        f"{free / GB:.1f} GB are free: {way_out}."
    )


def _needed(params: Params, length: int) -> int:
    """The cache and, for our own split, scores and their exponentials; half precision is widened."""
    widened = 3 if ELEMENT_BYTES[params.dtype] < 4 else 1
    return widened * params.cache_bytes(length) + 12 * params.batch * params.heads * length


def _too_much(params: Params, way: Way, length: int, free: int) -> Stop | None:
    needed = _needed(params, length)
    if way.repeats:
        needed += params.cache_bytes(length) * params.heads // params.kv_heads
    if needed <= SAFE * free:
        return None
    reason = (
        f"Out of memory: it repeats the cache for every head, {length:,} tokens would need {needed / GB:.1f} GB, and "
        f"{free / GB:.1f} GB are free, so it was not tried."
        if way.repeats
        else f"Out of memory: {length:,} tokens would need {needed / GB:.1f} GB, and {free / GB:.1f} GB are free, so "
        "it was not tried."
    )
    return Stop(way.name, way.label, length, "memory", reason, needed, free)


def _in_gb(bandwidth: float) -> str:
    return f"{bandwidth / GB:,.0f}" if bandwidth >= 100 * GB else f"{bandwidth / GB:.3g}"


def describe_points(params: Params, points: tuple[Point, ...], *, on_gpu: bool) -> str:
    """How near the fastest comes to a copy at the longest length, what splitting did, and what grouping saves."""
    if not points:
        return ""
    longest = max(point.length for point in points)
    row = {point.backend: point for point in points if point.length == longest}
    best = min(row.values(), key=lambda point: point.median_ms)
    equal = [point.label for point in row.values() if point is not best and point.low_ms <= best.high_ms]
    among = f", which these runs cannot tell from {' and '.join(equal)}," if equal else ""
    said = [
        f"One query against {longest:,} tokens reads {bytes_in_words(best.cache_bytes)} of cache. Fastest is "
        f"“{best.label}”{among} with {best.median_ms:.3g} ms: {_in_gb(best.bandwidth)} GB/s, "
        f"{best.bandwidth_share:.0%} of what a large copy reaches here"
        + (f", {_why_above_copy(on_gpu)}." if best.bandwidth_share > 1 else ".")
    ]
    if best.bandwidth_share < _FAR:
        said.append("What is missing is not memory's: starting kernels and arithmetic.")
    else:
        said.append(_others([point for point in row.values() if point is not best], on_gpu))
        said.append(_short_caches(points))
    if "split" in row and "whole" in row:
        said.append(_splitting(params.splits, points))
        if not on_gpu:
            said.append("Splits are for GPUs, where one query alone leaves most multiprocessors idle.")
    groups = params.heads // params.kv_heads
    if groups > 1:
        said.append(
            f"Were keys and values not shared by {groups} heads each, it would be {groups} times as many bytes."
        )
    return " ".join(filter(None, said))


def _why_above_copy(on_gpu: bool) -> str:
    if on_gpu:
        return "which is possible, as reading alone is faster than copying"
    return "more than memory gives, as a processor's own caches hold it"


def _others(others: list[Point], on_gpu: bool) -> str:
    """How near to a copy those come that are not the fastest, and on a GPU why some do not."""
    near = [point for point in others if point.bandwidth_share >= _FAR]
    far = {point.backend: point for point in others if point.bandwidth_share < _FAR}
    said = []
    if near:
        names = " and ".join(f"“{point.label}”" for point in near)
        said.append(f"{names} {'reaches' if len(near) == 1 else 'reach'} {_shares(near)}")
    if far:
        alone = next(iter(far.values())).label if len(far) == 1 else ""
        who = f"“{alone}” stays" if alone else f"{'the' if near else 'The'} other {len(far)} stay"
        whose = "its" if alone else "their"
        said.append(f"{who} at {_shares([*far.values()])}: reading the cache once is not what takes {whose} time")
    why = []
    if on_gpu and far.keys() - {"split"}:
        why.append("A kernel that does not split the keys of one query leaves most multiprocessors idle.")
    if "split" in far:
        why.append("Our own split goes through memory several times.")
    return " ".join([f"{', '.join(said)}.", *why]) if said else ""


def _shares(points: list[Point]) -> str:
    shares = sorted(point.bandwidth_share for point in points)
    least, most = (f"{share:.0%}" for share in (shares[0], shares[-1]))
    return least if least == most else f"{least} to {most}"


def _short_caches(points: tuple[Point, ...]) -> str:
    """Up to which length nobody comes near a copy; only where somebody does at a longer one."""
    near = min(point.length for point in points if point.bandwidth_share >= _FAR)
    below = max((point.length for point in points if point.length < near), default=0)
    if not below:
        return ""
    return f"Up to {below:,} tokens none reaches half: starting kernels and the like take longer than reading."


def _splitting(splits: int, points: tuple[Point, ...]) -> str:
    """What splitting did at the longest length, and at which shorter ones it did the opposite."""
    whole, split = ({point.length: point for point in points if point.backend == name} for name in ("whole", "split"))
    ratios = {length: _speedup(whole[length], split[length]) for length in whole.keys() & split.keys()}
    longest = max(ratios)
    ratio = ratios[longest]
    change = (
        "as fast, as far as these runs show,"
        if ratio == 1
        else f"{ratio:.1f} times faster"
        if ratio > 1
        else f"{1 / ratio:.1f} times slower"
    )
    said = f"At {longest:,} tokens our own split is {change} in {splits} parts {'as' if ratio == 1 else 'than'} in one"
    opposite = sorted(length for length, other in ratios.items() if (other > 1 if ratio < 1 else other < 1))
    if opposite:
        at = " and ".join(f"{length:,}" for length in opposite)
        said += f"; at {at} it is {'faster' if ratio < 1 else 'slower'}"
    return f"{said}."


def _speedup(whole: Point, split: Point) -> float:
    """How many times as fast the split is; 1 where the spreads overlap."""
    overlap = whole.low_ms <= split.high_ms and split.low_ms <= whole.high_ms
    return 1.0 if overlap else whole.median_ms / split.median_ms
