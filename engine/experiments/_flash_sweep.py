"""Backends measured at one length after the other: what the FlashAttention lab's speed and roofline share.

Legend: B batch, H heads, T tokens, d head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from engine.errors import InputError
from engine.experiments import _flash_cost
from engine.experiments._flash import GB, Peaks, Stop, SweepParams

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from engine.flash.backends import Backend
    from engine.flash.choice import Errors
    from engine.measure import Evidence
    from engine.runtime.jobs import Job

Found = TypeVar("Found")

POINT_SECONDS = 90.0
"""A point that would take longer is not begun: a cancellation has to wait for it."""

_MARGIN = 1.1
_WORKSPACE = {"cpu": 64 * 2**20, "cuda": 320 * 2**20}
"""Bytes that libraries may want for themselves; on a GPU 256 MiB of it empty the cache between runs."""
_CUDA_CALLS = 26
"""Of a point whose calls are slow: one compiles, one is weighed, and each of up to three benches makes one to begin
with, five to estimate the time, one to warm up and one that counts."""


@dataclass(frozen=True)
class Timing:
    """How long a point took altogether, and each of the runs in it, in seconds, at this length."""

    length: int
    point: float
    run: float


@dataclass(frozen=True)
class Measured:
    """One backend at one length."""

    backend: Backend
    length: int
    evidence: Evidence
    peak_bytes: int


class Sweep:
    """Every backend at the shortest length, then at the next; a backend whose line ends is left out from there.

    Attributes:
        total: points that there are to be, stops included; fewer once a line has ended early.
        absent: backends that take none of the lengths, by label, with the reason.

    Args:
        params: what to measure.
        job: where; it may be stopped between two points.
        peaks: of the device.
        weigh: whether memory is wanted as well.

    Raises:
        InputError: none of the backends takes such a shape here.
    """

    def __init__(self, params: SweepParams, job: Job, peaks: Peaks, *, weigh: bool) -> None:
        import torch

        from engine.flash.backends import BACKENDS

        self._params, self._job, self._peaks, self._weigh = params, job, peaks, weigh
        self._dtype = getattr(torch, params.dtype)
        chosen = [BACKENDS[name] for name in dict.fromkeys(params.backends)]
        refused = {backend.name: [self._why_not(backend, T) for T in params.lengths] for backend in chosen}
        self._backends = [backend for backend in chosen if not all(refused[backend.name])]
        self.absent = {backend.label: refused[backend.name][0] for backend in chosen if all(refused[backend.name])}
        if not self._backends:
            reasons = " ".join(f"{label}: {reason}" for label, reason in self.absent.items())
            raise InputError(f"None of the chosen backends can compute this here, so choose others as well. {reasons}")
        self.total = len(self._backends) * len(params.lengths)
        self._started = time.perf_counter()
        self._length = params.lengths[0]
        self._last: dict[str, Timing] = {}  # by backend, of those that go on

    def correct(self) -> set[str]:
        """Backends, by name, that err at most twice as much as standard attention; asked at the shortest length.

        It is the rule of `engine.flash.choice`; one that fails is not correct.
        """
        import torch

        from engine.flash.backends import BACKENDS
        from engine.flash.choice import error_against_reference

        params = self._params
        generator = torch.Generator(self._job.device).manual_seed(0)
        inputs = [tensor.detach() for tensor in self._draw(params.lengths[0], generator)[:3]]

        def errors(backend: Backend) -> Errors | None:
            try:
                return error_against_reference(backend, *inputs, causal=params.causal, grad=params.grad)
            except Exception:  # what was measured is worth more than what can be said of it
                return None

        baseline = errors(BACKENDS["standard"])
        if baseline is None:
            return set()
        found = {backend.name: errors(backend) for backend in self._backends}
        return {name for name, one in found.items() if one is not None and one.within(baseline, self._dtype)}

    def __iter__(self) -> Iterator[Measured | Stop]:
        """Points and stops as they come; ends early if the job is to stop."""
        going = list(self._backends)
        lengths = self._params.lengths
        for index, length in enumerate(lengths):
            self._length = length
            for backend in list(going):
                if self._job.cancelled:
                    return
                start = time.perf_counter()
                found = self._point(backend, length)
                if isinstance(found, Measured):
                    point, run = time.perf_counter() - start, found.evidence.median_ms / 1e3
                    self._last[backend.name] = Timing(length, point, run)
                elif found.kind != "cannot":
                    going.remove(backend)
                    self._last.pop(backend.name, None)
                    self.total -= len(lengths) - index - 1
                yield found

    def share_of_time(self) -> dict[str, float]:
        """For a progress report, once it can be told: lengths double, and the last of them take most of the time.

        A point to come takes what its backend's last one took, and its runs longer by as much as there is more to do. A
        GPU is timed for as long at every length, so that there all points take alike.
        """
        if self._on_gpu or self._length == self._params.lengths[0]:
            return {}
        elapsed = time.perf_counter() - self._started
        to_come = sum(
            self._seconds(last, length)
            for last in self._last.values()
            for length in self._params.lengths
            if length > last.length
        )
        return {"share_of_time": elapsed / (elapsed + to_come)}

    def _seconds(self, last: Timing, length: int) -> float:
        grown = _flash_cost.flops(self._params, length) / _flash_cost.flops(self._params, last.length)
        more = self._calls * last.run * (grown - 1)
        return last.point + more if self._calls * last.run * grown <= POINT_SECONDS else 0.0

    @property
    def _calls(self) -> int:
        """Runs of a point whose calls are slow; on a processor one is weighed, two warm up, one may be a forward."""
        return _CUDA_CALLS if self._on_gpu else self._params.runs + 4

    @property
    def _on_gpu(self) -> bool:
        return self._job.device.startswith("cuda")

    def _point(self, backend: Backend, length: int) -> Measured | Stop:
        if (reason := self._why_not(backend, length)) is not None:
            return Stop(backend.name, backend.label, length, "cannot", reason)
        if (stop := self._too_much(backend, length) or self._too_long(backend, length)) is not None:
            return stop
        return attempt(lambda: self._measure(backend, length), backend.name, backend.label, length, self._job.device)

    def _measure(self, backend: Backend, length: int) -> Measured:
        import torch

        from engine import measure

        params, device = self._params, self._job.device
        batch = params.batch_at(length)
        *inputs, upstream = self._draw(length)

        def forward() -> Tensor:
            return backend.run(*inputs, params.causal, None)

        def both() -> object:
            return torch.autograd.grad(forward(), inputs, upstream)

        whole = both if params.grad else forward
        if self._on_gpu:
            whole()  # compiles and plans; what the libraries keep from that is not the pass's peak
        peak = measure.peak_memory(whole, device) if self._weigh else 0
        timed: Callable[[], object] = whole
        if params.direction == "backward":
            output = forward()

            def timed() -> object:
                return torch.autograd.grad(output, inputs, upstream, retain_graph=True)

        evidence = measure.measure_time(
            timed,
            device,
            dtype=self._dtype,
            shape=f"{params.direction}, {batch} × {params.heads} heads × {length:,} tokens × {params.head_dim}"
            + ", causal" * params.causal,
            runs=params.runs,
        )
        return Measured(backend, length, evidence, peak)

    def _draw(self, length: int, generator: Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Q, K, V and, for gradients, that of the output: all (B, H, T, d)."""
        import torch

        params = self._params
        shape = (params.batch_at(length), params.heads, length, params.head_dim)
        look = {"device": self._job.device, "dtype": self._dtype, "generator": generator}
        Q, K, V = (torch.randn(shape, **look, requires_grad=params.grad) for _ in range(3))
        return Q, K, V, torch.randn(shape, **look) if params.grad else None

    def _why_not(self, backend: Backend, length: int) -> str | None:
        from engine.flash.backends import Case

        params = self._params
        shape = (params.head_dim, length, length, params.causal)
        return backend.why_not(Case(self._job.device, self._dtype, *shape, grad=params.grad, grouped=False))

    def _too_much(self, backend: Backend, length: int) -> Stop | None:
        from engine import memory

        held = _flash_cost.held_bytes(self._params, backend.name, length, on_gpu=self._on_gpu)
        needed = _flash_cost.input_bytes(self._params, length) + round(_MARGIN * held)
        needed += _WORKSPACE[self._job.device.split(":")[0]]
        free = memory.free(self._job.device)
        if needed <= _flash_cost.SAFE * free:
            return None
        reason = (
            f"Out of memory: {length:,} tokens would need {needed / GB:.1f} GB, and {free / GB:.1f} GB are free, so it "
            "was not tried."
        )
        return Stop(backend.name, backend.label, length, "memory", reason, needed, free)

    def _too_long(self, backend: Backend, length: int) -> Stop | None:
        seconds = _flash_cost.least_ms(self._params, _flash_cost.model_of(backend.name), length, self._peaks) / 1e3
        if (last := self._last.get(backend.name)) is not None:
            grown = _flash_cost.flops(self._params, length) / _flash_cost.flops(self._params, last.length)
            seconds = max(seconds, last.run * grown)
        if self._calls * seconds <= POINT_SECONDS:
            return None
        reason = (
            f"{length:,} tokens would take about {seconds:.0f} s a run, too long for {self._calls} calls: it was not "
            "tried."
        )
        return Stop(backend.name, backend.label, length, "time", reason)


