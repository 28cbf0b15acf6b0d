"""Memory as a process may use it: all of the host's, or what it is limited to."""

import psutil
import pytest
import torch

from engine import checkpoints, memory
from engine.errors import DoesNotFitError
from engine.runtime import devices

MIB = 2**20


@pytest.fixture
def room():
    """This process may take 64 MiB more than it has."""
    memory.limit_host(psutil.Process().memory_info().rss + 64 * MIB)
    yield 64 * MIB
    memory.limit_host(None)


def test_without_a_limit_it_is_the_hosts():
    assert memory.total("cpu") == psutil.virtual_memory().total
    assert 0 < memory.free("cpu") < memory.total("cpu")


def test_a_limit_counts_what_the_process_has_already(room):
    assert 0.5 * room < memory.free("cpu") <= room
    assert memory.total("cpu") == pytest.approx(room + psutil.Process().memory_info().rss, rel=0.05)


def test_who_is_over_the_limit_has_nothing_left():
    memory.limit_host(MIB)
    try:
        assert memory.free("cpu") == 0
    finally:
        memory.limit_host(None)


def test_a_limit_beyond_the_host_changes_nothing():
    memory.limit_host(2**60)
    try:
        assert memory.total("cpu") == psutil.virtual_memory().total
        assert memory.free("cpu") < memory.total("cpu")
    finally:
        memory.limit_host(None)


def test_weights_and_runs_are_refused_by_the_same_limit(room):
    fits, too_many = room // 8, room // 4 + 1  # parameters of 4 bytes
    checkpoints.check_fits("m", fits, "cpu", torch.float32)
    devices.check_fits(4 * fits, "cpu")
    with pytest.raises(DoesNotFitError, match="float32"):
        checkpoints.check_fits("m", too_many, "cpu", torch.float32)
    with pytest.raises(DoesNotFitError, match="smaller settings"):
        devices.check_fits(4 * too_many, "cpu")


@pytest.mark.gpu
def test_what_the_allocator_keeps_in_reserve_is_free_and_the_hosts_limit_is_not_the_gpus(room):
    before = memory.free("cuda:0")
    block = torch.empty(256 * MIB, device="cuda", dtype=torch.uint8)
    assert memory.free("cuda:0") <= before - 200 * MIB
    del block
    assert memory.free("cuda:0") >= before - 64 * MIB
    assert memory.total("cuda:0") > memory.free("cuda:0") > room
