"""FlashAttention against standard attention: equal on a CPU and smaller there, faster and smaller on a GPU."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from engine import FlashAttention, StandardAttention
from engine.measure import peak_memory

ROOT = Path(__file__).parents[2]
TEN_COLD_CALLS = """
import json, sys, time
import torch
from engine import FlashAttention, StandardAttention

torch.manual_seed(0)
Q, K, V = (torch.randn(2, 8, 2048, 64, device="cuda") for _ in range(3))
torch.cuda.synchronize()
seconds = {}
layers = (FlashAttention, StandardAttention)
for layer in layers if sys.argv[1] == "Flash" else layers[::-1]:
    module = layer(64).cuda()
    start = time.perf_counter()
    for _ in range(10):
        module(Q, K, V)
    torch.cuda.synchronize()
    seconds[layer.__name__] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def drawn(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device) for _ in range(3)]


def ten_cold_calls(first):
    """Seconds of ten calls of each layer in a process of its own, by the layer's name."""
    command = [sys.executable, "-c", TEN_COLD_CALLS, first]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    return json.loads(completed.stdout.splitlines()[-1])


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
    seconds = ten_cold_calls(first)
    assert seconds["StandardAttention"] > 1.5 * seconds["FlashAttention"], seconds


@pytest.mark.gpu
def test_peak_memory_is_more_than_a_fifth_lower():
    tensors = drawn(1, 4, 4096, 64, device="cuda")
    standard, flash = StandardAttention(64), FlashAttention(64)
    for layer in (standard, flash):
        layer(*tensors)
    most, least = (peak_memory(lambda layer=layer: layer(*tensors), "cuda") for layer in (standard, flash))
    assert least < 0.8 * most