def attempt(function: Callable[[], Measured], name: str, label: str, length: int, device: str) -> Measured | Stop:
    """What `function` measures, or a stop that says how it failed; others can go on.

    Raises:
        RuntimeError: it has spoiled the GPU for this process, so that nothing can go on.
    """
    import torch

    try:
        return function()
    except torch.cuda.OutOfMemoryError:
        reason = f"Out of memory at {length:,} tokens: it took more than was predicted."
    except Exception as error:
        said = str(error).strip().split("\n")[0].rstrip(".") or "it said no more"
        reason = f"It failed at {length:,} tokens with {type(error).__name__}: {said}."
    if device.startswith("cuda"):  # here, where the exception no longer holds its tensors
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise RuntimeError(f"{label} spoiled the GPU for this process at {length:,} tokens") from error
        torch.cuda.empty_cache()
    return Stop(name, label, length, "failed", reason)


def measure_peaks(device: str, dtype: str) -> Peaks:
    """Both ceilings of the device, as plain numbers."""
    import torch

    from engine import measure

    found = measure.ceilings(device, getattr(torch, dtype))
    evidence = (describe(found.product), describe(found.copy))
    return Peaks(found.flops, found.bandwidth, evidence)


def describe(evidence: Evidence) -> str:
    """Evidence in a line, e.g. ``"copy of 128 MiB: 21.4 ms (20.9 to 23), median of 5 runs after …, float32"``."""
    return (
        f"{evidence.shape}: {evidence.median_ms:.3g} ms ({evidence.low_ms:.3g} to {evidence.high_ms:.3g}), median of "
        f"{evidence.runs} runs after a warm-up of {evidence.warmup}, {evidence.dtype}"
    )
