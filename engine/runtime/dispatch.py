"""Hands work to the Dask cluster, one coroutine a run, and watches over it: start, progress, stop, a worker's death."""

from __future__ import annotations

import asyncio
import logging
import pickle
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed import Client, Future, KilledWorker
from distributed.client import FutureCancelledError
from distributed.comm import get_address_host

from engine.errors import JobCancelledError, JobFailedError
from engine.runtime import tasks
from engine.runtime.jobs import Progress
from engine.runtime.results import freeze
from engine.runtime.tasks import Outcome
from engine.runtime.tickets import Work

ATTEMPTS = 3  # to hand over work whose worker dies before it begins
MEMORY_TOPIC = "worker-restart-memory"  # Dask's own: a nanny ended a worker that took too much memory
NEWS_LOOKS, NEWS_PAUSE = 10, 0.2  # how often and at what distance, in seconds, to look for news that may come late

KILLED = "The worker died while the job ran, perhaps for lack of memory: it is being replaced, and you can try again."
NEVER_BEGAN = "The workers die before they can begin the job: the server's log says more."
LOST = "The connection to the workers was lost: try again in a moment."

logger = logging.getLogger(__name__)


class _Run:
    """One attempt to run some work on the cluster."""

    def __init__(self, work: Work) -> None:
        self.id = f"{work.name}-{uuid.uuid4().hex}"  # also the Dask key, whose first part names the task
        self.work = work
        self.worker: str | None = None  # its address, once the job has begun
        self.pid = 0  # likewise, the id of its process
        self.timer: asyncio.TimerHandle | None = None
        self.fetching = False  # a partial result is on its way


