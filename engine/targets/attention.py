"""Attention against its targets.

Legend: B batch, H heads, T tokens, d head width, D model width.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from engine.attention import MultiHeadAttention
from engine.errors import JobCancelledError, WorkbenchError
from engine.flash.attention import FlashAttention, StandardAttention
from engine.masks import causal, materialize
from engine.measure import exclusive, measure_time, peak_memory
from engine.targets.target import ROOT, Figure

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

_COLD_CALLS = """
import json, sys, time
import torch
from engine import FlashAttention, StandardAttention

calls, *shape = json.loads(sys.argv[2])
device = torch.device(sys.argv[3])
if device.index is not None:
    torch.cuda.set_device(device)
torch.manual_seed(0)
Q, K, V = (torch.randn(shape, device="cuda") for _ in range(3))
torch.cuda.synchronize()
seconds = {}
layers = (FlashAttention, StandardAttention)
for layer in layers if sys.argv[1] == "Flash" else layers[::-1]:
    module = layer(shape[-1]).cuda()
    start = time.perf_counter()
    for _ in range(calls):
        module(Q, K, V)
    torch.cuda.synchronize()
    seconds[layer.__name__] = time.perf_counter() - start
print(json.dumps(seconds))
"""

_LONGEST = 100.0
"""Seconds that such a process may take: less than a job that was cancelled is waited for."""


def forward_time(job: Job, length: int, d_model: int, num_heads: int, dtype: torch.dtype = torch.float32) -> Figure:
    """Milliseconds of a forward pass of one causal sequence, its weights returned."""
    forward = _forward(job.device, length, d_model, num_heads, dtype)
    found = measure_time(forward, job.device, dtype=dtype, shape=f"(1, {length}, {d_model}), {num_heads} heads, causal")
    return Figure(found.median_ms, found.low_ms, found.high_ms, found.runs)


def forward_memory(job: Job, length: int, d_model: int, num_heads: int, dtype: torch.dtype = torch.float32) -> Figure:
    """Megabytes of 10⁶ bytes that the same pass allocates at its peak."""
    forward = _forward(job.device, length, d_model, num_heads, dtype)
    forward()  # what a first call allocates for good, a workspace say, is not the pass's
    return Figure(peak_memory(forward, job.device) / 1e6)


def cold_speedup(job: Job, shape: tuple[int, int, int, int], calls: int, rounds: int) -> Figure:
    """How many times as fast the first calls of a process are with `FlashAttention` as with `StandardAttention`.

    Args:
        job: where to measure, on CUDA.
        shape: (B, H, T, d), in float32.
        calls: of each layer.
        rounds: of two processes each, one with either layer first.

    Returns:
        The median of the order in which that is less: who comes first warms up the device for the other, so that the
        two orders have no common middle.

    Raises:
        JobCancelledError: the job was stopped.
        WorkbenchError: as `cold_calls`.
    """
    ratios: dict[str, list[float]] = {}
    for done in range(rounds):
        for first in ("Flash", "Standard"):
            if job.cancelled:
                raise JobCancelledError("Cancelled.")
            seconds = cold_calls(first, shape, calls, job.device)
            ratio = seconds["StandardAttention"] / seconds["FlashAttention"]
            ratios.setdefault(f"{first}Attention first", []).append(ratio)
        job.report(done + 1, rounds)
    return Figure.of_worst(ratios, "processes")


def cold_calls(
    first: Literal["Flash", "Standard"],
    shape: tuple[int, int, int, int] = (2, 8, 2048, 64),
    calls: int = 10,
    device: str = "cuda",
) -> dict[str, float]:
    """Seconds that the calls of each layer take in a process of its own, which has the device, by the layer's name.

    Args:
        first: which layer comes first: it warms up the device for the other.
        shape: (B, H, T, d), in float32.
        calls: of each layer.
        device: torch device, on CUDA.

    Raises:
        WorkbenchError: the process failed, or took longer than any should.
    """
    command = [sys.executable, "-c", _COLD_CALLS, first, json.dumps([calls, *shape]), device]
    with exclusive(device):
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_LONGEST)
        except subprocess.TimeoutExpired as error:
            raise WorkbenchError(f"The process that makes the cold calls took more than {_LONGEST:g} s.") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise WorkbenchError(f"The process that makes the cold calls ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_saving(job: Job, shape: tuple[int, int, int, int]) -> Figure:
    """By how many per cent the peak memory of `FlashAttention` is below that of `StandardAttention`, in float32."""
    torch.manual_seed(0)
    Q, K, V = (torch.randn(shape, device=job.device) for _ in range(3))  # (B, H, T, d)
    peaks = []
    for layer in (StandardAttention(shape[-1]), FlashAttention(shape[-1], calls_before_measuring=0)):
        layer(Q, K, V)  # compiles, and chooses among kernels, which is not done while something is measured
        peaks.append(peak_memory(lambda layer=layer: layer(Q, K, V), job.device))
    standard, flash = peaks
    return Figure(100 * (1 - flash / standard))


def _forward(device: str, length: int, d_model: int, num_heads: int, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = MultiHeadAttention(d_model, num_heads).to(device, dtype).eval()
    x = torch.randn(1, length, d_model, device=device, dtype=dtype)  # (1, T, D)
    mask = materialize(causal, length, device=device)

    def forward() -> None:
        with torch.inference_mode():
            layer(x, x, x, mask)

    return forward
