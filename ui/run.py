"""Runs experiments for a page: waits a moment, then shows progress; cancels what is superseded; explains failures.

What a session knows about its jobs is one frozen `_Slot` for each key, replaced as a whole. That matters: Streamlit
abandons a script thread when the learner moves on, so two threads of one session can overlap. The abandoned one is
stopped at its next use of `st.session_state` or of a page element, hence after every wait the session is asked first.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.errors import JobCancelledError, WorkbenchError
from engine.experiments import ExperimentParams
from ui.prose import plain

if TYPE_CHECKING:
    from engine.runtime import Runtime, Ticket

WAIT = 0.4  # seconds that `run` waits before it shows progress
POLL = 0.4  # seconds between two looks at a job that is under way
WATCH_POLL = 0.8  # the same if its partial results are drawn, of which there is one about every second
STARTING = "starting…"
WARM_UP = ("engine.pretrained", "engine.attention")  # imported by the workers before anybody asks for anything

_PREVIOUS = "What you see is the previous result."
_PARTIAL = "What you see is what it had until then."
_RUNNING = ("queued", "running")
_LONG_WAIT = " Trainings, sweeps and benchmarks have the device one at a time."
_LEFT = "seconds_left"  # what a job says of a part of it; the time that is shown is the whole job's
_DONE = "share_of_time"  # what a job says where some steps take much longer than others
_TELLING = 0.04  # share of a job from which on the time so far says how long the rest takes
_SHARES = ("accuracy", "score", "share")
_restart_lock = Lock()


@dataclass(frozen=True)
class _Slot:
    """What a session knows about the jobs of one key.

    Args:
        experiment, params: what was asked for last; no `params` means that it is to be asked for again.
        ticket: its job; None once it has ended, or if it could not be submitted.
        result, result_params: the last good result and what it belongs to.
        shown: what the last job had shown when it ended without a result.
        problem: why the last job gave no result.
        stopping: whether the learner has cancelled the job.
    """

    experiment: str
    params: ExperimentParams | None
    ticket: Ticket | None = None
    result: Any = None
    result_params: ExperimentParams | None = None
    shown: Any = None
    problem: str | None = None
    stopping: bool = False

    @property
    def is_answered(self) -> bool:
        """True if the result is the one that was asked for."""
        return self.result_params is not None and self.result_params == self.params

    @property
    def partial(self) -> Any:
        """The partial result of the last job; None if it has shown nothing, and once it has its result."""
        return self.shown if self.ticket is None else self.ticket.shown


@dataclass(frozen=True)
class _Presence:
    """A session as the runtime knows it."""

    runtime: Runtime
    owner: str

    def end(self) -> None:
        self.runtime.release(self.owner)


def starting() -> Future[Runtime]:
    """The runtime as it starts, once for the whole server and in a thread of its own: nobody's page waits for it."""
    return _start()


@st.cache_resource(show_spinner=False)
def _start() -> Future[Runtime]:
    future: Future[Runtime] = Future()

    def start() -> None:
        try:
            from engine.runtime import Runtime

            future.set_result(Runtime.start(warm_up=WARM_UP))
        except Exception as error:
            future.set_exception(error)

    Thread(target=start, name="runtime-start", daemon=True).start()
    return future


def _start_again(failed: Future[Runtime]) -> None:
    """Forget the `failed` start, unless another session has done so before: a second runtime would never be closed."""
    with _restart_lock:
        if starting() is failed:
            _start.clear()


def workbench() -> Runtime | None:
    """The server's runtime, with this session signed in; None after a sentence and a way out if it did not start."""
    started = starting()
    if not started.done():
        with st.spinner(f"The worker is {STARTING}"):
            futures.wait([started])
    error = started.exception()
    if error is not None:
        reason = f" {error}" if isinstance(error, WorkbenchError) else ""
        st.error(f"The place where experiments run did not start.{plain(reason)}", icon=":material/power_off:")
        st.button(
            "Start it again", key="_start_again", icon=":material/refresh:", on_click=_start_again, args=(started,)
        )
        return None
    runtime = started.result()
    presence = _presence(_owner(), runtime)
    runtime.keep(presence.owner)
    return runtime


def _owner() -> str:
    """This session's name for the runtime; it outlives a lost connection, unlike a session-scoped cache."""
    return st.session_state.setdefault("_owner", uuid.uuid4().hex)


@st.cache_resource(scope="session", show_spinner=False, max_entries=1, on_release=_Presence.end)
def _presence(owner: str, _runtime: Runtime) -> _Presence:
    return _Presence(_runtime, owner)


def run(experiment: str, params: ExperimentParams, *, key: str, wait: float = WAIT) -> Any | None:
    """The result of `experiment` with `params`, or what there is until it comes.

    Within `wait` seconds the result is returned as if it had been computed here. After that the page gets progress
    with a Cancel button, and the last good result of `key` (marked as the previous one) until the new one arrives and
    the page is redrawn. A job of `key` that is no longer asked for is cancelled. A failure is one sentence and a
    button to try again.

    Args:
        experiment: its name in `engine.experiments`.
        params: its parameters.
        key: what the result is for on this page; one job at a time.
        wait: seconds to wait before progress is shown.

    Returns:
        The result; the previous one while the new one is under way or if it failed (`params_of` tells which); None
        if there has not been any.
    """
    runtime = workbench()
    if runtime is None:
        return None
    slot = _settled(_asked(runtime, experiment, params, key), key, wait)
    if slot.ticket is not None:
        _progress(key)
    elif slot.problem is not None:
        _show_problem(slot, key)
    return slot.result


