"""What the targets page measures is within its bounds: on a GPU all of it, on the CPU what attention allocates."""

import pytest

from engine.runtime.jobs import LocalJob
from engine.targets.measures import measure
from engine.targets.target import read_targets

TARGETS = read_targets()
ATTENTION = [target for target in TARGETS if target.group == "attention"]


def parametrized(targets):
    return pytest.mark.parametrize("target", targets, ids=lambda target: target.key)


def test_there_is_a_time_and_a_memory_of_three_lengths():
    assert len(ATTENTION) == 6
    assert {target.settings["length"] for target in ATTENTION} == {128, 512, 1024}


@parametrized([target for target in ATTENTION if target.quantity == "attention memory"])
def test_memory_is_within_its_bound_and_holds_the_weights(target):
    found = measure(target, LocalJob("cpu"))
    weights = 4 * target.settings["num_heads"] * target.settings["length"] ** 2
    assert found.value >= weights / 1e6
    assert target.bound.holds(found.value)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # kernels are compiled and chosen, and cold calls have processes of their own
@parametrized([target for target in TARGETS if target.group in ("attention", "gpu")])
def test_a_gpu_keeps_every_bound_on_time_and_memory(target):
    assert target.bound.holds(measure(target, LocalJob("cuda")).value)
