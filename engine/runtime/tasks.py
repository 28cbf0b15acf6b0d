"""The worker's side: runs one experiment as a Dask task, streams its progress, and can be told to stop."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distributed import Nanny, Worker, get_worker

from engine import experiments, memory
from engine.errors import JobFailedError, WorkbenchError
from engine.runtime import devices, warmup
from engine.runtime.jobs import Progress
from engine.runtime.results import weigh

REPORT_INTERVAL = 0.05  # seconds between two reports to the web process, at least
SHOW_INTERVAL = 1.0  # seconds between two partial results, at least
SHOW_SHARE = 0.02  # of a job's time, that making partial results may take
OUT_OF_MEMORY = "The job ran out of memory: choose smaller settings."

Send = Callable[[dict[str, Any]], None]
_jobs: dict[str, WorkerJob] = {}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a result, or with an error that is fit to be shown.

    Args:
        result: what the experiment returned; None if it failed.
        nbytes: what the result weighs.
        error: why there is no result.
        trace: the traceback of an unexpected exception, for the server's log.
        healthy: whether the worker can go on; False after an error that spoils its CUDA context.
    """

    result: Any = None
    nbytes: int = 0
    error: WorkbenchError | None = None
    trace: str | None = None
    healthy: bool = True


class WorkerJob:
    """The handle of a job that runs on a Dask worker.

    Reports go out at most every `REPORT_INTERVAL`. One that comes too early waits, and a newer one takes its place, so
    that a fast loop cannot flood the page and the last report always arrives.

    A partial result is kept here until the web process fetches it: a message only says that there is a new one, for
    Dask's scheduler remembers the last thousand messages. One that comes too early is not even made, as the next step
    brings another.

    Attributes:
        shown: the latest partial result, pickled; None before the first.

    Args:
        device: the torch device to compute on.
        send: hands a message to the web process; safe to call from any thread.
        later: calls a function after some seconds, in one and the same thread.
    """

    def __init__(self, device: str, send: Send, later: Callable[[float, Callable[[], None]], None]) -> None:
        self.device = device
        self.cancelled = self.timed_out = False
        self.shown: bytes | None = None
        self._next_show = 0.0  # on the monotonic clock
        self._send = send
        self._later = later
        self._latest: Progress | None = None
        self._next_report = 0.0  # on the monotonic clock
        self._scheduled = False
        self._lock = threading.Lock()  # the job's thread reports, the event loop sends what had to wait

    def report(self, step: int, total: int, **numbers: float) -> None:
        """Send the progress now, or as soon as the last report is old enough."""
        with self._lock:
            self._latest = Progress(int(step), int(total), {name: float(number) for name, number in numbers.items()})
            wait = self._next_report - time.monotonic()
            if self._scheduled:
                return
            if wait <= 0:
                self._send_latest()
            else:
                self._scheduled = True
                self._later(wait, self.flush)

    def show(self, draft: Callable[[], Any]) -> None:
        """Keep what `draft` makes as the latest partial result and say so, unless the last one is too young."""
        began = time.monotonic()
        if began < self._next_show:
            return
        result = draft()
        weigh(result)  # raises where a part is not plain
        self.shown = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        ended = time.monotonic()
        self._next_show = ended + max(SHOW_INTERVAL, (ended - began) / SHOW_SHARE)
        self._send({"shown": True})

    def flush(self) -> None:
        """Send the newest report if it has not been sent."""
        with self._lock:
            self._scheduled = False
            self._send_latest()

    def _send_latest(self) -> None:
        if self._latest is not None:
            self._send({"step": self._latest.step, "total": self._latest.total, "numbers": self._latest.numbers})
            self._latest = None
            self._next_report = time.monotonic() + REPORT_INTERVAL


def perform(run: str, topic: str, name: str, values: dict[str, Any]) -> Outcome:
    """Run the experiment `name` with parameter `values`; its messages go to the Dask `topic`, marked with `run`.

    The first message says ``begun``, in which process, one that says ``shown`` is about a partial result, which `shown`
    gives, the others are reports; Dask adds the address of the ``worker`` to each.
    """
    warmup.wait()
    worker = get_worker()
    memory.limit_host(worker.memory_manager.memory_limit)

    def send(message: dict[str, Any]) -> None:
        worker.log_event(topic, {"run": run, **message})

    def later(seconds: float, function: Callable[[], None]) -> None:
        worker.loop.add_callback(worker.loop.call_later, seconds, function)

    job = WorkerJob(devices.torch_device(), send, later)
    _jobs[run] = job
    send({"begun": os.getpid()})
    try:
        return attempt(name, values, job)
    finally:
        job.flush()
        del _jobs[run]


def attempt(name: str, values: dict[str, Any], job: WorkerJob) -> Outcome:
    """Run the experiment `name`; whatever it raises becomes a sentence."""
    try:
        experiment = experiments.get(name)
        params = experiment.Params(**values)
        devices.check_fits(params.memory_bytes(), job.device)
        result = experiment.run(params, job)
        if params.lane == "long":
            _free_cached_memory(job.device)
        return Outcome(result=result, nbytes=weigh(result))
    except WorkbenchError as error:
        return Outcome(error=error)
    except (Exception, SystemExit) as error:
        out_of_memory, trace = _is_out_of_memory(error), traceback.format_exc()
        sentence = f"The job failed with {type(error).__name__}: {str(error).strip() or 'no message'}"
    # Only here, where the exception no longer holds the frames and with them their tensors, can memory be given back.
    healthy = _is_healthy(job.device)
    if out_of_memory:
        if healthy:
            _free_cached_memory(job.device)
        return Outcome(error=JobFailedError(OUT_OF_MEMORY), healthy=healthy)
    return Outcome(error=JobFailedError(f"{sentence.rstrip('.')}."), trace=trace, healthy=healthy)


def stop(run: str, timed_out: bool = False) -> None:
    """Ask a job of this worker to stop; runs in the worker's event loop, beside the job's thread."""
    job = _jobs.get(run)
    if job is not None:
        job.timed_out = timed_out  # first: the job looks at it once it is cancelled
        job.cancelled = True


def shown(run: str) -> bytes | None:
    """The latest partial result of a job of this worker, pickled; None if there is none or the job has ended."""
    job = _jobs.get(run)
    return None if job is None else job.shown


def kill(dask_worker: Nanny) -> None:
    """Kill the worker of this nanny at once; the nanny then starts a new one."""
    if dask_worker.pid is not None:
        os.kill(dask_worker.pid, signal.SIGKILL)


async def describe(dask_worker: Worker) -> devices.DeviceInfo:
    """The device of this worker; in a thread, as it may have to import torch first."""

    def ask() -> devices.DeviceInfo:
        warmup.wait()
        memory.limit_host(dask_worker.memory_manager.memory_limit)
        return devices.describe()

    return await asyncio.to_thread(ask)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _is_healthy(device: str) -> bool:
    """False if the CUDA context is spoiled: every later call in this process would fail as well."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _free_cached_memory(device: str) -> None:
    """Give the allocator's unused blocks back: the other lane's worker shares the GPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
