"""The kernel computes the grouped product, with gathering before and gating after it.

Where there is no GPU the checks run through Triton's interpreter, which must be chosen before Triton is imported: in a
process of its own, `python -m tests.unit.test_moe_grouped_triton`.
"""

import pytest
import torch
from torch.nn import functional as F

from engine.moe.grouped import Groups
from tests.interpreter import report, run_in_interpreter

COUNTS = ([3, 4, 5], [0, 12, 0], [12, 0, 0], [0, 0, 12], [1, 40, 0, 17], [0, 0], [16, 32])
SIZES = ((16, 32), (32, 16), (40, 24), (64, 48))  # inputs, outputs


def launches(device):
    from tests.benchmarks.grouped_triton import LAUNCHES, Launch

    if device == "cpu":
        return tuple(Launch(16, 16, 16, 1, 1, described) for described in (False, True))
    return (*LAUNCHES, Launch(64, 64, 32, 4, 3, False))


def dtypes(device):
    """The interpreter multiplies bfloat16 as if its bits were integers."""
    return (torch.float16,) if device == "cpu" else (torch.float16, torch.bfloat16)


def drawn(counts, inputs, outputs, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), inputs, generator=generator)
    weights = torch.randn(len(counts), outputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(9, inputs, generator=generator)
    tokens = torch.randint(9, (sum(counts),), generator=generator)
    moved = [each.to(device, dtype) for each in (rows, weights, x)]
    return *moved, tokens.to(device), torch.tensor(counts, device=device)


def exactly(rows, weights, counts, gated):
    parts = zip(rows.double().split(counts.tolist()), weights.double(), strict=True)
    y = torch.cat([part @ weight.T for part, weight in parts])
    gate, up = y.chunk(2, dim=1)
    return F.silu(gate) * up if gated else y


def check(found, exact, dtype):
    assert found.shape == exact.shape
    assert found.dtype == dtype
    if found.numel():
        assert (found.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * max(1, exact.abs().max().item())


def check_it_is_each_experts_own_product(device):
    from tests.benchmarks.grouped_triton import expert_product

    for seed, counts in enumerate(COUNTS):
        for inputs, outputs in SIZES:
            for dtype in dtypes(device):
                rows, weights, x, tokens, given = drawn(counts, inputs, outputs, dtype, device, seed)
                for launch in launches(device):
                    for gated in (False, True):
                        found = expert_product(rows, weights.mT, Groups(given), gated=gated, launch=launch)
                        check(found, exactly(rows, weights, given, gated), dtype)
                        found = expert_product(x, weights.mT, Groups(given), tokens=tokens, gated=gated, launch=launch)
                        check(found, exactly(x[tokens], weights, given, gated), dtype)


def check_more_rows_than_a_band(device):
    from tests.benchmarks.grouped_triton import BAND, LAUNCHES, Launch, expert_product

    launch = Launch(16, 16, 16, 1, 1, False) if device == "cpu" else LAUNCHES[0]
    counts = [5, launch.rows * (BAND + 2) + 3, 2]
    rows, weights, _, _, given = drawn(counts, 16, 48, torch.float16, device, 3)
    found = expert_product(rows, weights.mT, Groups(given), launch=launch)
    check(found, exactly(rows, weights, given, False), torch.float16)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted():
    """What failed in the interpreter, by the check's name."""
    return run_in_interpreter("tests.unit.test_moe_grouped_triton")


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(interpreted, name):
    assert interpreted[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name):
    CHECKS[name]("cuda")


if __name__ == "__main__":
    report(CHECKS)
