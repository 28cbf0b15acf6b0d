"""What a mixture of LoRA experts adds to a linear layer, in each of its forms, and what one training step of it costs.

    python -m tests.benchmarks.moe_lora [--device cuda] [--small] [--json FILE]

bfloat16. Forward: 16384 tokens, 2048 → 2048, 16 experts of rank 16, two a token, beside the base layer alone; it should
add no more than the base layer itself takes. Both are also measured as CUDA graphs ("captured"), where the GPU's own
time is left: one by one the mixture's kernels end sooner than the CPU launches them. Forward and backward: the mixture
alone, without a base layer, of 128 experts 2048 → 768, rank 16, 4096 tokens, against the 2.56 ms and 1.30 GB (peak
beyond what was there) that PEFT's batched form reports on an H100; PEFT does not say how many experts a token has, so
one, two and eight are shown. Such a step is bound by the CPU, which hands every expert its own gradient, so what its
kernels take by themselves is recorded as well.
Gradients are those of x, of every expert and of the router. Every row is held against one expert after the other in
float32 with the same routing: the relative error of the output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.measure import ceilings, device_name, measure_time, peak_memory, versions
from engine.moe.lora import MoELoRALayer, MoELoRALinear
from engine.moe.observation import observing

DTYPE = torch.bfloat16
TARGET_MS, TARGET_BYTES = 2.56, 1.30e9

COMPARED = ("base layer", "base layer + mixture")


class Size(NamedTuple):
    """Of the mixture and its batch."""

    num_tokens: int
    in_features: int
    out_features: int
    num_experts: int
    rank: int
    top_k: int


FORWARD, SMALL_FORWARD = Size(16384, 2048, 2048, 16, 16, 2), Size(64, 64, 64, 4, 4, 2)
TRAINING, SMALL_TRAINING = Size(4096, 2048, 768, 128, 16, 1), Size(64, 64, 48, 8, 4, 1)


def mixture(size: Size, device: str, **options: Any) -> MoELoRALayer:
    """A mixture whose B is not 0, so that every expert's output counts."""
    torch.manual_seed(0)
    layer = MoELoRALayer(size.in_features, size.out_features, size.num_experts, size.rank, size.top_k, **options)
    with torch.no_grad():
        for expert in layer.experts:
            expert.B.normal_(0, 0.02)
    return layer.to(device, DTYPE)


def expert_by_expert(layer: MoELoRALayer, x: Tensor) -> Tensor:
    """The plain loop: each expert's rows times its A and its B."""
    routing = layer.router.route(x)
    y = x.new_zeros(len(x), layer.out_features)
    sizes = routing.counts.tolist()
    for own, gates, expert in zip(routing.tokens.split(sizes), routing.gates.split(sizes), layer.experts, strict=True):
        u = x[own] @ expert.A.to(x.dtype) @ expert.B.to(x.dtype)
        y = y.index_add(0, own, (layer.scaling * gates[:, None] * u).to(y.dtype))
    return y


def error(layer: MoELoRALayer, found: Tensor, x: Tensor) -> float:
    """Relative error of the output, as a root mean square, for the routing that the layer itself decides on."""
    with torch.no_grad():
        exact = expert_by_expert(layer, x.detach().float())
    return ((found.float() - exact).square().mean() / exact.square().mean()).sqrt().item()


def row(name: str, run: Callable[[], object], device: str, shape: str) -> dict[str, Any]:
    """Time and peak of one row, printed."""
    evidence = measure_time(run, device, dtype=DTYPE, shape=shape, runs=10)
    peak = peak_memory(run, device)
    spread = f"{evidence.low_ms:.3f} to {evidence.high_ms:.3f}"
    print(f"  {name:<32}{evidence.median_ms:>10.3f} ms  {spread:<18}{peak / 1e9:>8.3f} GB", flush=True)
    return {"peak_bytes": peak, "evidence": asdict(evidence)}


