"""Measurements of things whose time and size are known."""

import gc
import importlib.metadata
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from engine import measure
from engine.measure import ceilings, exclusive, is_held, lock_path, measure_time, peak_memory


def test_a_sleep_takes_its_time():
    evidence = measure_time(lambda: time.sleep(0.02), "cpu", dtype=torch.float32, shape="a sleep of 20 ms", runs=5)
    assert 19 < evidence.median_ms < 60
    assert evidence.low_ms <= evidence.median_ms <= evidence.high_ms
    assert (evidence.runs, evidence.dtype) == (5, "float32")
    assert evidence.versions["torch"] == torch.__version__


def test_packages_of_kernels_are_named_where_they_take_part(monkeypatch):
    installed = {"triton": "3.6.0", "flash-attn-4": "4.0.0b36"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    measure._kernel_packages.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert measure.versions().items() >= (installed | {"cuda": "13.0"}).items()
    assert all(type(each) is str for each in measure.versions().values())
    assert not measure.versions().keys() & {"flash-attn", "flash-attn-3"}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert measure.versions().keys() == {"python", "torch"}
    measure._kernel_packages.cache_clear()


def test_what_happens_only_the_first_time_is_not_timed():
    calls = []

    def slow_at_first():
        calls.append(1)
        time.sleep(0.1 if len(calls) == 1 else 0)

    evidence = measure_time(slow_at_first, "cpu", dtype=torch.float32, shape="-", runs=3)
    assert len(calls) > evidence.runs == 3
    assert evidence.high_ms < 50


def test_too_few_runs_have_no_spread():
    with pytest.raises(ValueError, match="2"):
        measure_time(lambda: None, "cpu", dtype=torch.float32, shape="-", runs=2)


@pytest.mark.parametrize("megabytes", [4, 32])
def test_peak_memory_counts_what_is_alive_at_once(megabytes):
    count = megabytes * 2**20 // 4

    def one_after_the_other():
        for _ in range(3):
            torch.empty(count)

    def both_at_once():
        return torch.empty(count), torch.empty(count)

    assert peak_memory(one_after_the_other, "cpu") == pytest.approx(megabytes * 2**20, rel=0.01)
    assert peak_memory(both_at_once, "cpu") == pytest.approx(2 * megabytes * 2**20, rel=0.01)


@pytest.mark.parametrize("alone", [True, False])
def test_what_was_garbage_before_is_not_subtracted(alone):
    def drop():
        cycle = [torch.ones(2**21)]  # 8 MB
        cycle.append(cycle)

    def allocate():
        gc.collect()
        torch.empty(2**20)

    gc.disable()
    try:
        drop()
        assert peak_memory(allocate, "cpu", alone=alone) == 4 * 2**20
    finally:
        gc.enable()


def test_what_is_weighed_has_the_device_unless_it_measures_itself():
    held = []
    for alone in (True, False):
        peak_memory(lambda: held.append(is_held("cpu")), "cpu", alone=alone)
    assert held == [True, False]


def test_measurements_wait_for_each_other():
    order = []

    def second():
        with exclusive("cpu"):
            order.append("second")

    with exclusive("cpu"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_measurement_may_contain_another_one():
    assert not is_held("cpu")
    with exclusive("cpu"):
        assert is_held("cpu")
        measure_time(lambda: None, "cpu", dtype=torch.float32, shape="-", runs=3)
        assert is_held("cpu")
    assert not is_held("cpu")


def test_whoever_cannot_wait_says_so():
    found = []

    def second():
        try:
            with exclusive("cpu", timeout=0.05):
                found.append("held")
        except TimeoutError:
            found.append("too long")

    with exclusive("cpu"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(10)
    assert found == ["too long"]


def test_what_a_measurement_does_in_other_threads_is_a_part_of_it():
    """As a backward pass is, whose threads are autograd's own."""
    found = []
    with exclusive("cpu"):
        thread = threading.Thread(target=lambda: found.append(is_held("cpu")))
        thread.start()
        thread.join(10)
    assert found == [True]


def test_a_child_holds_nothing():
    with exclusive("cpu"):
        child = os.fork()
        if child == 0:
            os._exit(is_held("cpu"))
        assert os.waitpid(child, 0)[1] == 0
        assert is_held("cpu")


def test_what_another_process_holds_is_not_held_here():
    with FileLock(lock_path("cpu")):
        assert not is_held("cpu")
        with pytest.raises(TimeoutError), exclusive("cpu", timeout=0.05):
            pass
        assert not is_held("cpu")


def test_every_gpu_has_one_lock_whatever_it_is_called(monkeypatch):
    def properties(device):
        return SimpleNamespace(uuid=f"gpu-{visible[device.index or 0]}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    visible = range(8)
    assert len({lock_path(device) for device in ["cpu", *(f"cuda:{index}" for index in visible)]}) == 9
    assert lock_path("cuda") == lock_path("cuda:0")
    third = lock_path("cuda:3")
    visible = [3]  # as a worker sees it
    assert lock_path("cuda:0") == third


def test_two_users_do_not_share_a_file(monkeypatch):
    mine = lock_path("cpu")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert lock_path("cpu") != mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ceilings_are_of_what_was_timed_and_no_size_beats_them_by_far(dtype):
    found = ceilings("cpu", dtype)
    side, elements = 512, 2**24
    a, source = torch.randn(side, side).to(dtype), torch.ones(elements, dtype=dtype)
    target = torch.empty_like(source)
    layouts = (a, a.mT)  # of which one may be ten times as slow, where the processor knows no bfloat16
    product = min(measure_time(lambda b=b: a @ b, "cpu", dtype=dtype, shape="-", runs=5).low_ms for b in layouts)
    copy = measure_time(lambda: target.copy_(source), "cpu", dtype=dtype, shape="-", runs=5)
    assert 1 / 10 < 2 * side**3 / product * 1e3 / found.flops < 10
    assert 1 / 10 < 2 * source.nbytes / copy.low_ms * 1e3 / found.bandwidth < 10
    assert found.copy.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_cpus_ceilings_take_a_moment_even_where_half_precision_is_slow(dtype):
    found = ceilings("cpu", dtype)
    assert found.product.median_ms < 300
    assert found.copy.median_ms < 300


def test_of_several_measurements_the_best_ceilings_count(monkeypatch):
    def evidence(shape):
        return measure.Evidence(1.0, 1.0, 1.0, 5, "-", "-", "float64", shape, {})

    measured = [(2.0, 5.0), (3.0, 4.0), (1.0, 1.0)]
    found = [measure.Ceilings(*pair, evidence(f"product {pair}"), evidence(f"copy {pair}")) for pair in measured]
    monkeypatch.setattr(measure, "_measure_ceilings", lambda device, dtype: found.pop(0))
    monkeypatch.setattr(measure, "_highest", {})
    ceilings("cpu", torch.float64), ceilings("cpu", torch.float64)
    best = ceilings(torch.device("cpu"), torch.float64)
    assert (best.flops, best.bandwidth) == (3.0, 5.0)
    assert (best.product.shape, best.copy.shape) == ("product (3.0, 4.0)", "copy (2.0, 5.0)")


@pytest.mark.gpu
def test_a_gpus_ceilings_are_within_reach():
    found = ceilings("cuda", torch.bfloat16)
    assert 50e12 < found.flops < 5e15
    assert 0.2e12 < found.bandwidth < 20e12


@pytest.mark.gpu
def test_cuda_waits_for_the_device_and_counts_its_bytes():
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    evidence = measure_time(lambda: x @ x, "cuda", dtype=x.dtype, shape="8192³ product")
    tflops = 2 * 8192**3 / evidence.median_ms * 1e-9
    assert 50 < tflops < 5000  # a launch alone would look thousands of times faster
    assert peak_memory(lambda: torch.empty(2**26, device="cuda", dtype=torch.uint8), "cuda") == 2**26
