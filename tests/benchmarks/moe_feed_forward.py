"""How fast a mixture of experts is here: ways to multiply, with and without the kernels around the products.

    python -m tests.benchmarks.moe_feed_forward [--device cuda] [--small] [--directions forward both]
        [--loads even uneven] [--json FILE]

bfloat16, 16384 tokens, 16 experts of 2048 → 4096 → 2048, two a token, routing and gathering included. TFLOP/s are
2·A·3·D·F of the experts' forward pass over the median time, three times as much with the backward pass. "even" is what
a fresh router makes of normal tokens; for "uneven" its bias ramps up from expert to expert. Every row is held against
the same layer computed expert by expert in float32 with the same routing: the relative error of its output, and the
largest of its gradients' if there are any. "steps" times the parts of the forward pass by themselves. The record is
written anew after each part.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.measure import ceilings, device_name, measure_time, peak_memory, versions
from engine.moe import feed_forward, rows
from engine.moe.feed_forward import MoEFeedForward
from engine.moe.grouped import Groups, grouped_product, looped_product, obstacle
from engine.moe.observation import observing
from engine.moe.routing import Routing
from engine.moe.rows import Assignments, combine, gather, silu_times

TARGET = 500
"""TFLOP/s of the forward pass."""
DTYPE = torch.bfloat16
OURS = "ours"


class Size(NamedTuple):
    """Of the layer and its batch."""

    num_tokens: int
    d_model: int
    ffn_dim: int
    num_experts: int
    top_k: int

    def flops(self, direction: str) -> int:
        """Of the experts' products."""
        forward = 2 * self.num_tokens * self.top_k * 3 * self.d_model * self.ffn_dim
        return forward if direction == "forward" else 3 * forward


LARGE = Size(16384, 2048, 4096, 16, 2)
SMALL = Size(96, 64, 128, 4, 2)


@contextmanager
def replaced(product: Callable[..., Tensor] | None = None, kernels: bool = True) -> Iterator[None]:
    """Our layer with another way to multiply, or without the kernels around it."""
    with ExitStack() as stack:
        if product is not None:
            stack.enter_context(patch.object(feed_forward, "grouped_product", product))
        if not kernels:
            stack.enter_context(patch.object(rows, "kernels_for", lambda like: None))
        yield


def unfused_loop(layer: MoEFeedForward, x: Tensor, routing: Routing | None = None) -> Tensor:
    """One expert after the other, gate and up apart, results added where the tokens are: the plainest way."""
    routing = layer.router.route(x) if routing is None else routing
    tokens = x.reshape(-1, x.shape[-1])  # (N, D)
    y = torch.zeros_like(tokens)
    sizes = routing.counts.tolist()
    parts = zip(
        routing.tokens.split(sizes), routing.gates.split(sizes), layer.gate_up_proj, layer.down_proj, strict=True
    )
    for own, gates, gate_up, down in parts:
        gate, up = gate_up.chunk(2)  # (F, D) each
        hidden = F.silu(tokens[own] @ gate.T) * (tokens[own] @ up.T)
        y = y.index_add(0, own, (gates[:, None] * (hidden @ down.T)).to(y.dtype))
    return y.view(x.shape)