def captured(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], None]:
    """The function's kernels for this x as one CUDA graph, which no longer waits for the CPU to launch them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            function(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        function(x)
    return lambda _: graph.replay()


def forward(size: Size, device: str) -> dict[str, Any]:
    """The mixture in each form, alone and with the base layer, beside that one."""
    torch.manual_seed(1)
    base = nn.Linear(size.in_features, size.out_features, bias=False).to(device, DTYPE)
    x = torch.randn(size.num_tokens, size.in_features, device=device).to(DTYPE)
    chosen = mixture(size, device)
    layers = {
        "concatenated": mixture(size, device, form="concatenated"),
        "grouped": mixture(size, device, form="grouped"),
    }
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "base layer": base,
        **layers,
        "shared A": mixture(size, device, shared_a=True),
        "plain loop": partial(expert_by_expert, chosen),
        "router": lambda x: chosen.router.route(x).gates,
        "base layer + mixture": MoELoRALinear(base, chosen),
    }
    functions |= {f"{name}, captured": captured(functions[name], x) for name in COMPARED if x.is_cuda}
    print(f"forward, {size}; the mixture chooses: {chosen.cheaper_form(torch.device(device).type, size.num_tokens)}")
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for name, function in functions.items():
            rows[name] = row(name, partial(function, x), device, f"{size}, forward")
        for name, layer in layers.items():
            rows[name]["error"] = error(layer, layer(x), x)
    found: dict[str, Any] = {"rows": rows}
    for way in ("", ", captured") if x.is_cuda else ("",):
        base_ms, whole_ms = (rows[name + way]["evidence"]["median_ms"] for name in COMPARED)
        print(f"  added{way}: {whole_ms - base_ms:.3f} ms to {base_ms:.3f} ms of the base layer")
        found["captured" if way else "eager"] = {"added_ms": whole_ms - base_ms, "base_ms": base_ms}
    return found


def step(layer: MoELoRALayer, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward, with the gradients of x, of every expert and of the router made anew."""
    leaves = (x, *layer.parameters())

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(upstream)

    return run


def kernels_ms(run: Callable[[], None], times: int = 10) -> float:
    """What all kernels of a run take; the rest of its time the GPU waits for the CPU to launch them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    kernels = (event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e3 / times


def training(size: Size, device: str) -> dict[str, Any]:
    """Forward and backward of the mixture in each form."""
    torch.manual_seed(1)
    x = torch.randn(size.num_tokens, size.in_features, device=device).to(DTYPE).requires_grad_()
    upstream = torch.randn(size.num_tokens, size.out_features, device=device).to(DTYPE)
    print(f"forward and backward, {size}; target {TARGET_MS} ms, {TARGET_BYTES / 1e9:.2f} GB on an H100")
    rows = {}
    for name, form in (("concatenated", "concatenated"), ("grouped", "grouped"), ("chosen", None)):
        layer = mixture(size, device, form=form)
        run = step(layer, x, upstream)
        rows[name] = row(name, run, device, f"{size}, forward and backward")
        if x.is_cuda:
            rows[name]["kernels_ms"] = kernels_ms(run)
            print(f"    of which kernels {rows[name]['kernels_ms']:.3f} ms")
        with torch.no_grad(), observing(layer) as seen:
            rows[name]["error"] = error(layer, layer(x), x)
        rows[name]["used_experts"] = int((seen[0][1].counts > 0).sum())
        rows[name]["finite"] = all(
            parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in layer.parameters()
        )
    return {"size": size._asdict(), "rows": rows}


def main() -> int:
    """Measure, print, write the record; 1 if a target is missed or a row errs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small layers, to see that everything runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    sizes = (SMALL_FORWARD, SMALL_TRAINING) if arguments.small else (FORWARD, TRAINING)
    record: dict[str, Any] = {
        "what": "A mixture of LoRA experts in bfloat16, by tests/benchmarks/moe_lora.py",
        "device": device_name(device),
        "versions": versions(),
    }
    run: dict[str, Any] = {"recorded": datetime.date.today().isoformat()}
    record["runs"] = [run]

    def keep(**part: Any) -> None:
        run.update(part)
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")

    print(" · ".join(f"{name} {version}" for name, version in record["versions"].items()), "·", record["device"])
    roof = ceilings(device, DTYPE)
    keep(ceilings=asdict(roof))
    print(f"ceilings: {roof.flops / 1e12:.4g} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s")
    keep(forward={"size": sizes[0]._asdict(), **forward(sizes[0], device)})
    steps = []
    for top_k in (1, 2, 8):
        steps.append(training(sizes[1]._replace(top_k=top_k), device))
        keep(training=steps)
    found = [run["forward"], *steps]
    missed = [
        f"{name} errs by {each['error']:.1e}"
        for part in found
        for name, each in part["rows"].items()
        if not each.get("error", 0) < 0.02 or not each.get("finite", True)
    ]
    if not arguments.small:
        for way in ("eager", "captured"):
            if run["forward"][way]["added_ms"] > run["forward"][way]["base_ms"]:
                missed.append(f"{way}, the mixture adds more than the base layer takes")
        one = steps[0]["rows"]["chosen"]
        if one["evidence"]["median_ms"] >= TARGET_MS or one["peak_bytes"] >= TARGET_BYTES:
            missed.append("a training step takes more time or memory than PEFT's")
    print(*missed or ["all as it should be"], sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