def watch(
    experiment: str,
    params: ExperimentParams,
    draw: Callable[[Any, ExperimentParams], None],
    *,
    key: str,
    height: int = 360,
    before: Callable[[], None] | None = None,
) -> None:
    """Have `draw` draw the result of `experiment` as it grows, and in the same place when it is there.

    The counterpart of `run` for a job that shows partial results. It is drawn about every second with the latest of
    them, below a line of progress with a Cancel button; a job that ends without a result leaves the last one on the
    page. Only what `draw` draws is redrawn on the way, the page itself once the job has ended.

    Args:
        experiment: its name in `engine.experiments`.
        params: its parameters.
        draw: draws a result, partial or not, given the parameters that it belongs to; called in a fragment.
        key: what the result is for on this page; one job at a time.
        height: of the empty space that stands there until something is shown, in pixels.
        before: draws what stands there until then instead.
    """
    runtime = workbench()
    if runtime is None:
        return
    running = _is_under_way(_slot(key))
    slot = _settled(_asked(runtime, experiment, params, key), key, 0)
    if running and slot.ticket is None:  # what has been drawn above is of a job that runs
        st.rerun()
    st.fragment(_watch, run_every=None if slot.ticket is None else WATCH_POLL)(key, draw, height, before)


def latest(key: str) -> Any | None:
    """The last good result of `key`, without asking for a new one: for what must stay while a setting is wrong."""
    slot = _slot(key)
    return slot.result if slot else None


def params_of(key: str) -> ExperimentParams | None:
    """The parameters of the last good result of `key`: while a new one is under way, the previous ones."""
    slot = _slot(key)
    return slot.result_params if slot else None


def is_running(key: str) -> bool:
    """Whether the job of `key` is queued or running, or will be by the end of this drawing of the page."""
    slot = _slot(key)
    return _is_under_way(slot) and _is_under_way(_settled(slot, key, 0))


def is_waiting(key: str) -> bool:
    """Whether the job of `key` has been asked for and has not begun; when it does, `watch` has the page drawn again."""
    waits = is_running(key) and _waits(_slot(key))
    st.session_state[_said_to_wait(key)] = waits
    return waits


def problem(key: str) -> str | None:
    """Why the last job of `key` gave no result; None if it gave one, or is under way."""
    slot = _slot(key)
    return None if slot is None or _is_under_way(slot) else slot.problem


def ask(experiment: str, params: ExperimentParams, *, key: str) -> None:
    """Have `experiment` computed anew from now on, wherever on the page `watch` will draw it: for a button's callback.

    Where nothing draws `key` at the moment, in another tab, the job runs all the same.
    """
    ask_again(key)
    started = starting()
    if started.done() and started.exception() is None:  # else `watch` waits for it, or says why it cannot
        _asked(started.result(), experiment, params, key)


def ask_again(key: str) -> None:
    """Let the next `run` of `key` compute anew, whatever is known; the last good result stays until then."""
    _keep(key, replace(_slot(key) or _Slot("", None), params=None))


def forget(key: str) -> None:
    """Drop what is known of `key`: for a page that keeps results itself, so that none of them is called previous."""
    st.session_state.pop(f"_run_{key}", None)


def _waits(slot: _Slot) -> bool:
    return slot.ticket is None or slot.ticket.state == "queued"


def _said_to_wait(key: str) -> str:
    return f"_run_{key}_waits"


def _is_under_way(slot: _Slot | None) -> bool:
    return slot is not None and (slot.ticket is not None or slot.params is None)


def _slot(key: str) -> _Slot | None:
    return st.session_state.get(f"_run_{key}")


def _keep(key: str, slot: _Slot) -> _Slot:
    st.session_state[f"_run_{key}"] = slot
    return slot


def _asked(runtime: Runtime, experiment: str, params: ExperimentParams, key: str) -> _Slot:
    """The slot of `key` with `params` asked for: submitted, unless that was done before."""
    slot = _slot(key)
    if slot is None or slot.experiment != experiment:
        slot = _Slot(experiment, None)
    if slot.params == params:
        return slot
    if slot.ticket is not None:
        slot.ticket.cancel(force=False)
    asked = replace(slot, params=params, ticket=None, shown=None, problem=None, stopping=False)
    if slot.params is not None and asked.is_answered:
        return _keep(key, asked)
    try:
        ticket = runtime.submit(experiment, params, _owner())
    except WorkbenchError as error:
        return _keep(key, replace(asked, problem=str(error)))
    return _keep(key, replace(asked, ticket=ticket))


