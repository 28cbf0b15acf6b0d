"""The runtime on a real cluster of real processes, and what happens to everybody else when one of them goes wrong."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine import experiments
from engine.errors import (
    DoesNotFitError,
    InputError,
    JobCancelledError,
    JobFailedError,
    WorkbenchError,
)
from engine.runtime import LocalJob, Progress, Runtime
from engine.runtime.devices import listed_gpus, visible_gpus
from engine.runtime.results import ResultCache, freeze, weigh
from engine.runtime.tasks import WorkerJob, attempt

ROOT = Path(__file__).parents[2]
LABS = str(Path(__file__).with_name("labs"))
OWNER = "ada"
PATIENCE = 30.0  # seconds; only a failing test waits that long


@pytest.fixture(scope="module", autouse=True)
def labs():
    """The test's own experiments, here and on the workers."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WORKBENCH_EXPERIMENTS", LABS)
    patch.delenv("WORKBENCH_SCHEDULER", raising=False)
    experiments.__path__.append(LABS)
    yield
    experiments.__path__.remove(LABS)
    for name in [path.stem for path in Path(LABS).glob("*.py")]:
        sys.modules.pop(f"engine.experiments.{name}", None)
    patch.undo()


@pytest.fixture(scope="module")
def runtime(labs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        runtime = Runtime.start(threads=1, memory_limit=600 * 10**6, owner_grace=0.5)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def gpu_runtime(labs):
    if not visible_gpus():
        pytest.skip("there is no CUDA device")
    runtime = Runtime.start()
    yield runtime
    runtime.close()


def submit(runtime, name, owner=OWNER, **values):
    return runtime.submit(name, experiments.parse(name, values), owner)


def until(condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def finished(ticket):
    assert ticket.wait(PATIENCE), f"still {ticket.state} after {PATIENCE} s"
    return ticket


def worker_pid(runtime):
    """Process id of the worker of the short lane."""
    return finished(submit(runtime, "pid")).result()


class TestResults:
    def test_weight_is_that_of_the_arrays(self):
        result = {"a": np.zeros((100, 100)), "b": [np.ones(1000, dtype=np.int8), "word"]}
        assert 81_000 <= weigh(result) <= 81_000 + 500

    @pytest.mark.parametrize("intruder", [object(), threading.Lock(), np.array([object()])])
    def test_what_is_not_plain_is_named(self, intruder):
        with pytest.raises(TypeError, match=r"result\['curve'\]\[…\] is of type"):
            weigh({"curve": [1.0, intruder]})

    def test_frozen_arrays_cannot_be_written(self):
        result = freeze({"a": [np.zeros(3)]})
        with pytest.raises(ValueError, match="read-only"):
            result["a"][0][0] = 1

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_cache_never_exceeds_its_capacity_and_keeps_the_most_recent(self, seed):
        rng = np.random.default_rng(seed)
        cache, order, weights = ResultCache(1000), [], {}
        for _ in range(300):
            key = int(rng.integers(30))
            if key in cache and rng.random() < 0.5:
                assert cache.get(key) == weights[key]
            else:
                weights[key] = int(rng.integers(1, 400))
                cache.put(key, weights[key], weights[key])
            order = [other for other in order if other != key] + [key]
            kept, total = [], 0
            for recent in reversed([other for other in order if other in cache]):
                kept.append(recent)
                total += weights[recent]
            assert total == cache.nbytes <= 1000
            assert order[-len(kept) :][::-1] == kept  # what is left is what was used last

    def test_what_is_heavier_than_the_cache_drops_nothing(self):
        cache = ResultCache(10)
        cache.put("small", 1, 10)
        cache.put("big", 2, 11)
        assert "small" in cache
        assert "big" not in cache


class TestReports:
    def test_a_fast_loop_does_not_flood_and_its_last_report_arrives(self):
        sent, timers = [], []

        def later(seconds, function):
            timer = threading.Timer(seconds, function)
            timers.append(timer)
            timer.start()

        job = WorkerJob("cpu", lambda message: sent.append((time.monotonic(), message)), later)
        start = time.monotonic()
        step = 0
        while time.monotonic() - start < 0.5:
            step += 1
            job.report(step, 10**9, loss=np.float32(1 / step))
        for timer in timers:
            timer.join()
        steps = [message["step"] for _, message in sent]
        assert step > 500
        assert 3 <= len(sent) <= 12
        assert steps == sorted(set(steps))
        assert steps[0] == 1
        assert steps[-1] == step
        assert type(sent[-1][1]["numbers"]["loss"]) is float


class TestPartialResults:
    def job(self):
        sent = []
        return WorkerJob("cpu", sent.append, lambda seconds, function: None), sent

    def test_a_fast_loop_drafts_one_about_every_second(self, monkeypatch):
        monkeypatch.setattr("engine.runtime.tasks.SHOW_INTERVAL", 0.1)
        job, sent = self.job()
        drafted, start, step = [], time.monotonic(), 0
        while time.monotonic() - start < 0.55:
            step += 1
            job.show(lambda step=step: drafted.append(step) or {"step": step})
        assert drafted[0] == 1
        assert step > 500
        assert 4 <= len(drafted) <= 6
        assert sent == [{"shown": True}] * len(drafted)
        assert pickle.loads(job.shown) == {"step": drafted[-1]}

    def test_a_slow_draft_takes_a_small_share_of_the_time(self, monkeypatch):
        monkeypatch.setattr("engine.runtime.tasks.SHOW_INTERVAL", 0.01)
        job, _ = self.job()
        drafted, start = [], time.monotonic()
        while time.monotonic() - start < 1:
            job.show(lambda: time.sleep(0.02) or drafted.append(1))
        assert len(drafted) <= 2

    def test_what_is_not_plain_is_named_and_not_sent(self):
        job, sent = self.job()
        with pytest.raises(TypeError, match=r"result\['model'\] is of type"):
            job.show(lambda: {"model": object()})
        assert not sent

    def test_it_reaches_the_ticket_grows_and_gives_way_to_the_result(self, runtime):
        ticket = submit(runtime, "showing")
        assert ticket.shown is None
        lengths = []
        while not ticket.wait(0.02):
            if ticket.shown is not None:
                lengths.append(len(ticket.shown.numbers))
        assert lengths == sorted(lengths)
        assert 3 <= len(set(lengths)) <= 6  # in four seconds
        assert len(ticket.result().numbers) == 40
        assert ticket.shown is None
        time.sleep(0.3)
        assert ticket.shown is None

    def test_those_who_share_it_cannot_change_it_for_each_other(self, runtime):
        ticket = submit(runtime, "showing", steps=15)
        until(lambda: ticket.shown is not None)
        with pytest.raises(ValueError, match="read-only"):
            ticket.shown.numbers[0] = 1
        finished(ticket)

    def test_a_worker_that_dies_leaves_what_it_had_shown(self, runtime):
        ticket = finished(submit(runtime, "showing", steps=15, end="die"))
        assert ticket.state == "failed"
        assert ticket.error.startswith("The worker died")
        assert 1 <= len(ticket.shown.numbers) <= 15

    def test_a_cancelled_run_leaves_what_it_had_shown(self, runtime):
        ticket = submit(runtime, "showing")
        until(lambda: ticket.shown is not None)
        ticket.cancel()
        assert finished(ticket).state == "cancelled"
        assert len(ticket.shown.numbers) >= 1

    def test_in_this_process_it_goes_where_the_caller_wants_it_or_nowhere(self):
        seen = []
        LocalJob(on_show=seen.append).show(lambda: {"a": 1})
        LocalJob().show(lambda: pytest.fail("nobody looks"))
        assert seen == [{"a": 1}]


class TestDevices:
    def test_listed_gpus(self):
        listing = "GPU 0: NVIDIA H200 (UUID: GPU-1a-2b)\nGPU 1: NVIDIA H200 (UUID: GPU-3c)\n"
        assert listed_gpus(listing) == ["GPU-1a-2b", "GPU-3c"]

    def test_the_parts_of_a_split_gpu_stand_for_it(self):
        listing = (
            "GPU 0: A (UUID: GPU-1)\nGPU 1: A (UUID: GPU-2)\n  MIG 1g.5gb Device 0: (UUID: MIG-x)\n"
            "  MIG 1g.5gb Device 1: (UUID: MIG-y)\n"
        )
        assert listed_gpus(listing) == ["GPU-1", "MIG-x", "MIG-y"]

    def test_the_device_is_described(self, runtime):
        (device,) = runtime.devices(timeout=PATIENCE)
        assert device.kind == device.device == "cpu"
        assert device.name
        assert device.total_bytes == 600 * 10**6
        assert 0 < device.free_bytes < device.total_bytes
        assert device.cores >= 1
        assert device.libraries["torch"].startswith("2.")


class TestAttempt:
    """The task's inside, in this process: the workers' coverage cannot be measured, and it is quicker."""

    @pytest.mark.parametrize(
        ("way", "kind", "words"),
        [
            ("raise", JobFailedError, "The job failed with ZeroDivisionError: seven by nothing."),
            ("input", InputError, "The text is empty: type a few words."),
            ("memory", JobFailedError, "The job ran out of memory: choose smaller settings."),
            ("sys.exit", JobFailedError, "The job failed with SystemExit: had enough."),
            ("lock", JobFailedError, "The job failed with TypeError: result is of type _thread.lock"),
        ],
    )
    def test_errors_become_sentences(self, way, kind, words):
        outcome = attempt("failing", {"way": way}, LocalJob())
        assert outcome.result is None
        assert type(outcome.error) is kind
        assert str(outcome.error).startswith(words)
        assert (outcome.trace is not None) == (way in ("raise", "sys.exit", "lock"))

    def test_what_cannot_fit_is_not_run(self, tmp_path):
        log = tmp_path / "log"
        values = {"claimed": 10**9, "log": str(log)}
        outcome = attempt("allocating", values, LocalJob())
        assert type(outcome.error) is DoesNotFitError
        assert "needs about 1000000.0 GB" in str(outcome.error)
        assert not log.exists()


class TestRuns:
    def test_a_result_comes_back(self, runtime):
        ticket = finished(submit(runtime, "counting", steps=5))
        assert ticket.state == "done"
        assert ticket.place == 0
        assert ticket.error is None
        np.testing.assert_array_equal(ticket.result().numbers, np.arange(5.0))
        with pytest.raises(ValueError, match="read-only"):
            ticket.result().numbers[0] = 1

    def test_progress_arrives_before_the_end(self, runtime):
        ticket = submit(runtime, "counting", steps=20, pause=0.05)
        seen = set()
        while not ticket.wait(0.01):
            if ticket.progress is not None:
                assert ticket.state in ("running", "done")  # it may end between two lines
                seen.add(ticket.progress.step)
        assert len(seen) >= 5
        assert ticket.progress == Progress(20, 20, {"square": 400.0})
        assert 1.0 <= ticket.seconds < 3.0

    @pytest.mark.parametrize("farewell", [0.0, 1.5])
    def test_a_cancelled_run_that_returns_what_it_has_is_done_with_that(self, runtime, farewell):
        """Even if it takes longer to stop than other experiments may."""
        assert farewell == 0 or experiments.get("stubborn").Params.stop_grace < farewell
        ticket = submit(runtime, "learning", farewell=farewell)
        until(lambda: ticket.progress is not None and ticket.progress.step >= 3)
        ticket.cancel()
        found = finished(ticket).result()
        assert 3 <= found.steps < 400
        assert not found.timed_out
        assert ticket.state == "done"

    def test_a_run_over_its_time_that_returns_what_it_has_is_done_with_that_and_knows_why(self, runtime):
        found = finished(submit(runtime, "learning", farewell=0.1)).result()
        assert 3 <= found.steps < 400
        assert found.timed_out

    def test_what_a_stopped_run_had_is_nobody_else_s_result(self, runtime):
        stopped = submit(runtime, "learning", farewell=0.2)
        until(lambda: stopped.progress is not None)
        stopped.cancel()
        finished(stopped)
        again = submit(runtime, "learning", farewell=0.2)
        assert again.state != "done"
        again.cancel()
        finished(again)

    def test_twenty_at_once_are_served_in_order(self, runtime, tmp_path):
        log = tmp_path / "log"
        tickets = [submit(runtime, "counting", f"owner-{n}", steps=n, pause=0.005, log=str(log)) for n in range(1, 21)]
        assert [ticket.place for ticket in tickets[5:]] == sorted(ticket.place for ticket in tickets[5:])
        assert tickets[-1].place >= 15
        places = [tickets[-1].place]
        while not tickets[-1].wait(0.002):
            places.append(tickets[-1].place)
        assert [finished(ticket).state for ticket in tickets] == ["done"] * 20
        assert places == sorted(places, reverse=True)
        assert len(set(places)) >= 5
        assert [int(line) for line in log.read_text().split()] == list(range(1, 21))

    def test_many_threads_submit_at_once(self, runtime):
        results = {}

        def learner(number):
            ticket = submit(runtime, "counting", f"thread-{number}", steps=100 + number % 5)
            results[number] = len(ticket.result().numbers)

        threads = [threading.Thread(target=learner, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert results == {number: 100 + number % 5 for number in range(20)}

    def test_lanes_do_not_wait_for_each_other(self, runtime):
        long = submit(runtime, "long_counting", steps=1000, pause=0.01)
        until(lambda: long.state == "running")
        assert finished(submit(runtime, "timed")).state == "done"
        assert long.state == "running"
        long.cancel()
        assert finished(long).state == "cancelled"

    def test_an_unknown_experiment_is_refused(self, runtime):
        with pytest.raises(InputError, match="no experiment 'nonsense'"):
            runtime.submit("nonsense", experiments.ExperimentParams(), OWNER)


class TestSharing:
    def test_an_equal_run_is_answered_from_the_cache(self, runtime, tmp_path):
        log = tmp_path / "log"
        first = finished(submit(runtime, "counting", steps=2, log=str(log))).result()
        again = submit(runtime, "counting", "bob", steps=2, log=str(log))
        assert again.state == "done"
        assert again.result() is first
        finished(submit(runtime, "counting", steps=3, log=str(log)))
        assert log.read_text().split() == ["2", "3"]

    def test_what_a_result_depends_on_beside_the_parameters_counts(self, runtime, tmp_path):
        note = tmp_path / "note"
        for nanoseconds, text in ((1, "old"), (2, "new")):
            note.write_text(text)
            os.utime(note, ns=(nanoseconds, nanoseconds))
            first = finished(submit(runtime, "noting", path=str(note)))
            assert first.result() == text
            note.write_text("unseen")
            os.utime(note, ns=(nanoseconds, nanoseconds))
            assert finished(submit(runtime, "noting", path=str(note))).result() == text

    def test_what_is_timed_is_run_again(self, runtime):
        first, second = (finished(submit(runtime, "timed")).result() for _ in range(2))
        assert first.nanoseconds != second.nanoseconds

    def test_one_of_those_who_share_a_run_may_leave(self, runtime, tmp_path):
        log = tmp_path / "log"
        ada, bob = (submit(runtime, "counting", owner, steps=20, pause=0.02, log=str(log)) for owner in ("ada", "bob"))
        until(lambda: ada.state == "running")
        ada.cancel()
        assert ada.state == "cancelled"
        assert ada.wait(0)
        with pytest.raises(JobCancelledError):
            ada.result()
        assert finished(bob).state == "done"
        assert log.read_text().split() == ["20"]

    def test_the_last_to_leave_stops_it_and_the_next_gets_a_new_run(self, runtime, tmp_path):
        log = tmp_path / "log"
        ada, bob = (submit(runtime, "counting", owner, steps=100, pause=0.02, log=str(log)) for owner in ("ada", "bob"))
        until(lambda: ada.state == "running")
        ada.cancel()
        bob.cancel()
        third = submit(runtime, "counting", "eve", steps=100, pause=0.02, log=str(log))
        assert finished(bob).state == "cancelled"
        assert bob.seconds < 1.5
        until(lambda: third.state == "running")
        third.cancel()
        finished(third)
        assert log.read_text().split() == ["100", "100"]


class TestStopping:
    def test_a_cancelled_job_stops_and_its_worker_lives(self, runtime):
        pid = worker_pid(runtime)
        ticket = submit(runtime, "counting", steps=500, pause=0.02)
        until(lambda: ticket.state == "running")
        ticket.cancel()
        ticket.cancel()
        assert finished(ticket).state == "cancelled"
        assert psutil.pid_exists(pid)
        with pytest.raises(JobCancelledError, match="cancelled"):
            ticket.result()

    def test_a_queued_job_is_dropped_and_the_others_move_up(self, runtime, tmp_path):
        log = tmp_path / "log"
        running = submit(runtime, "counting", steps=30, pause=0.02, log=str(log))
        until(lambda: running.state == "running")
        dropped, last = (submit(runtime, "counting", steps=steps, log=str(log)) for steps in (7, 8))
        assert (dropped.place, last.place) == (1, 2)
        dropped.cancel()
        assert dropped.state == "cancelled"
        assert last.place == 1
        assert finished(last).state == "done"
        assert log.read_text().split() == ["30", "8"]

    def test_who_ignores_cancellation_loses_the_worker_and_nobody_else_does(self, runtime):
        long = submit(runtime, "long_counting", steps=150, pause=0.02)
        ticket = submit(runtime, "stubborn")
        until(lambda: ticket.state == "running")
        waiting = submit(runtime, "counting", "bob", steps=11)
        start = time.monotonic()
        ticket.cancel()
        assert finished(ticket).state == "cancelled"
        assert 0.4 < time.monotonic() - start < 3
        assert finished(waiting).state == "done"
        assert finished(long).state == "done"

    def test_who_is_no_longer_wanted_may_end_without_costing_the_worker(self, runtime):
        pid = worker_pid(runtime)
        ticket = submit(runtime, "stubborn", seconds=1.5)
        until(lambda: ticket.state == "running")
        waiting = submit(runtime, "counting", "bob", steps=16)
        ticket.cancel(force=False)
        assert finished(ticket).state == "cancelled"
        assert ticket.seconds > 1.3
        assert finished(waiting).state == "done"
        assert worker_pid(runtime) == pid

    def test_it_is_asked_to_stop_all_the_same(self, runtime):
        ticket = submit(runtime, "counting", steps=501, pause=0.02)
        until(lambda: ticket.state == "running")
        ticket.cancel(force=False)
        assert finished(ticket).seconds < 3

    @pytest.mark.parametrize("way", ["its time limit", "its owner, who insists"])
    def test_patience_with_it_ends_with(self, runtime, way):
        pid = worker_pid(runtime)
        ticket = submit(runtime, "stubborn", seconds=59)
        until(lambda: ticket.state == "running")
        ticket.cancel(force=False)
        time.sleep(0.7)
        assert ticket.state == "running"
        if way == "its time limit":
            assert finished(ticket).seconds > 2
        else:
            ticket.cancel()
            assert finished(ticket).seconds < 2
        assert ticket.state == "cancelled"
        assert worker_pid(runtime) != pid

    def test_a_job_over_its_time_fails_with_the_limit_in_its_sentence(self, runtime):
        ticket = finished(submit(runtime, "stubborn", seconds=61))
        assert ticket.state == "failed"
        assert 2.0 <= ticket.seconds < 5.0
        assert ticket.error == "The job took longer than its limit of 2 s: choose smaller settings."
        with pytest.raises(JobFailedError):
            ticket.result()
        assert finished(submit(runtime, "timed")).state == "done"


class TestFaults:
    def test_a_killed_worker_fails_its_job_only(self, runtime, tmp_path):
        log = tmp_path / "log"
        pid = worker_pid(runtime)
        long = submit(runtime, "long_counting", steps=160, pause=0.02)
        ticket = submit(runtime, "counting", steps=1000, pause=0.02, log=str(log))
        queued = submit(runtime, "counting", "bob", steps=12)
        until(lambda: ticket.progress is not None and long.state == "running")
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        assert finished(ticket).state == "failed"
        assert time.monotonic() - start < 3
        assert ticket.error.startswith("The worker died while the job ran")
        assert finished(queued).state == "done"
        assert time.monotonic() - start < 15
        assert finished(long).state == "done"
        assert log.read_text().split() == ["1000"]  # it was not tried again

    def test_a_worker_that_exits_fails_its_job_with_a_sentence(self, runtime):
        ticket = finished(submit(runtime, "failing", way="exit"))
        assert ticket.state == "failed"
        assert ticket.error.startswith("The worker died while the job ran")
        assert finished(submit(runtime, "timed")).state == "done"

    def test_what_cannot_fit_is_refused_before_it_runs(self, runtime, tmp_path):
        log = tmp_path / "log"
        ticket = finished(submit(runtime, "allocating", claimed=900, log=str(log)))
        assert ticket.state == "failed"
        assert "needs about 0.9 GB" in ticket.error
        assert "GB free: choose smaller settings." in ticket.error
        with pytest.raises(DoesNotFitError):
            ticket.result()
        assert not log.exists()

    def test_weights_that_exceed_the_workers_share_are_refused(self, runtime):
        assert psutil.virtual_memory().available > 700 * 10**6
        with pytest.raises(DoesNotFitError, match="The weights of m"):
            finished(submit(runtime, "weighing", megabytes=600)).result()
        assert finished(submit(runtime, "weighing", megabytes=2)).result() == 2

    def test_who_takes_more_memory_than_there_is_fails_with_a_sentence(self, runtime):
        ticket = finished(submit(runtime, "allocating", taken=4000))
        assert ticket.state == "failed"
        assert ticket.error == "The job ran out of memory: choose smaller settings."
        assert finished(submit(runtime, "timed")).state == "done"

    def test_an_exception_is_one_sentence_here_and_a_traceback_in_the_log(self, runtime, caplog):
        with caplog.at_level(logging.ERROR, logger="engine.runtime"):
            ticket = finished(submit(runtime, "failing", way="raise"))
        assert ticket.error == "The job failed with ZeroDivisionError: seven by nothing."
        assert "Traceback" in caplog.text
        assert "failing.py" in caplog.text

    def test_an_error_for_people_arrives_as_itself(self, runtime, caplog):
        with pytest.raises(InputError, match=r"The text is empty: type a few words\."):
            submit(runtime, "failing", way="input").result()
        assert "Traceback" not in caplog.text


class TestOwners:
    def test_who_leaves_takes_queued_and_running_jobs_along(self, runtime):
        running = submit(runtime, "counting", "gone", steps=500, pause=0.02)
        queued = submit(runtime, "counting", "gone", steps=13)
        shared = [submit(runtime, "counting", owner, steps=14) for owner in ("gone", "bob")]
        until(lambda: running.state == "running")
        runtime.release("gone")
        time.sleep(0.2)
        assert running.state == "running"
        assert finished(running).state == "cancelled"
        assert finished(queued).state == "cancelled"
        assert [finished(ticket).state for ticket in shared] == ["cancelled", "done"]

    def test_who_leaves_does_not_take_the_worker_along(self, runtime):
        pid = worker_pid(runtime)
        ticket = submit(runtime, "stubborn", "gone", seconds=1.8)
        until(lambda: ticket.state == "running")
        runtime.release("gone")
        assert finished(ticket).state == "cancelled"
        assert worker_pid(runtime) == pid

    @pytest.mark.parametrize("sign_of_life", ["keep", "submit"])
    def test_who_comes_back_in_time_keeps_them(self, runtime, sign_of_life):
        ticket = submit(runtime, "counting", "back", steps=60 + len(sign_of_life), pause=0.02)
        until(lambda: ticket.state == "running")
        runtime.release("back")
        time.sleep(0.1)
        if sign_of_life == "keep":
            runtime.keep("back")
        else:
            submit(runtime, "timed", "back")
        assert finished(ticket).state == "done"
        assert ticket.seconds > 0.9


def script(body, **popen):
    """A web process of its own that runs `body` with a started `runtime`."""
    code = textwrap.dedent(
        """
        import json, os, signal, sys, time
        import psutil
        from engine import experiments
        from engine.runtime import Runtime
        runtime = Runtime.start(threads=1)
        runtime.devices(timeout=None)
        print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
        """
    ) + textwrap.dedent(body)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd="/", **popen
    )


def gone(pids, patience):
    alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], patience)[1]
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return not alive


@pytest.mark.gpu
class TestGPU:
    """One cluster on the GPUs: what they are, and that running out of their memory costs one job."""

    def test_every_gpu_is_described(self, gpu_runtime):
        described = gpu_runtime.devices(timeout=2 * PATIENCE)
        assert len(described) == len(visible_gpus())
        assert {(device.kind, device.device) for device in described} == {("cuda", "cuda:0")}
        assert all(0 < device.free_bytes <= device.total_bytes for device in described)

    def test_out_of_gpu_memory_is_a_sentence_and_the_memory_comes_back(self, gpu_runtime):
        for _ in range(2):
            ticket = submit(gpu_runtime, "gpu_memory", gigabytes=10_000)
            assert ticket.wait(2 * PATIENCE)
            assert ticket.error == "The job ran out of memory: choose smaller settings."
        assert finished(submit(gpu_runtime, "gpu_memory", gigabytes=1)).result() < 0.5e9

    def test_a_spoiled_context_costs_one_job(self, gpu_runtime):
        ticket = submit(gpu_runtime, "gpu_memory", assertion=True)
        assert ticket.wait(2 * PATIENCE)
        assert ticket.state == "failed"
        following = submit(gpu_runtime, "gpu_memory", gigabytes=2)
        assert following.wait(2 * PATIENCE)
        assert following.state == "done"


class TestLife:
    def test_nothing_is_left_when_python_exits_with_jobs_under_way(self):
        process = script(
            """
            params = experiments.parse("stubborn", {})
            ticket = runtime.submit("stubborn", params, "ada")
            while ticket.state != "running":
                time.sleep(0.01)
            assert not {"torch", "transformers"} & set(sys.modules)
            """
        )
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        pids = json.loads(output.splitlines()[0])
        assert len(pids) >= 5  # a scheduler, two nannies, two workers
        assert gone(pids, patience=2)

    def test_nothing_is_left_when_the_web_process_is_killed(self):
        process = script("time.sleep(600)")
        pids = json.loads(process.stdout.readline())
        process.kill()
        process.wait()
        process.stdout.close()
        assert gone(pids, patience=10)

    def test_nobody_outside_this_computer_can_reach_the_cluster(self, runtime):
        runtime.devices(timeout=PATIENCE)
        processes = psutil.Process().children(recursive=True)
        sockets = [socket for process in processes for socket in process.net_connections("inet")]
        listening = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
        assert len(listening) >= 5
        assert set(listening) == {"127.0.0.1"}

    def test_importing_the_runtime_does_not_import_torch(self):
        code = "import sys, engine.runtime, engine.experiments; print({'torch', 'transformers'} & set(sys.modules))"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert answer.stdout.strip() == "set()"

    def test_a_closed_runtime_says_so(self, labs):
        runtime = Runtime.start(threads=1)
        ticket = submit(runtime, "counting", steps=1000, pause=0.1)
        runtime.close()
        runtime.close()
        assert finished(ticket).error.startswith("The workbench is shutting down")
        with pytest.raises(WorkbenchError, match="shutting down"):
            submit(runtime, "timed")

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tls://127.0.0.1:1", "nonsense://"])
    def test_an_unreachable_scheduler_is_one_sentence(self, monkeypatch, address):
        monkeypatch.setattr("engine.runtime.service.CONNECT_TIMEOUT", 0.5)
        monkeypatch.setenv("WORKBENCH_SCHEDULER", address)
        with pytest.raises(WorkbenchError) as caught:
            Runtime.start()
        assert str(caught.value).startswith(f"The Dask scheduler at {address} cannot be reached")
        assert "\n" not in str(caught.value)

    def test_a_lost_scheduler_fails_what_runs_and_is_replaced(self, labs, monkeypatch):
        monkeypatch.setattr("engine.runtime.service.CONNECT_TIMEOUT", 0.5)
        monkeypatch.setattr("engine.runtime.service.CARE_INTERVAL", 0.2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        runtime = Runtime.start(threads=1)
        running = submit(runtime, "counting", steps=1000, pause=0.05)
        until(lambda: running.state == "running")
        queued = submit(runtime, "counting", steps=2)
        runtime._cluster.scheduler.process.kill()
        assert finished(running).error.startswith("The connection to the workers was lost")
        assert finished(queued).error == running.error
        until(lambda: finished(submit(runtime, "counting", steps=3)).state == "done")
        runtime.close()

    def test_an_existing_cluster_is_used(self, runtime):
        guest = Runtime.start(runtime._cluster.scheduler_address)
        assert finished(submit(guest, "counting", steps=15)).state == "done"
        guest.close()
        assert finished(submit(runtime, "timed")).state == "done"
