"""The runtime: what the web process calls to have experiments run, from any of its threads."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from distributed import Client, SpecCluster

from engine import experiments
from engine.errors import JobCancelledError, JobFailedError, WorkbenchError
from engine.experiments import ExperimentParams
from engine.runtime import devices, tasks
from engine.runtime.cluster import LANES, close_cluster, create_cluster
from engine.runtime.devices import DeviceInfo
from engine.runtime.dispatch import Dispatcher
from engine.runtime.lanes import Lane
from engine.runtime.results import ResultCache, freeze
from engine.runtime.tasks import Outcome
from engine.runtime.tickets import CANCELLED, Ticket, Work

SCHEDULER_VARIABLE = "WORKBENCH_SCHEDULER"
CONNECT_TIMEOUT = 10.0  # seconds
CLOSE_TIMEOUT = 10.0  # seconds
CARE_INTERVAL = 5.0  # seconds between two looks at the workers
POLL_INTERVAL = 0.2  # seconds between two looks at workers that are starting
CLOSED = "The workbench is shutting down: start it again and repeat the run."

logger = logging.getLogger(__name__)


class Runtime:
    """Runs experiments on a Dask cluster: queues, caches and shares them, follows them, and cleans up behind them.

    Start it with `Runtime.start`, one in a process; all methods are safe to call from any thread.

    Args:
        owner_grace: seconds after `release` until an owner's jobs are dropped.
        cache_bytes: what finished results may weigh together.
    """

    def __init__(self, owner_grace: float = 15.0, cache_bytes: int = 256 * 2**20) -> None:
        self._owner_grace = owner_grace
        self._lock = threading.RLock()  # guards everything below, and every Work
        self._lanes = {name: Lane(name, slots=1) for name in LANES}
        self._cache = ResultCache(cache_bytes)
        self._shared: dict[Hashable, Work] = {}  # queued or running, and still to be shared
        self._tickets: dict[str, set[Ticket]] = {}  # unfinished ones, by owner
        self._leaving: dict[str, Future[None]] = {}  # owners within their grace
        self._closed = False

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="workbench-runtime", daemon=True)
        self._services: set[asyncio.Task[None]] = set()
        self._directory = tempfile.TemporaryDirectory(prefix="workbench-", ignore_cleanup_errors=True)
        self._open: Callable[[], Coroutine[Any, Any, None]]
        self._cluster: SpecCluster | None = None
        self._client: Client | None = None
        self._dispatcher: Dispatcher
        self._devices: Future[tuple[DeviceInfo, ...]] = Future()

    @classmethod
    def start(
        cls,
        scheduler: str | None = None,
        *,
        warm_up: Sequence[str] = (),
        threads: int | None = None,
        memory_limit: int | None = None,
        owner_grace: float = 15.0,
        cache_bytes: int = 256 * 2**20,
    ) -> Runtime:
        """Start a cluster on this machine, or connect to one, and be ready for jobs.

        An existing cluster needs workers with one thread and one of the resources ``short`` and ``long`` each, this
        package importable on all of them and on the scheduler, and ``distributed.scheduler.allowed-failures: 0``.
        Dask's own configuration says which certificates go with a ``tls://`` address.

        Args:
            scheduler: address of a Dask scheduler; by default ``WORKBENCH_SCHEDULER``, and if that is not set either,
                an own cluster is started, with two workers for every GPU, or two for the CPU where there is none.
            warm_up: modules that the workers of an own cluster import when they start.
            threads: processor threads that each of them computes with; by default its device's share of the cores.
            memory_limit: host memory of each of them in bytes; by default an equal share of nine tenths of it.
            owner_grace: see the class.
            cache_bytes: see the class.

        Raises:
            WorkbenchError: the scheduler cannot be reached, or the cluster cannot be started.
        """
        runtime = cls(owner_grace, cache_bytes)
        runtime._thread.start()
        atexit.register(runtime.close)
        scheduler = scheduler or os.environ.get(SCHEDULER_VARIABLE) or None
        if scheduler is None:
            runtime._open = partial(runtime._start_cluster, threads, memory_limit, warm_up)
        else:
            runtime._open = partial(runtime._connect, scheduler)
        try:
            runtime._submit(runtime._open()).result()
        except Exception as error:
            runtime.close()
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if scheduler is None:
                raise WorkbenchError(f"The workers cannot be started: {reason.rstrip('.')}.") from error
            raise WorkbenchError(
                f"The Dask scheduler at {scheduler} cannot be reached ({reason.rstrip('.')}): "
                "check the address, and that it is running."
            ) from error
        runtime._loop.call_soon_threadsafe(runtime._spawn, runtime._take_care())
        runtime._loop.call_soon_threadsafe(runtime._spawn, runtime._describe_devices())
        return runtime

    def submit(self, experiment_name: str, params: ExperimentParams, owner: str) -> Ticket:
        """Have the experiment run, in the lane of its parameters; returns at once.

        If equal parameters with an equal `cache_token` have a result that is still cached, the ticket has it already;
        if they are queued or running, the ticket shares that run.

        Args:
            experiment_name: one of `engine.experiments.names`.
            params: its parameters.
            owner: whose job it is, e.g. a session id; see `release`.

        Raises:
            InputError: there is no such experiment.
            WorkbenchError: the runtime is closed.
        """
        experiments.get(experiment_name)
        key = (experiment_name, params.model_dump_json(), params.cache_token()) if params.cacheable else None
        with self._lock:
            if self._closed:
                raise WorkbenchError(CLOSED)
            self.keep(owner)
            work = self._find(experiment_name, params, key) or self._enqueue(Work(experiment_name, params, key))
            ticket = Ticket(self, work, owner)
            work.join(ticket)
            if work.state != "done":
                self._tickets.setdefault(owner, set()).add(ticket)
            return ticket

    def cancel(self, ticket: Ticket, force: bool = True) -> None:
        """What `Ticket.cancel` does."""
        with self._lock:
            work = ticket.work
            if ticket.state not in ("queued", "running"):
                return
            if len(work.tickets) > 1:
                work.leave(ticket)
                self._forget(ticket)
            elif self._lanes[work.params.lane].drop(work):
                self._finish(work, Outcome(error=JobCancelledError(CANCELLED)))
            else:
                force = force or work.params.lane != "short"
                self._stop(work, JobCancelledError(CANCELLED), force)

    def release(self, owner: str) -> None:
        """The owner has gone: after the grace, cancel all their tickets, unless `keep` or `submit` comes first."""
        with self._lock:
            if owner in self._tickets and owner not in self._leaving and not self._closed:
                self._leaving[owner] = self._submit(self._drop_later(owner))

    def keep(self, owner: str) -> None:
        """The owner is back, or was never really gone."""
        with self._lock:
            leaving = self._leaving.pop(owner, None)
            if leaving is not None:
                leaving.cancel()

    def devices(self, timeout: float | None = 0) -> tuple[DeviceInfo, ...]:
        """The devices that jobs run on; empty while they are not known yet.

        Args:
            timeout: seconds to wait for the answer of workers that are still starting; None for as long as it takes.
        """
        try:
            return self._devices.result(timeout)
        except TimeoutError:
            return ()

    def close(self) -> None:
        """End every job, and with an own cluster all of its processes. Happens by itself when Python exits."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        closing = self._submit(self._close())
        try:
            closing.result(CLOSE_TIMEOUT)
        except Exception:
            logger.exception("The cluster could not be closed in order.")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT)

    # Bookkeeping, in any thread, under the lock.

    def _find(self, name: str, params: ExperimentParams, key: Hashable | None) -> Work | None:
        """Equal work that is queued or running, or that has its result already."""
        if key is None or key not in self._cache:
            return self._shared.get(key)
        work = Work(name, params, key)
        work.finish(result=self._cache.get(key))
        return work

    def _enqueue(self, work: Work) -> Work:
        if work.key is not None:
            self._shared[work.key] = work
        lane = self._lanes[work.params.lane]
        lane.put(work)
        self._loop.call_soon_threadsafe(self._pump, lane)
        return work

    def _stop(self, work: Work, reason: WorkbenchError, force: bool = True) -> None:
        """Have the dispatcher end `work`, which it has been given; the first reason holds, force may come later."""
        if work.stop_reason is None:
            work.stop_reason = reason
            self._unshare(work)
            self._loop.call_soon_threadsafe(work.stopping.set)
        if force:
            self._loop.call_soon_threadsafe(work.forced.set)

    def _finish(self, work: Work, outcome: Outcome) -> None:
        if outcome.error is None and work.stop_reason is None and work.key is not None:
            self._cache.put(work.key, freeze(outcome.result), outcome.nbytes)
        self._unshare(work)
        for ticket in work.tickets:
            self._forget(ticket)
        work.finish(outcome.result, outcome.error)

    def _unshare(self, work: Work) -> None:
        if self._shared.get(work.key) is work:
            del self._shared[work.key]

    def _forget(self, ticket: Ticket) -> None:
        tickets = self._tickets.get(ticket.owner, set())
        tickets.discard(ticket)
        if not tickets:
            self._tickets.pop(ticket.owner, None)

    # The event loop's thread.

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._services.add(task)
        task.add_done_callback(self._services.discard)

    def _pump(self, lane: Lane) -> None:
        """Hand over as much as the lane has room for."""
        with self._lock:
            while not self._closed and (work := lane.take()) is not None:
                self._spawn(self._serve(lane, work))

    async def _serve(self, lane: Lane, work: Work) -> None:
        try:
            outcome = await self._dispatcher.execute(work)
        except Exception as error:  # whatever it is, somebody waits for this ticket, and others for the slot
            logger.exception("Running %s failed.", work.name)
            outcome = Outcome(error=JobFailedError(f"The job could not be run ({type(error).__name__}): try again."))
        if outcome.trace is not None:
            logger.error("%s failed with %r:\n%s", work.name, work.params, outcome.trace)
        with self._lock:
            self._finish(work, outcome)
            lane.release(work)
        self._pump(lane)

    def _on_begin(self, work: Work) -> None:
        with self._lock:
            work.begin()
            self._lanes[work.params.lane].number()

    def _on_time_limit(self, work: Work) -> None:
        with self._lock:
            limit = experiments.duration(work.params.time_limit)
            self._stop(work, JobFailedError(f"The job took longer than its limit of {limit}: choose smaller settings."))

    async def _drop_later(self, owner: str) -> None:
        await asyncio.sleep(self._owner_grace)
        with self._lock:
            if self._leaving.pop(owner, None) is not None:
                for ticket in list(self._tickets.get(owner, ())):
                    self.cancel(ticket, force=False)

    async def _start_cluster(self, threads: int | None, memory_limit: int | None, warm_up: Sequence[str]) -> None:
        if self._cluster is not None:
            await close_cluster(self._cluster, patience=0)  # it has no scheduler left
        gpus = devices.visible_gpus()
        self._cluster = create_cluster(self._directory.name, gpus, threads, memory_limit, warm_up)
        await self._cluster
        for lane in self._lanes.values():
            lane.slots = max(1, len(gpus))
        await self._connect(self._cluster.scheduler_address)

    async def _connect(self, scheduler: str) -> None:
        self._client = Client(
            scheduler, asynchronous=True, set_as_default=False, name="workbench", timeout=CONNECT_TIMEOUT
        )
        await self._client
        self._dispatcher = Dispatcher(self._client, self._on_begin, self._on_time_limit)

    async def _take_care(self) -> None:
        """Replace nannies and schedulers that died; on an existing cluster, follow how many workers there are."""
        while True:
            with contextlib.suppress(Exception):  # jobs say that there is no connection, and this tries again
                if self._client.status == "closed":  # Dask has given up to reconnect
                    await self._open()
                if self._cluster is not None:
                    await self._cluster.scale(len(self._cluster.worker_spec))
                else:
                    for lane in self._lanes.values():
                        lane.slots = max(1, len(await self._workers(lane.name)))
                        self._pump(lane)
            await asyncio.sleep(CARE_INTERVAL)

    async def _workers(self, lane: str) -> list[str]:
        """Addresses of the workers that serve a lane."""
        identity = await self._client.scheduler.identity()
        return [address for address, worker in identity["workers"].items() if lane in worker["resources"]]

    async def _describe_devices(self) -> None:
        lane = self._lanes[LANES[0]]  # every device has a worker in each lane
        while not self._devices.done():
            with contextlib.suppress(Exception):  # a worker died meanwhile: ask its successor
                workers = await self._workers(lane.name)
                if len(workers) >= lane.slots:
                    answers = await self._client.run(tasks.describe, workers=workers)
                    self._devices.set_result(tuple(answers[worker] for worker in workers))
            await asyncio.sleep(POLL_INTERVAL)

    async def _close(self) -> None:
        for service in self._services:
            service.cancel()
        await asyncio.gather(*self._services, return_exceptions=True)
        with self._lock:
            for leaving in self._leaving.values():
                leaving.cancel()
            for work in {ticket.work for tickets in self._tickets.values() for ticket in tickets}:
                self._finish(work, Outcome(error=JobFailedError(CLOSED)))
        if self._client is not None:
            await self._client.close()
        if self._cluster is not None:
            await close_cluster(self._cluster, CLOSE_TIMEOUT / 2)
        self._directory.cleanup()