class Dispatcher:
    """Runs work on a cluster. Everything here happens in the event loop of its client.

    Args:
        client: an asynchronous client.
        on_begin: called when some work has begun on a worker.
        on_time_limit: called when some work has run for longer than it may.
    """

    def __init__(
        self,
        client: Client,
        on_begin: Callable[[Work], None],
        on_time_limit: Callable[[Work], None],
    ) -> None:
        self._client = client
        self._on_begin = on_begin
        self._on_time_limit = on_time_limit
        self._runs: dict[str, _Run] = {}
        self._requests: set[asyncio.Task[None]] = set()
        self._topic = f"workbench-{uuid.uuid4().hex}"

    async def execute(self, work: Work) -> Outcome:
        """Run `work` to its end, whatever the end is."""
        if self._client.status != "running":
            return Outcome(error=JobFailedError(LOST))
        # Each time, as Dask forgets subscriptions when it has to reconnect to the scheduler.
        self._client.subscribe_topic(self._topic, self._on_message)
        for _ in range(ATTEMPTS):
            outcome = await self._attempt(work)
            if outcome is not None:
                return outcome
        return Outcome(error=JobFailedError(NEVER_BEGAN))

    async def _attempt(self, work: Work) -> Outcome | None:
        """One attempt; None if the worker died before it began."""
        run = _Run(work)
        self._runs[run.id] = run
        future = self._client.submit(
            tasks.perform,
            run.id,
            self._topic,
            work.name,
            work.params.model_dump(),
            key=run.id,
            resources={work.params.lane: 1},
            pure=False,
        )
        answer = asyncio.create_task(self._answer(run, future))
        try:
            await self._first(answer, work.stopping)
            if work.stop_reason is not None:
                await self._halt(run, future, answer)
            outcome = answer.result()
            if outcome is not None and not outcome.healthy:
                await self._kill(run.worker)
            if work.stop_reason is not None:
                return self._partial(work, outcome) or Outcome(error=work.stop_reason)
            return outcome
        finally:
            if run.timer is not None:
                run.timer.cancel()
            del self._runs[run.id]
            future.release()  # at once: Dask would compute a result that it lost with its worker again

    @staticmethod
    def _partial(work: Work, outcome: Outcome | None) -> Outcome | None:
        """What a stopped run had so far, if it is of the kind that returns it and did so in time."""
        returned = outcome is not None and outcome.error is None
        return outcome if returned and work.params.returns_partial else None

    @staticmethod
    async def _first(answer: asyncio.Task[Outcome | None], event: asyncio.Event) -> None:
        """Return when there is an answer or the event has happened."""
        happened = asyncio.create_task(event.wait())
        try:
            await asyncio.wait({answer, happened}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            happened.cancel()

    async def _answer(self, run: _Run, future: Future) -> Outcome | None:
        try:
            return await future
        except KilledWorker:
            if run.worker is None:
                return None
            ended_for_memory = await self._ended_for_memory(run.worker, run.pid)
            return Outcome(error=JobFailedError(tasks.OUT_OF_MEMORY if ended_for_memory else KILLED))
        except FutureCancelledError:
            return Outcome(error=JobFailedError(LOST))

    async def _ended_for_memory(self, worker: str, pid: int) -> bool:
        """Whether its nanny ended `worker` because it took too much memory.

        The nanny tells the scheduler on its own, perhaps after the news of the death. It knows the process; the address
        that it gives can be that of the worker's predecessor, if that one died as soon as it had started.
        """
        host = get_address_host(worker)
        for _ in range(NEWS_LOOKS):
            with suppress(OSError):
                events = [event for _, event in await self._client.get_events(MEMORY_TOPIC)]
                if any(event["pid"] == pid and get_address_host(event["worker"]) == host for event in events):
                    return True
            await asyncio.sleep(NEWS_PAUSE)
        return False

    async def _halt(self, run: _Run, future: Future, answer: asyncio.Task[Outcome | None]) -> None:
        """Ask the job to stop; once force may be used, kill its worker if it does not within the grace."""
        if run.worker is not None:
            timed_out = not isinstance(run.work.stop_reason, JobCancelledError)
            self._request(tasks.stop, run.id, timed_out, worker=run.worker)
            await self._first(answer, run.work.forced)
            await asyncio.wait({answer}, timeout=run.work.params.stop_grace)
        if not answer.done():
            await self._client.cancel([future], force=True)
            await self._kill(run.worker)
            await answer

    async def _kill(self, worker: str | None) -> None:
        if worker is not None:
            with suppress(Exception):  # it may be gone already, which is what we want
                await self._client.run(tasks.kill, workers=[worker], nanny=True)

    def _request(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        worker: str,
        then: Callable[[Any], None] | None = None,
    ) -> None:
        """Have `worker` call `function` in its event loop, without waiting: the loop may be held up by the very job.

        `then` gets the answer, or None if there is none.
        """

        async def request() -> None:
            answers: dict[str, Any] = {}
            with suppress(Exception):
                answers = await self._client.run(function, *arguments, workers=[worker])
            if then is not None:
                then(answers.get(worker))

        task = asyncio.create_task(request())
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    def _fetch(self, run: _Run) -> None:
        """Get the latest partial result of `run`, unless one is on its way already: the next message asks again."""

        def keep(pickled: bytes | None) -> None:
            run.fetching = False
            if pickled is not None and run.id in self._runs:
                run.work.shown = freeze(pickle.loads(pickled))

        if not run.fetching:
            run.fetching = True
            self._request(tasks.shown, run.id, worker=run.worker, then=keep)

    def _on_message(self, event: tuple[float, dict[str, Any]]) -> None:
        _, message = event
        run = self._runs.get(message["run"])
        if "shown" in message:
            if run is not None:
                self._fetch(run)
        elif "begun" not in message:
            if run is not None:
                run.work.progress = Progress(message["step"], message["total"], message["numbers"])
        elif run is None:  # given up while it was on its way
            self._request(tasks.stop, message["run"], worker=message["worker"])
        else:
            run.worker, run.pid = message["worker"], message["begun"]
            if run.timer is None:  # a cluster with other settings than ours may repeat a job whose worker died
                limit = run.work.params.time_limit
                run.timer = asyncio.get_running_loop().call_later(limit, self._on_time_limit, run.work)
                self._on_begin(run.work)
