"""Attention forward within its bounds: on a GPU both of them, on the CPU what it allocates."""

import pytest
import torch

from engine import MultiHeadAttention
from engine.masks import causal, materialize
from engine.measure import measure_time, peak_memory


def forward(length, device):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(512, 8).to(device).eval(), torch.randn(1, length, 512, device=device)
    mask = materialize(causal, length, device=device)

    def run():
        with torch.inference_mode():
            layer(x, x, x, mask)

    run()
    return run


@pytest.mark.parametrize("length", [128, 512, 1024])
def test_memory_stays_below_100_mb(length):
    assert peak_memory(forward(length, "cpu"), "cpu") <= 100e6


@pytest.mark.gpu
@pytest.mark.parametrize("length", [128, 512, 1024])
def test_a_gpu_takes_at_most_10_ms_and_100_mb(length):
    run = forward(length, "cuda")
    assert measure_time(run, "cuda", dtype=torch.float32, shape="-").median_ms <= 10
    assert peak_memory(run, "cuda") <= 100e6
