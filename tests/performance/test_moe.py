"""A mixture of experts at a size that counts: as fast as is asked on a GPU, in fixed order, with no wait for it."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.measure import measure_time, peak_memory
from engine.moe.feed_forward import MoEFeedForward
from engine.moe.lora import MoELoRALinear
from tests.benchmarks import moe_feed_forward, moe_lora

ROOT = Path(__file__).parents[2]
DTYPE = torch.bfloat16


def median_ms(function):
    with torch.no_grad():
        return measure_time(function, "cuda", dtype=DTYPE, shape="").median_ms


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe_feed_forward", "moe_lora"])
def test_the_benchmark_runs_small_on_a_cpu(name, tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--device", "cpu", "--small", "--json", str(record)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-2000:]
    assert "all as it should be" in completed.stdout
    assert '"median_ms"' in record.read_text(encoding="utf-8")


@pytest.mark.gpu
def test_the_layer_reaches_500_tflops():
    size = moe_feed_forward.LARGE
    layer, x, _ = moe_feed_forward.drawn(size, True, "cuda")
    tflops = size.flops("forward") / median_ms(partial(layer, x)) / 1e9
    assert tflops >= moe_feed_forward.TARGET, tflops


@pytest.mark.gpu
def test_the_layer_is_faster_than_a_plain_loop():
    layer, x, _ = moe_feed_forward.drawn(moe_feed_forward.LARGE, True, "cuda")
    ours, loop = (median_ms(partial(way, x)) for way in (layer, partial(moe_feed_forward.unfused_loop, layer)))
    assert loop > 1.4 * ours, (loop, ours)


@pytest.mark.gpu
def test_an_uneven_load_costs_little():
    ours = []
    for even in (True, False):
        layer, x, _ = moe_feed_forward.drawn(moe_feed_forward.LARGE, even, "cuda")
        ours.append(median_ms(partial(layer, x)))
    assert ours[1] < 1.3 * ours[0], ours


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    layer, x, upstream = moe_feed_forward.drawn(moe_feed_forward.SMALL, True, "cuda")
    layer(x).backward(upstream)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_run_repeats_to_the_bit():
    layer, x, upstream = moe_feed_forward.drawn(moe_feed_forward.SMALL, False, "cuda")
    leaves = (x, *layer.parameters())
    y = layer(x)
    first = [y, *torch.autograd.grad(y, leaves, upstream)]
    for _ in range(5):
        y = layer(x)
        for one, other in zip(first, (y, *torch.autograd.grad(y, leaves, upstream)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_experts_without_tokens_have_gradients_of_zero(dtype):
    torch.manual_seed(0)
    layer = MoEFeedForward(64, 128, 16, 1).to("cuda", dtype)
    x = torch.randn(1, 3, 64, device="cuda", dtype=dtype)
    for _ in range(3):
        poison = torch.full((2**22,), float("nan"), device="cuda")  # what a kernel leaves out would show
        del poison
        layer.zero_grad()
        y = layer(x)
        y.sum().backward()
        idle = torch.ones(16, dtype=torch.bool, device="cuda")
        idle[layer.router.route(x).experts] = False
        assert idle.sum() >= 13
        assert y.isfinite().all()
        for weights in (layer.gate_up_proj, layer.down_proj):
            assert (weights.grad[idle] == 0).all()
            assert weights.grad.isfinite().all()


@pytest.mark.gpu
def test_a_mixture_of_lora_adds_no_more_than_the_base_layer_takes():
    size = moe_lora.FORWARD
    base = torch.nn.Linear(size.in_features, size.out_features, bias=False).to("cuda", DTYPE)
    x = torch.randn(size.num_tokens, size.in_features, device="cuda").to(DTYPE)
    whole = MoELoRALinear(base, moe_lora.mixture(size, "cuda"))
    base_ms, whole_ms = (median_ms(partial(moe_lora.captured(way, x), x)) for way in (base, whole))
    assert whole_ms <= 2 * base_ms, (whole_ms, base_ms)


@pytest.mark.gpu
def test_a_step_of_128_lora_experts_computes_faster_and_needs_less_than_pefts():
    """Its kernels, that is: with 256 separate parameters the whole step is bound by the CPU and takes about 4 ms."""
    size = moe_lora.TRAINING
    layer = moe_lora.mixture(size, "cuda")
    x = torch.randn(size.num_tokens, size.in_features, device="cuda").to(DTYPE).requires_grad_()
    upstream = torch.randn(size.num_tokens, size.out_features, device="cuda").to(DTYPE)
    step = moe_lora.step(layer, x, upstream)
    step()
    assert 0 < moe_lora.kernels_ms(step) < moe_lora.TARGET_MS
    assert peak_memory(step, "cuda") < moe_lora.TARGET_BYTES
