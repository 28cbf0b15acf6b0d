"""How fast attention is here: every backend, FlashAttention's choice among them, and what they are held against.

    python -m tests.benchmarks.flash_attention [--device cuda] [--small] [--directions forward both]
        [--head-dims 64 128] [--lengths 512 …] [--json FILE]

bfloat16, 16384 tokens a batch, width 2048, and one query of 4096 keys. TFLOP/s are 4·B·H·Tq·Tk·d of the forward pass
over the median time, half of it under a causal mask, 3.5 times as much with the backward pass. "of best" compares with
the fastest correct one of the same run, PyTorch's own function without our wrappers among them. As a device that has
grown hot is slower, FlashAttention and that one are timed three times more, in turn: the last line of each table, whose
times are recorded as well. Beside the tables: seconds of each backend's first call, ten cold calls and the peak memory
of both layers in float32, errors against float64, and the device's ceilings. The record is written anew after each
part; a file that exists gets one run more, if it is of this device and these versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.flash import choice
from engine.flash.attention import FlashAttention, StandardAttention
from engine.flash.backends import Case, absent, choices, standard_attention
from engine.flash.traffic import attention_flops
from engine.measure import Evidence, ceilings, device_name, measure_time, peak_memory, versions
from engine.targets.attention import cold_calls
from tests.benchmarks.recording import check_same_place

TOKENS, WIDTH, CACHE = 16384, 2048, 4096
WHAT = "Attention by every backend, by tests/benchmarks/flash_attention.py"
CHOSEN = "FlashAttention"
BARE = "PyTorch's function"


@dataclass(frozen=True)
class Shape:
    """What is attended to.

    Args:
        head_dim: d.
        causal: whether later keys are hidden.
        length: T.
        tokens: B · T.
        width: H · d.
        queries: Tq, as many as keys if 0.
    """

    head_dim: int
    causal: bool
    length: int
    tokens: int = TOKENS
    width: int = WIDTH
    queries: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, H, Tk, d)."""
        return max(1, self.tokens // self.length), self.width // self.head_dim, self.length, self.head_dim

    def drawn(self, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Q, K, V and an upstream gradient."""
        generator = torch.Generator(device).manual_seed(0)
        batch, heads, length, width = self.sizes
        lengths = (self.queries or length, length, length, self.queries or length)
        return [
            torch.randn(batch, heads, each, width, generator=generator, device=device).to(dtype) for each in lengths
        ]

    def flops(self, direction: str) -> int:
        batch, heads, length, width = self.sizes
        return attention_flops(batch, heads, self.queries or length, length, width, self.causal, direction)


def passes(function: Callable[..., Tensor], tensors: list[Tensor], direction: str) -> Callable[[], object]:
    """The forward pass alone, or both."""
    *inputs, upstream = tensors
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def first_calls(device: str, shape: Shape) -> dict[str, Any]:
    """Seconds of each backend's first call, in the order of `BACKENDS`, after the device itself has been woken up."""
    Q, K, V, _ = shape.drawn(device)
    (Q @ K.mT).sum().item()
    found: dict[str, Any] = {}
    for backend in choices(Case.of(Q, K, shape.causal, False)):
        start = time.perf_counter()
        try:
            with torch.no_grad():
                backend.run(Q, K, V, shape.causal).sum().item()
            found[backend.name] = time.perf_counter() - start
        except Exception as error:
            found[backend.name] = f"{type(error).__name__}: {error}"
    return found


def measured(device: str, shape: Shape, direction: str, peak: float) -> dict[str, Any]:
    """Every backend and the module's choice on one shape, printed as they come."""
    tensors = shape.drawn(device)
    module = FlashAttention(shape.head_dim, shape.causal, calls_before_measuring=0)
    functions: dict[str, Callable[..., Tensor]] = {
        backend.name: partial(backend.run, causal=shape.causal)
        for backend in choices(Case.of(*tensors[:2], shape.causal, direction == "both"))
    }
    functions[BARE] = partial(F.scaled_dot_product_attention, is_causal=shape.causal)
    functions[CHOSEN] = module
    rows, failed = {}, {}
    for name, function in functions.items():
        run = passes(function, tensors, direction)
        try:
            run()
            evidence = measure_time(run, device, dtype=torch.bfloat16, shape=f"{shape.sizes}, {direction}", runs=10)
            rows[name] = {"tflops": shape.flops(direction) / evidence.median_ms / 1e9, "evidence": spread(evidence)}
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    grad = direction == "both"
    chosen = choice.resolve(*tensors[:3], causal=shape.causal, scale=None, grad=grad, calls_before_measuring=0).name
    found = choice.fastest(*tensors[:3], causal=shape.causal, grad=grad)
    best = max((name for name in rows if name in (*found.evidence, BARE)), key=lambda name: rows[name]["tflops"])
    print(f"d {shape.head_dim}, T {shape.length}, {'causal' if shape.causal else 'all'}, {direction}; best: {best}")
    for name, row in rows.items():
        row["of_best"] = row["tflops"] / rows[best]["tflops"]
        label = f"{name} → {chosen}" if name == CHOSEN else name
        speed = f"{row['tflops']:>10.4g} TFLOP/s{row['tflops'] / peak:>8.1%} of peak"
        print(f"  {label:<32}{speed}{row['of_best']:>8.1%} of best")
    turns: dict[str, list[float]] = {}
    if CHOSEN in rows:
        turns = in_turn({name: passes(functions[name], tensors, direction) for name in (best, CHOSEN)}, device, shape)
        rows[CHOSEN]["of_best"] = sum(turns[best]) / sum(turns[CHOSEN])
        speeds = {name: shape.flops(direction) / statistics.median(times) / 1e9 for name, times in turns.items()}
        both = ", ".join(f"{name} {speed:.4g} TFLOP/s" for name, speed in speeds.items())
        print(f"  in turn: {both}: {rows[CHOSEN]['of_best']:.1%} of best")
    for name, reason in failed.items():
        print(f"  {name:<32}failed: {reason}")
    sys.stdout.flush()
    return {
        **asdict(shape),
        "direction": direction,
        "best": best,
        "chosen": chosen,
        "rows": rows,
        "in_turn_ms": turns,
        "failed": failed,
        "refused": found.refused,
        "errors": {name: asdict(errors) for name, errors in found.errors.items()},
        "baseline": asdict(found.baseline),
    }


def in_turn(runs: dict[str, Callable[[], object]], device: str, shape: Shape) -> dict[str, list[float]]:
    """Median milliseconds of each, three times, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in [*runs] * 3:
        evidence = measure_time(runs[name], device, dtype=torch.bfloat16, shape=str(shape), runs=10)
        times[name].append(evidence.median_ms)
    return times


def spread(evidence: Evidence) -> dict[str, Any]:
    """What differs from row to row."""
    return {name: getattr(evidence, name) for name in ("median_ms", "low_ms", "high_ms", "runs")}


def precisions(device: str, sizes: tuple[int, int, int, int]) -> dict[str, float]:
    """Root mean square error of float32 attention against float64, relative to the output, by how it is computed."""
    tensors = [x.float() for x in Shape(sizes[-1], False, sizes[2]).drawn(device, torch.float32)[:3]]
    tensors = [x[: sizes[0], : sizes[1]] for x in tensors]
    exact = standard_attention(*(x.double() for x in tensors))
    standard = StandardAttention(sizes[-1])
    before = torch.get_float32_matmul_precision()

    def tf32(*tensors: Tensor) -> Tensor:
        torch.set_float32_matmul_precision("high")
        try:
            return standard(*tensors)
        finally:
            torch.set_float32_matmul_precision(before)

    ways = {
        "standard, float32": standard,
        "standard, TF32": tf32,
        "flash, fast": FlashAttention(sizes[-1]),
        "flash, exact": FlashAttention(sizes[-1], precision="exact"),
    }
    with torch.no_grad():
        apart = {name: way(*tensors).double() - exact for name, way in ways.items()}
    return {name: (x.square().mean() / exact.square().mean()).sqrt().item() for name, x in apart.items()}


def contract(device: str) -> dict[str, Any]:
    """The two figures that the contract bounds."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(1, 4, 4096, 64, generator=generator, device=device) for _ in range(3)]
    layers = {"StandardAttention": StandardAttention(64), "FlashAttention": FlashAttention(64)}
    peaks = {}
    for name, layer in layers.items():
        layer(*tensors)
        peaks[name] = peak_memory(partial(layer, *tensors), device)
    return {"ten_cold_calls_s": {first: cold_calls(first) for first in ("Flash", "Standard")}, "peak_bytes": peaks}


def main() -> int:
    """Measure, print, write the record; 1 if the choice failed, or fell below 97 % of the best for many queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="short sequences, to see that everything runs")
    parser.add_argument("--directions", nargs="*", choices=["forward", "both"], default=["forward", "both"])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 2048, 8192, 16384])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    on_gpu = torch.device(device).type == "cuda"
    lengths, tokens, width = ([64, 128], 128, 128) if arguments.small else (arguments.lengths, TOKENS, WIDTH)
    given: Path | None = arguments.json
    record: dict[str, Any] = {"what": WHAT, "device": device_name(device), "versions": versions(), "runs": []}
    if given and given.exists():
        record = json.loads(given.read_text(encoding="utf-8"))
        check_same_place(given, record, device)
    run: dict[str, Any] = {"recorded": datetime.date.today().isoformat()}
    record["runs"].append(run)

    def keep(**part: Any) -> None:
        run.update(part)
        if given:
            given.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    print(" · ".join(f"{name} {version}" for name, version in record["versions"].items()), "·", record["device"])
    example = Shape(64, True, lengths[-1], tokens, width)
    keep(first_calls_s=first_calls(device, example))
    print("first calls, s:", run["first_calls_s"])
    keep(absent=absent(Case(device, torch.bfloat16, 64, 2048, 2048, causal=True, grad=False, grouped=False)))
    for label, reason in run["absent"].items():
        print(f"absent: {label}. {reason}")
    roof = ceilings(device, torch.bfloat16)
    keep(ceilings=asdict(roof))
    print(f"ceilings: {roof.flops / 1e12:.1f} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s")
    keep(precisions=precisions(device, (2, 2, 128, 64) if arguments.small else (2, 8, 2048, 64)))
    print("relative errors:", {name: f"{error:.1e}" for name, error in run["precisions"].items()})
    if on_gpu:
        keep(contract=contract(device))
        print("contract:", run["contract"], flush=True)
    shapes: list[dict[str, Any]] = []
    for direction in arguments.directions:
        for head_dim in arguments.head_dims:
            for causal in (False, True):
                for length in lengths:
                    shape = Shape(head_dim, causal, length, tokens, width)
                    shapes.append(measured(device, shape, direction, roof.flops / 1e12))
                    keep(shapes=shapes)
        for head_dim in arguments.head_dims if direction == "forward" else []:
            shape = Shape(head_dim, False, CACHE, CACHE, width, queries=1)
            shapes.append(measured(device, shape, direction, roof.flops / 1e12))
            keep(shapes=shapes)
    failed = [each["failed"][CHOSEN] for each in shapes if CHOSEN in each["failed"]]
    prefills = [each for each in shapes if CHOSEN in each["rows"] and not each["queries"]]
    least = min(prefills, key=lambda each: each["rows"][CHOSEN]["of_best"], default=None)
    if failed or least is None:
        print(f"{CHOSEN} failed {len(failed)} times:", *failed[:1])
        return 1
    print(f"least of best: {least['rows'][CHOSEN]['of_best']:.1%} at d {least['head_dim']}, T {least['length']}")
    return int(least["rows"][CHOSEN]["of_best"] < 0.97)


if __name__ == "__main__":
    sys.exit(main())
