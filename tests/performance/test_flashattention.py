"""FlashAttention against standard attention: equal on a CPU and smaller there, faster and smaller on a GPU."""

from functools import partial

import pytest
import torch

from engine import FlashAttention, StandardAttention
from engine.measure import peak_memory
from engine.targets.attention import cold_calls


def drawn(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device) for _ in range(3)]


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


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["Flash", "Standard"])
def test_ten_cold_calls_are_more_than_one_and_a_half_times_as_fast(first):
    seconds = cold_calls(first)
    assert seconds["StandardAttention"] > 1.5 * seconds["FlashAttention"], seconds


@pytest.mark.gpu
def test_peak_memory_is_more_than_a_fifth_lower():
    tensors = drawn(1, 4, 4096, 64, device="cuda")
    standard, flash = StandardAttention(64), FlashAttention(64, calls_before_measuring=0)
    for layer in (standard, flash):
        layer(*tensors)
    most, least = (peak_memory(lambda layer=layer: layer(*tensors), "cuda") for layer in (standard, flash))
    assert least < 0.8 * most
