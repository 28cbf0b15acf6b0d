"""The runtimes of the page tests: for the frame one in threads, without processes of its own, for labs the real one."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import engine.experiments
import ui.run
from engine.errors import JobCancelledError, WorkbenchError
from engine.experiments.attention_effect import Candidate, Result
from engine.runtime import Runtime
from engine.runtime.devices import DeviceInfo
from engine.runtime.jobs import LocalJob
from tests.ui.lab_pages import opened

HERE = Path(__file__).parent


class ThreadTicket:
    def __init__(self, params, run):
        self.params, self._run = params, run
        self.state, self.place, self.progress, self.error = "running", None, None, None
        self.shown = None
        self._began, self._ended, self._outcome = time.monotonic(), threading.Event(), None
        self._job = LocalJob(on_progress=self._see, on_show=self._show)
        threading.Thread(target=self._work, daemon=True).start()

    def _see(self, progress):
        self.progress = progress

    def _show(self, partial):
        self.shown = partial

    def _work(self):
        try:
            self._outcome = self._run(self.params, self._job)
            self.state, self.shown = "done", None
        except WorkbenchError as error:
            self.error = str(error)
            self._outcome = error
            self.state = "cancelled" if isinstance(error, JobCancelledError) else "failed"
        self._ended.set()

    @property
    def seconds(self):
        return time.monotonic() - self._began

    def wait(self, timeout):
        return self._ended.wait(timeout)

    def result(self):
        self._ended.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def cancel(self, force=True):
        self._job.cancelled = True


class ThreadRuntime:
    """Attributes: `refuse`, an error that every submission raises; `stand_ins`, by name what runs instead."""

    def __init__(self):
        self.tickets, self.owners, self.kept, self.released = [], [], [], []
        self.refuse, self.stand_ins = None, {}

    def submit(self, name, params, owner):
        if self.refuse is not None:
            raise self.refuse
        run = self.stand_ins.get(name) or engine.experiments.get(name).run
        self.tickets.append(ThreadTicket(params, run))
        self.owners.append(owner)
        return self.tickets[-1]

    def keep(self, owner):
        self.kept.append(owner)

    def release(self, owner):
        self.released.append(owner)

    def devices(self):
        return [DeviceInfo("Test CPU", "cpu", "cpu", 8 * 10**9, 4 * 10**9, 2, "here", "3.11", {"torch": "2.13.0"})]


@pytest.fixture(scope="module")
def real_runtime():
    """The real thing, for the labs' tests: one for all tests of a module."""
    runtime = Runtime.start(warm_up=("engine.tracing",))
    yield runtime
    runtime.close()


@pytest.fixture
def open_page(real_runtime, monkeypatch):
    """`lab_pages.opened`, on the real runtime."""
    started = Future()
    started.set_result(real_runtime)
    monkeypatch.setattr(ui.run, "starting", lambda: started)
    return opened


@pytest.fixture
def runtime(monkeypatch):
    """A runtime whose submissions the test can read; `engine.experiments` also knows the test's own."""
    monkeypatch.setattr(engine.experiments, "__path__", [*engine.experiments.__path__, str(HERE / "experiments")])
    started = Future()
    started.set_result(ThreadRuntime())
    monkeypatch.setattr(ui.run, "starting", lambda: started)
    st.cache_resource.clear()
    st.cache_data.clear()
    return started.result()


@pytest.fixture
def open_app(runtime):
    """Opens the app itself, at its home page."""

    def predict(params, job):
        candidates = [Candidate("␣Mary", 0.9, 0.9), Candidate("␣the", 0.05, 0.05)]
        return Result(candidates, 0.0, "Nothing changed.")

    runtime.stand_ins["attention_effect"] = predict

    def open_with(**query):
        app = AppTest.from_file(str(HERE.parents[1] / "app.py"), default_timeout=20)
        app.query_params.update(query)
        return app.run()

    return open_with


@pytest.fixture
def open_lab(runtime):
    """Opens the test lab, as a browser with this query string would."""

    def open_with(**query):
        app = AppTest.from_file(str(HERE / "probe_page.py"), default_timeout=20)
        app.query_params.update({name: str(value) for name, value in query.items()})
        return app.run()

    return open_with