def padded_batch(layer: MoEFeedForward, x: Tensor) -> Tensor:
    """Every expert's rows filled up to the fullest one's, to a multiple of 128, for one batched product a layer."""
    routing = layer.router.route(x)
    tokens = x.reshape(-1, x.shape[-1])  # (N, D)
    ends, num_rows = routing.counts.cumsum(0), len(routing.tokens)
    height = -(-int(routing.counts.max()) // 128) * 128
    lines = torch.arange(height, device=x.device)
    places = (ends - routing.counts)[:, None] + lines  # (E, H)
    spread = gather(tokens, Assignments(routing.tokens[places.clamp(max=num_rows - 1).flatten()], len(tokens)))
    hidden = torch.bmm(spread.view(*places.shape, -1), layer.gate_up_proj.mT)  # (E, H, 2F)
    outputs = torch.bmm(silu_times(hidden.flatten(0, 1)).view(*places.shape, -1), layer.down_proj.mT)  # (E, H, D)
    ranks = torch.arange(num_rows, device=x.device) - (ends - routing.counts)[routing.experts]
    taken = outputs.flatten(0, 1)[routing.experts * height + ranks]  # (A, D)
    return combine(taken, routing.gates, Assignments(routing.tokens, len(tokens))).view(x.shape)


def streamed_product(x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """The loop on two streams, so that one product fills the processors that the end of another leaves idle."""
    y = x.new_empty(len(x), weights.shape[-1])
    main = torch.cuda.current_stream()
    for stream in _streams(x.device):
        stream.wait_stream(main)
    parts = zip(x.split(groups.sizes), weights, y.split(groups.sizes), strict=True)
    for index, (own, weight, part) in enumerate(parts):
        with torch.cuda.stream(_streams(x.device)[index % 2]):
            torch.mm(own, weight, out=part)
    for stream in _streams(x.device):
        main.wait_stream(stream)
    return y


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def transformers_block(layer: MoEFeedForward, implementation: str) -> nn.Module | None:
    """transformers' layer with the same weights, where it is installed."""
    try:
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
    except ImportError:
        return None
    num_experts, d_model, ffn_dim = layer.down_proj.shape
    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=ffn_dim,
        num_local_experts=num_experts,
        num_experts_per_tok=layer.router.top_k,
        num_attention_heads=1,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = layer.router.weight
    block.experts.gate_up_proj, block.experts.down_proj = layer.gate_up_proj, layer.down_proj
    return block


class Way(NamedTuple):
    """A row of the table: a function of x, and what is replaced while it runs."""

    function: Callable[[Tensor], Tensor]
    changes: dict[str, Any] = {}  # noqa: RUF012 - never written


def ways(layer: MoEFeedForward, even: bool, direction: str, device: str) -> dict[str, Way]:
    """The rows of the table, by name."""
    found = {
        OURS: Way(layer),
        "grouped, plain rows": Way(layer, {"kernels": False}),
        "loop, our rows": Way(layer, {"product": looped_product}),
        "loop, plain rows": Way(layer, {"product": looped_product, "kernels": False}),
        "padded batch, our rows": Way(partial(padded_batch, layer)),
        "loop, unfused": Way(partial(unfused_loop, layer)),
    }
    for implementation in ("grouped_mm", "eager") if even else ():  # it knows no bias
        block = transformers_block(layer, implementation)
        if block is not None:
            found[f"transformers, {implementation}"] = Way(block)
    if direction == "forward" and torch.device(device).type == "cuda":
        found["loop on two streams, our rows"] = Way(layer, {"product": streamed_product})
    return found


def steps(layer: MoEFeedForward, x: Tensor, device: str) -> dict[str, dict[str, Any]]:
    """The parts of the forward pass, timed by themselves."""
    tokens = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        routing = layer.router.route(x)
        assignments, groups = Assignments(routing.tokens, len(tokens)), Groups(routing.counts)
        gathered = gather(tokens, assignments)
        gate_up = grouped_product(gathered, layer.gate_up_proj.mT, groups)
        hidden = silu_times(gate_up)
        outputs = grouped_product(hidden, layer.down_proj.mT, groups)
    wide, narrow = layer.gate_up_proj[0].T, layer.down_proj[0].T

    parts: dict[str, Way] = {
        "route": Way(partial(layer.router.route, x)),
        "order by token": Way(lambda: Assignments(routing.tokens, len(tokens)).by_token),
        "gather": Way(partial(gather, tokens, assignments)),
        "gate and up, grouped": Way(partial(grouped_product, gathered, layer.gate_up_proj.mT, groups)),
        "gate and up, loop": Way(partial(looped_product, gathered, layer.gate_up_proj.mT, groups)),
        "gate and up, one dense product": Way(partial(torch.mm, gathered, wide)),
        "silu-times": Way(partial(silu_times, gate_up)),
        "silu-times, plain": Way(partial(silu_times, gate_up), {"kernels": False}),
        "down, grouped": Way(partial(grouped_product, hidden, layer.down_proj.mT, groups)),
        "down, loop": Way(partial(looped_product, hidden, layer.down_proj.mT, groups)),
        "down, one dense product": Way(partial(torch.mm, hidden, narrow)),
        "combine": Way(partial(combine, outputs, routing.gates, assignments)),
        "combine, plain": Way(partial(combine, outputs, routing.gates, assignments), {"kernels": False}),
    }
    if torch.device(device).type == "cuda":
        parts["down, loop on two streams"] = Way(partial(streamed_product, hidden, layer.down_proj.mT, groups))
        parts["gate and up, loop on two streams"] = Way(
            partial(streamed_product, gathered, layer.gate_up_proj.mT, groups)
        )
    found = {}
    for name, (part, changes) in parts.items():
        try:
            with torch.no_grad(), replaced(**changes):
                evidence = measure_time(part, device, dtype=DTYPE, shape=name, runs=5)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}
            print(f"  {name:<34}{found[name]['failed']}")
            continue
        found[name] = asdict(evidence)
        print(f"  {name:<34}{evidence.median_ms:>10.3f} ms  {evidence.low_ms:.3f} to {evidence.high_ms:.3f}")
    return found


def reference(layer: MoEFeedForward, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and gradients of both weights in float32, with the routing of the layer itself."""
    with torch.no_grad():
        routing = layer.router.route(x)
    exact = MoEFeedForward.__new__(MoEFeedForward)
    nn.Module.__init__(exact)
    exact.gate_up_proj, exact.down_proj = (
        nn.Parameter(weights.detach().float()) for weights in (layer.gate_up_proj, layer.down_proj)
    )
    y = unfused_loop(exact, x.detach().float(), routing)
    return [y.detach(), *torch.autograd.grad(y, (exact.gate_up_proj, exact.down_proj), upstream.float())]


def apart(found: Tensor, exact: Tensor) -> float:
    """Relative error, as a root mean square."""
    return ((found.float() - exact).square().mean() / exact.square().mean()).sqrt().item()


def measured(size: Size, even: bool, direction: str, device: str) -> dict[str, Any]:
    """Every way on one load and direction, printed as they come."""
    layer, x, upstream = drawn(size, even, device)
    with observing(layer) as seen, torch.no_grad():
        layer(x)
    counts = seen[0][1].counts.tolist()
    mean = sum(counts) / len(counts)
    print(f"{'even' if even else 'uneven'} load, {direction}: {min(counts)} to {max(counts)} rows an expert")
    exact = reference(layer, x, upstream)
    leaves = (x, *layer.parameters())
    found, failed = {}, {}
    for name, (way, changes) in ways(layer, even, direction, device).items():

        def run(way: Callable[[Tensor], Tensor] = way) -> list[Tensor]:
            if direction == "forward":
                with torch.no_grad():
                    return [way(x)]
            y = way(x)
            return [y, *torch.autograd.grad(y, leaves, upstream)]

        try:
            with replaced(**changes):
                y, *gradients = run()
                by_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, gradients, strict=False)}
                pairs = [(y, exact[0])]
                if gradients:
                    pairs += [(by_leaf[id(layer.gate_up_proj)], exact[1]), (by_leaf[id(layer.down_proj)], exact[2])]
                errors = [apart(one, wanted) for one, wanted in pairs]
                del y, gradients, by_leaf, pairs
                peak = peak_memory(run, device)
                evidence = measure_time(run, device, dtype=DTYPE, shape=f"{size}, {direction}", runs=10)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0]
            print(f"  {name:<34}failed: {failed[name]}")
            continue
        tflops = size.flops(direction) / evidence.median_ms / 1e9
        found[name] = {"tflops": tflops, "errors": errors, "peak_bytes": peak, "evidence": asdict(evidence)}
        spread = f"{evidence.low_ms:.3f} to {evidence.high_ms:.3f}"
        print(
            f"  {name:<34}{tflops:>10.4g} TFLOP/s{evidence.median_ms:>10.3f} ms  {spread:<18}"
            f"{peak / 2**20:>8.0f} MiB  error {max(errors):.1e}",
            flush=True,
        )
    return {
        "load": "even" if even else "uneven",
        "direction": direction,
        "counts": counts,
        "max_violation": (max(counts) - mean) / mean,
        "rows": found,
        "failed": failed,
    }


def drawn(size: Size, even: bool, device: str) -> tuple[MoEFeedForward, Tensor, Tensor]:
    """The layer, its input and an upstream gradient."""
    torch.manual_seed(0)
    layer = MoEFeedForward(size.d_model, size.ffn_dim, size.num_experts, size.top_k).to(device, DTYPE)
    if not even:
        with torch.no_grad():
            layer.router.selection_bias.copy_(torch.linspace(0, 2, size.num_experts))
    generator = torch.Generator(device).manual_seed(0)
    shape = (8, size.num_tokens // 8, size.d_model)
    x, upstream = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for _ in range(2))
    return layer, x.requires_grad_(), upstream


def main() -> int:
    """Measure, print, write the record; 1 if ours misses the target or something failed or erred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a small layer, to see that everything runs")
    parser.add_argument("--directions", nargs="*", choices=["forward", "both"], default=["forward", "both"])
    parser.add_argument("--loads", nargs="*", choices=["even", "uneven"], default=["even", "uneven"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, size = arguments.device, SMALL if arguments.small else LARGE
    record: dict[str, Any] = {
        "what": "A mixture of experts in bfloat16, by tests/benchmarks/moe_feed_forward.py",
        "device": device_name(device),
        "versions": versions(),
    }
    run: dict[str, Any] = {"recorded": datetime.date.today().isoformat(), "size": size._asdict()}
    record["runs"] = [run]

    def keep(**part: Any) -> None:
        run.update(part)
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")

    print(" · ".join(f"{name} {version}" for name, version in record["versions"].items()), "·", record["device"])
    print(size)
    layer, x, _ = drawn(size, True, device)
    in_the_way = obstacle(x.detach().view(-1, size.d_model), layer.gate_up_proj.mT)
    print("grouped product:", in_the_way or "PyTorch's kernel")
    roof = ceilings(device, DTYPE)
    keep(obstacle=in_the_way, ceilings=asdict(roof))
    print(f"ceilings: {roof.flops / 1e12:.4g} TFLOP/s, {roof.bandwidth / 1e9:.0f} GB/s\nsteps of the forward pass")
    keep(steps=steps(layer, x.detach(), device))
    del layer, x
    tables: list[dict[str, Any]] = []
    for direction in arguments.directions:
        for load in arguments.loads:
            tables.append(measured(size, load == "even", direction, device))
            keep(tables=tables)
    missed = []
    for table in tables:
        name = f"{table['load']}, {table['direction']}"
        missed += [f"{name}: {way} failed" for way in table["failed"]]
        missed += [f"{name}: {way} errs" for way, row in table["rows"].items() if not max(row["errors"]) < 0.02]
        if not arguments.small and name == "even, forward" and table["rows"][OURS]["tflops"] < TARGET:
            missed.append(f"ours is below {TARGET} TFLOP/s")
    print(*missed or ["all as it should be"], sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