def _settled(slot: _Slot, key: str, seconds: float) -> _Slot:
    """The slot after up to `seconds`, with the result or the problem if the job has ended by then."""
    if slot.ticket is None or not slot.ticket.wait(seconds):
        return slot
    if _slot(key) is not slot:
        return _slot(key) or slot
    try:
        result = slot.ticket.result()
    except WorkbenchError as error:
        problem = "Cancelled." if isinstance(error, JobCancelledError) else str(error)
        return _keep(key, replace(slot, ticket=None, shown=slot.ticket.shown, problem=problem))
    return _keep(key, replace(slot, ticket=None, result=result, result_params=slot.params))


@st.fragment(run_every=POLL)
def _progress(key: str) -> None:
    """Progress of the job of `key`, redrawn by itself; once the job has ended the page is drawn again."""
    slot = _running(key)
    _show_progress(slot, key, _status(slot.ticket, slot.params), _seen(slot))


def _watch(
    key: str,
    draw: Callable[[Any, ExperimentParams], None],
    height: int,
    before: Callable[[], None] | None = None,
) -> None:
    """How the job of `key` is doing, above what it has shown or its result."""
    slot = _slot(key)
    if slot is None or slot.params is None:  # it is to be asked for again, which only the page does
        st.rerun()
    partial = slot.partial
    if slot.ticket is not None:
        slot = _running(key)
        if st.session_state.get(_said_to_wait(key)) and not _waits(slot):  # what is drawn elsewhere says that it waits
            st.session_state[_said_to_wait(key)] = False
            st.rerun()
        status = _status(slot.ticket, slot.params, brief=partial is not None)
        _show_progress(slot, key, status, "" if partial is not None else _seen(slot))
    elif slot.problem is not None:
        _show_problem(slot, key)
    if partial is not None:
        draw(partial, slot.params)
    elif slot.result is not None:
        draw(slot.result, slot.result_params)
    elif before is not None:
        before()
    elif slot.ticket is not None:
        st.skeleton(height=height)


def _running(key: str) -> _Slot:
    """The slot of `key`, whose job is under way: if it is not any more, the page is drawn again."""
    slot = _slot(key)
    if slot is None or slot.ticket is None or slot.ticket.state not in _RUNNING:
        st.rerun()
    return slot


def _seen(slot: _Slot) -> str:
    """What is on the page beside a job without a result, in words."""
    if slot.partial is not None:
        return _PARTIAL
    return "" if slot.result is None else _PREVIOUS


def _show_progress(slot: _Slot, key: str, status: tuple[float, str], seen: str) -> None:
    stopping = "Stopping after this step…" if slot.params.returns_partial else "Stopping…"
    share, words = (status[0], stopping) if slot.stopping else status
    with st.container(horizontal=True, vertical_alignment="center"):
        st.progress(share, text=f"{words} · {seen}" if seen else words)
        st.button(
            "Cancel",
            key=f"_cancel_{key}",
            icon=":material/close:",
            disabled=slot.stopping,
            on_click=_cancel,
            args=(key,),
        )


def _cancel(key: str) -> None:
    slot = _slot(key)
    if slot is not None and slot.ticket is not None:
        slot.ticket.cancel()
        _keep(key, replace(slot, stopping=True))


def _status(ticket: Ticket, params: ExperimentParams, brief: bool = False) -> tuple[float, str]:
    """How far the job is, from 0 to 1, and in words, with its numbers unless these are to be `brief`."""
    if ticket.state == "queued":
        if not starting().result().devices():
            return 0.0, f"The worker is {STARTING}"
        ahead = ticket.place - 1 if ticket.place else 0
        why = _LONG_WAIT if params.lane == "long" else ""
        return 0.0, (f"Waiting: {ahead} {'job' if ahead == 1 else 'jobs'} ahead…" if ahead else "Next in line…") + why
    progress = ticket.progress
    if progress is None:
        return 0.0, f"Running for {ticket.seconds:.0f} s…"
    parts = [f"Step {progress.step} of {progress.total}"]
    if not brief:
        parts += [_number(name, value) for name, value in progress.numbers.items() if name not in (_LEFT, _DONE)]
    done = min(1.0, progress.numbers.get(_DONE, progress.step / progress.total))
    if done >= _TELLING:
        parts.append(f"about {ticket.seconds * (1 - done) / done:.0f} s left")
    return done, " · ".join(parts)


def _number(name: str, value: float) -> str:
    """A number of a progress report in words, e.g. ``"held-out accuracy 14%"``, ``"2,138 tokens/s"``, ``"run 3"``."""
    words = name.replace("held_out", "held-out").replace("_", " ")
    if name.endswith("_per_second"):
        return f"{value:,.0f} {words.removesuffix(' per second')}/s"
    if name.endswith(_SHARES):
        return f"{words} {value:.0%}"
    return f"{words} {value:,.0f}" if float(value).is_integer() else f"{words} {value:.3g}"


def _show_problem(slot: _Slot, key: str) -> None:
    st.warning(plain(f"{slot.problem} {_seen(slot)}".rstrip()), icon=":material/info:")
    st.button("Try again", key=f"_again_{key}", icon=":material/refresh:", on_click=ask_again, args=(key,))
