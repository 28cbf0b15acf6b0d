"""The only place that times or weighs anything.

A figure is worth as much as what is known about how it was taken, so every measurement comes with its `Evidence`:
device, dtype, versions, warm-up, number of runs, median and spread. Measurements wait for each other, but not for those
that they are part of; what else runs on the device meanwhile, such as another learner's slider, is not held up and
shows in the spread.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock


@dataclass(frozen=True)
class Evidence:
    """How long something took, and how that is known.

    Args:
        median_ms: median of the timed runs, in milliseconds.
        low_ms: their 10th percentile.
        high_ms: their 90th percentile.
        runs: how many were timed.
        warmup: what came before and was not, in words.
        device: its name.
        dtype: of the numbers, e.g. ``"float32"``.
        shape: what was computed, in words.
        versions: of what took part, by name.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    warmup: str
    device: str
    dtype: str
    shape: str
    versions: dict[str, str]


def measure_time(
    function: Callable[[], object], device: str, *, dtype: torch.dtype, shape: str, runs: int = 10
) -> Evidence:
    """Time `function` on `device`, alone, after a warm-up.

    The CPU is timed by `timeit`, which holds garbage collection back, for `runs` runs after two that do not count
    (`torch.utils.benchmark` would warm up twice before each). CUDA is timed by events in `triton.testing.do_bench`,
    which empties the L2 cache between runs, for 25 ms that do not count and 10 ms times `runs` that do.

    Args:
        function: what to time; it must leave its work on `device`.
        device: torch device, e.g. ``"cpu"`` or ``"cuda:0"``.
        dtype: of the numbers, for the record.
        shape: what is computed, for the record.
        runs: how many runs are timed on the CPU, at least 3.

    Returns:
        `Evidence` with the median and the 10th and 90th percentile of the runs.

    Raises:
        ValueError: fewer than 3 runs, of which no spread can be given.
    """
    if runs < 3:
        raise ValueError(f"runs ({runs}) must be at least 3: fewer have no spread")
    with exclusive(device):
        if torch.device(device).type == "cuda":
            times, warmup = _times_cuda(function, device, runs), "25 ms"
        else:
            times, warmup = _times_cpu(function, runs), "2 runs"
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Evidence(
        median_ms=statistics.median(times),
        low_ms=deciles[0],
        high_ms=deciles[-1],
        runs=len(times),
        warmup=warmup,
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        versions=versions(),
    )


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at its best, as measured: the roof and the slope of its roofline.

    Both are of the 10th percentile of the runs: a ceiling is what undisturbed runs reach.

    Args:
        flops: FLOP/s of a large square matrix product.
        bandwidth: bytes/s of a large copy, those read and those written.
        product: evidence of the product.
        copy: evidence of the copy.
    """

    flops: float
    bandwidth: float
    product: Evidence
    copy: Evidence


_highest: dict[tuple[str, torch.dtype], Ceilings] = {}


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings; of all measurements in this process the best counts, as other work can only slow it down.

    A GPU multiplies 8192 × 8192 matrices (2 · 8192³ FLOPs) and copies 1 GiB. A CPU copies 128 MiB, which is more than
    caches hold, and multiplies 1024 × 1024; smaller ones where even those take long, as some do in float16. The second
    matrix lies row by row or column by column, whichever is faster.

    Args:
        device: torch device.
        dtype: of the numbers.
    """
    key = (str(torch.device(device)), dtype)
    found = _measure_ceilings(*key)
    best = _highest.get(key, found)
    product = max(found, best, key=lambda one: one.flops)
    copy = max(found, best, key=lambda one: one.bandwidth)
    _highest[key] = Ceilings(product.flops, copy.bandwidth, product.product, copy.copy)
    return _highest[key]


