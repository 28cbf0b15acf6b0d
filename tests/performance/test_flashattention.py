"""FlashAttention and standard attention on a CPU: equal, and smaller; a GPU is asked in test_measured_targets.py."""

from functools import partial

import pytest
import torch

from engine import FlashAttention, StandardAttention
from engine.measure import peak_memory


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("shape", [(2, 4, 128, 64), (1, 8, 512, 64), (2, 2, 1000, 128), (1, 1, 2048, 32)], ids=str)
def test_on_a_cpu_they_are_equal(shape):
    for seed in range(2):
        tensors = drawn(*shape, seed=seed)
        for causal in (False, True):
            standard, flash = StandardAttention(shape[-1], causal), FlashAttention(shape[-1], causal)
            torch.testing.assert_close(flash(*tensors), standard(*tensors), atol=1e-6, rtol=1e-5)


def test_on_a_cpu_memory_is_linear_and_not_quadratic():
    standard, flash = StandardAttention(64), FlashAttention(64)
    weights = 4 * 4 * 2048**2
    tensors = drawn(1, 4, 2048, 64)
    assert peak_memory(lambda: standard(*tensors), "cpu") >= weights
    small, large = (peak_memory(partial(flash, *drawn(1, 4, length, 64)), "cpu") for length in (1024, 2048))
    assert large < 0.3 * weights
    assert large < 2.5 * small
