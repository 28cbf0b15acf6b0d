"""What the web process knows of runs: a `Work` is one run, a `Ticket` is one owner's share of it."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import JobCancelledError, WorkbenchError
from engine.experiments import ExperimentParams
from engine.runtime.jobs import Progress

if TYPE_CHECKING:
    from engine.runtime.service import Runtime

State = Literal["queued", "running", "done", "failed", "cancelled"]
CANCELLED = "The job was cancelled before it had a result."


class Work:
    """One run of an experiment, shared by everybody who asked for the same.

    It is changed under the runtime's lock only; single attributes are read without.

    Args:
        name: the experiment.
        params: its parameters.
        key: what equal runs have in common; None if this one is not to be shared.
    """

    def __init__(self, name: str, params: ExperimentParams, key: Hashable | None) -> None:
        self.id = uuid.uuid4().hex
        self.name = name
        self.params = params
        self.key = key
        self.tickets: list[Ticket] = []
        self.state: State = "queued"
        self.place = 0
        self.progress: Progress | None = None
        self.shown: Any = None
        self.result: Any = None
        self.error: WorkbenchError | None = None
        self.stop_reason: WorkbenchError | None = None
        # Both are waited for in the runtime's event loop once the work is handed over.
        self.stopping = asyncio.Event()
        self.forced = asyncio.Event()  # its worker may be restarted to stop it
        self._started: float | None = None
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran."""
        if self._started is None:
            return 0.0
        return (time.monotonic() if self._ended is None else self._ended) - self._started

    def begin(self) -> None:
        """It has begun on a worker."""
        self.state, self._started = "running", time.monotonic()

    def finish(self, result: Any = None, error: WorkbenchError | None = None) -> None:
        """It has ended, with a result or with the reason why there is none."""
        self.result, self.error = result, error
        self._ended = time.monotonic()
        if error is None:
            self.state, self.shown = "done", None
        else:
            self.state = "cancelled" if isinstance(error, JobCancelledError) else "failed"
        for ticket in self.tickets:
            ticket._settled.set()

    def join(self, ticket: Ticket) -> None:
        """One more shares it."""
        self.tickets.append(ticket)
        if self.state == "done":
            ticket._settled.set()

    def leave(self, ticket: Ticket) -> None:
        """One of several no longer wants it."""
        self.tickets.remove(ticket)
        ticket._left = True
        ticket._settled.set()


class Ticket:
    """One owner's share of a run: where it is, how far it is, what came of it; to be used from any thread.

    Args:
        runtime: who made it.
        work: the run.
        owner: who asked, e.g. a session id.
    """

    def __init__(self, runtime: Runtime, work: Work, owner: str) -> None:
        self.id = uuid.uuid4().hex
        self.owner = owner
        self.work = work
        self._runtime = runtime
        self._left = False
        self._settled = threading.Event()

    @property
    def state(self) -> State:
        """``"queued"``, ``"running"``, ``"done"``, ``"failed"`` or ``"cancelled"``."""
        return "cancelled" if self._left else self.work.state

    @property
    def place(self) -> int:
        """Place in the queue of its lane: 1 is next; 0 once it runs or has ended."""
        return self.work.place if self.state == "queued" else 0

    @property
    def progress(self) -> Progress | None:
        """The latest report; None before the first."""
        return self.work.progress

    @property
    def shown(self) -> Any:
        """The latest partial result of a job that shows any; None before the first, and once there is a result."""
        return self.work.shown

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran, in seconds; 0 for a result that was there already."""
        return self.work.seconds

    @property
    def error(self) -> str | None:
        """Why there is no result, in one plain sentence; None unless failed or cancelled."""
        error = self._error
        return None if error is None else str(error)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for the end; True if it has come."""
        return self._settled.wait(timeout)

    def result(self) -> Any:
        """The experiment's result, once there is one; waits for it.

        Raises:
            WorkbenchError: there is none; the message says why.
        """
        self.wait()
        error = self._error
        if error is not None:
            # A new one each time: an exception that is raised collects the frames of everybody who raised it.
            raise type(error)(*error.args)
        return self.work.result

    def cancel(self, force: bool = True) -> None:
        """Leave the run. The last to leave stops it: at once if it is queued, else it is asked to stop.

        Args:
            force: restart the worker of a job that does not stop within the grace. Without it, a job of the short lane
                goes on until its end or its time limit: whoever waits behind it would wait longer for a new worker,
                which has to load libraries and models again. Long jobs are always stopped by force.
        """
        self._runtime.cancel(self, force)

    @property
    def _error(self) -> WorkbenchError | None:
        return JobCancelledError(CANCELLED) if self._left else self.work.error