def _measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    on_gpu = torch.device(device).type == "cuda"
    side, last, nbytes = (8192, 8192, 2**30) if on_gpu else (128, 1024, 2**27)
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        shape = f"product of two {side} × {side} matrices"
        products = [
            measure_time(functools.partial(torch.mm, a, each), device, dtype=dtype, shape=shape, runs=5)
            for each in (b, b.mT)
        ]
        product = min(products, key=lambda one: one.low_ms)
        if side == last or product.median_ms > 5:
            break
        side *= 2
    source = torch.ones(nbytes // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    shape = f"copy of {nbytes // 2**20} MiB"
    copy = measure_time(functools.partial(target.copy_, source), device, dtype=dtype, shape=shape, runs=5)
    return Ceilings(2 * side**3 / product.low_ms * 1e3, 2 * source.nbytes / copy.low_ms * 1e3, product, copy)


def peak_memory(function: Callable[[], object], device: str, *, alone: bool = True) -> int:
    """Bytes that `function` allocates at its peak, beyond what was there: CUDA's allocator, the CPU's profiler.

    Garbage is collected first: what stood in cycles, as bitsandbytes' 4-bit weights do, and was freed on the way would
    otherwise be subtracted.

    Args:
        function: what to weigh.
        device: torch device.
        alone: whether to hold the device; not where `function` includes measurements that are made only while nothing
            else is being measured, as `FlashAttention` does to choose its kernel.
    """
    with exclusive(device) if alone else nullcontext():
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            function()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
    return _peak_of(profile)


def _peak_of(profile: torch.profiler.profile) -> int:
    """The highest running sum of the profiler's allocations and releases, in bytes."""
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    running = peak = 0
    for _, nbytes in changes:
        running += nbytes
        peak = max(peak, running)
    return peak


@contextmanager
def exclusive(device: str, timeout: float = -1) -> Iterator[None]:
    """Hold the device: the measurements of one user on one host wait for each other, device by device.

    A thread that holds it already goes on at once.

    Args:
        device: torch device.
        timeout: seconds to wait at most; for as long as it takes if negative.

    Raises:
        TimeoutError: another measurement took longer.
    """
    path = lock_path(device)
    with FileLock(path, is_singleton=True).acquire(timeout=timeout):
        _held[path] += 1
        try:
            yield
        finally:
            _held[path] -= 1


_held: Counter[Path] = Counter()
"""How often this process holds a lock now; only who holds it changes that, and a child holds nothing."""
os.register_at_fork(after_in_child=_held.clear)


def is_held(device: str) -> bool:
    """Whether this process holds the device, in whatever thread: a backward pass has threads of its own on a GPU."""
    return _held[lock_path(device)] > 0


def lock_path(device: str) -> Path:
    """The file that stands for the device: one for every GPU, whatever number this process knows it by.

    It is the user's own, since one user may not open another's files in the folder for temporary ones.
    """
    chosen = torch.device(device)
    name = torch.cuda.get_device_properties(chosen).uuid if chosen.type == "cuda" else chosen.type
    return Path(tempfile.gettempdir()) / f"transformer-workbench-{os.getuid()}-{name}.lock"


def device_name(device: str) -> str:
    """What the device is called: the GPU's name, or the processor with its number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of what every measurement depends on; for CUDA, of the installed packages that bring kernels as well."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
        found |= _kernel_packages()
    return found


@functools.cache
def _kernel_packages() -> dict[str, str]:
    found = {}
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = str(importlib.metadata.version(name))
    return found


def _times_cuda(function: Callable[[], object], device: str, runs: int) -> list[float]:
    from triton.testing import do_bench

    with torch.cuda.device(device):
        times = do_bench(function, warmup=25, rep=10 * runs, return_mode="all")
        while len(times) < 3:  # one call outlasts the whole budget
            times += do_bench(function, warmup=0, rep=1, return_mode="all")
    return times


def _times_cpu(function: Callable[[], object], runs: int) -> list[float]:
    timeit.repeat(function, number=1, repeat=2)
    return [1000 * seconds for seconds in timeit.repeat(function, number=1, repeat=runs)]
