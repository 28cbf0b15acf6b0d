"""What a way of training costs in a step, and whether it learns the same: what the benchmarks of LoRA have in common.

A Llama of 1.1 billion random parameters in bfloat16, batch 4 × 1024, rank 16 on all seven projections of every block.
The floor is the arithmetic of the frozen model at the speed of one large product, measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from engine.architecture import ModelConfig
from engine.measure import Evidence, device_name, measure_time, peak_memory

TIMED_STEPS = 25
LOSS_STEPS = 50
PROFILED_STEPS = 3
LEARNING_RATE = 1e-3
ALPHA = 32


@dataclass(frozen=True)
class Size:
    """What is trained on what.

    Args:
        config: of the model.
        batch, length: of the data.
        rank: R.
        product: side of the square product whose speed sets the floor.
    """

    config: dict[str, int]
    batch: int
    length: int
    rank: int
    product: int


LARGE = Size(
    {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    batch=4,
    length=1024,
    rank=16,
    product=8192,
)
SMALL = Size(
    {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    },
    batch=2,
    length=32,
    rank=4,
    product=256,
)


Build = Callable[[Size, str, int], nn.Module]
"""Makes a model from a size, a device and a seed of the adapters."""

Optimize = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

Loss = Callable[[Tensor], Tensor]
"""The loss of a batch of ids (B, T), to be differentiated."""

Prepare = Callable[[nn.Module, Tensor], Loss]
"""Makes a model's loss into what is called in every step, given a batch of the shape that all will have."""

fused_adamw: Optimize = partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
default_adamw: Optimize = partial(torch.optim.AdamW, lr=LEARNING_RATE)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every next token, from float32 logits."""
    output = model(ids)  # (B, T, V), or transformers' wrapping of it
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def eager(model: nn.Module, ids: Tensor) -> Loss:
    """As it is written."""
    return partial(loss_of, model)


def compiled(model: nn.Module, ids: Tensor) -> Loss:
    """Through `torch.compile`, as one."""
    return partial(torch.compile(loss_of), model)


def captured(model: nn.Module, ids: Tensor) -> Loss:
    """As two CUDA graphs, one of the forward and one of the backward pass: recorded once, replayed in every step.

    The kernels are those of eager mode, launched by the GPU's queue instead of by Python; neither compiled nor eager.
    What is recorded may not wait for the GPU nor depend on a number that is there. Elsewhere than on CUDA it is eager.
    """
    if not ids.is_cuda:
        return eager(model, ids)
    graphed = torch.cuda.make_graphed_callables(_LossModule(model), (ids.clone(),), num_warmup_iters=3)
    return lambda batch: graphed(batch).clone()  # the graph's own number is overwritten by the next replay


class _LossModule(nn.Module):
    """A model's loss as a module, for whose parameters a captured backward pass has gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return loss_of(self.model, ids)


@dataclass(frozen=True)
class Row:
    """One way of training.

    Args:
        build: makes the model.
        prepare: `eager`, `compiled` or `captured`.
        optimize: makes the optimizer; None where there is nothing to train.
    """

    build: Build
    prepare: Prepare = eager
    optimize: Optimize | None = fused_adamw


@dataclass(frozen=True)
class Benchmark:
    """What one script measures.

    Args:
        description: for its ``--help``.
        what: for its record.
        rows: by name, in the order in which they are measured, should the time not suffice for all.
        start: builds PEFT's model, from which the others take their first A.
        runs: of which losses are compared: a row's name and a seed.
        distances: pairs of those runs.
        packages: whose versions are recorded.
    """

    description: str
    what: str
    rows: dict[str, Row]
    start: Build
    runs: dict[str, tuple[str, int]]
    distances: dict[str, tuple[str, str]]
    packages: tuple[str, ...] = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Figure:
    """What was measured of one row.

    Args:
        row: its name.
        evidence: of the time of one step.
        peak_mb: memory at the step's peak, weights and optimizer state included, in MB of 10^6 bytes.
        trainable: parameters that are trained.
        first_step_s: seconds of the first step, in which compilation and capture fall.
    """

    row: str
    evidence: Evidence
    peak_mb: float
    trainable: int
    first_step_s: float


def base(size: Size, device: str) -> LlamaForCausalLM:
    """The same random model every time, in bfloat16."""
    config = LlamaConfig(**size.config, max_position_embeddings=2048, attn_implementation="sdpa", use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def tokens(size: Size, device: str, index: int) -> Tensor:
    """Batch `index`, (B, T): small ids are more frequent, which is something to learn."""
    uniform = torch.rand(size.batch, size.length, generator=torch.Generator().manual_seed(index))
    return (uniform**3 * size.config["vocab_size"]).long().to(device)


def stepper(row: Row, model: nn.Module, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that takes one training step on a batch of the shape of `ids` and returns its loss."""
    loss_function = row.prepare(model, ids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = row.optimize(trained) if row.optimize else None

    def step(ids: Tensor) -> Tensor:
        loss = loss_function(ids)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def free() -> None:
    """Give back what the last row held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held_bytes(row: Row, model: nn.Module, device: str) -> int:
    """What is held between steps; graphs hold all that they need, which the allocator counts as reserved alone."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        of_graphs = row.prepare is captured
        return torch.cuda.memory_reserved(device) if of_graphs else torch.cuda.memory_allocated(device)
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(name: str, row: Row, size: Size, device: str) -> Figure:
    """Time and weigh the steps of one row."""
    model = row.build(size, device, 1)
    ids = tokens(size, device, 0)
    started = time.perf_counter()
    step = stepper(row, model, ids)
    step(ids).item()
    first = time.perf_counter() - started
    for _ in range(2):
        step(ids).item()
    started = time.perf_counter()
    step(ids).item()
    estimate_ms = (time.perf_counter() - started) * 1e3
    peak = held_bytes(row, model, device) + peak_memory(lambda: step(ids), device)
    runs = TIMED_STEPS if device == "cpu" else math.ceil(TIMED_STEPS * estimate_ms / 10)  # of 10 ms each
    evidence = measure_time(
        lambda: step(ids),
        device,
        dtype=torch.bfloat16,
        shape=f"batch {size.batch} × {size.length}, rank {size.rank} on seven projections",
        runs=runs,
    )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Figure(name, evidence, peak / 1e6, trainable if row.optimize else 0, first)


def profile(name: str, row: Row, size: Size, device: str) -> tuple[dict[str, object], str]:
    """Where the time of one row's step goes, by kind of kernel, and a table of its kernels, the longest first."""
    model = row.build(size, device, 1)
    ids = tokens(size, device, 0)
    step = stepper(row, model, ids)
    for _ in range(3):
        step(ids).item()
    with torch.profiler.profile() as found:
        for _ in range(PROFILED_STEPS):
            step(ids).item()
    on_gpu = torch.device(device).type == "cuda"
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = found.key_averages()
    operations = [event for event in averages if event.key.startswith("aten::")]  # what their kernels took is theirs

    def ms(*names: str) -> float:
        chosen = (event for event in operations if any(name in event.key for name in names))
        return sum(getattr(event, by) for event in chosen) / 1e3 / PROFILED_STEPS

    kinds = {"mm": ms("::mm"), "addmm": ms("::addmm"), "attention": ms("attention")}
    shown = averages.table(sort_by=by, row_limit=25, max_name_column_width=90)
    return {"row": name, "kernels_ms": kinds, "all_kernels_ms": ms("::")}, shown


def copy_start(source: nn.Module, target: nn.Module) -> None:
    """Give our adapters the A of PEFT's; both B are 0."""
    theirs = {name: tensor for name, tensor in source.named_parameters() if ".lora_A." in name}
    wanted = [(name, parameter) for name, parameter in target.named_parameters() if name.endswith(".adapter.A")]
    with torch.no_grad():
        for name, parameter in wanted:
            end = f".{name.removesuffix('.adapter.A')}.lora_A.default.weight"  # our decoder has one prefix less
            parameter.copy_(next(tensor for key, tensor in theirs.items() if key.endswith(end)).T)


def losses(benchmark: Benchmark, name: str, size: Size, device: str, seed: int) -> list[float]:
    """The loss of every step, from PEFT's A of `seed`."""
    row = benchmark.rows[name]
    model = row.build(size, device, seed)
    if row.build is not benchmark.start:
        copy_start(benchmark.start(size, device, seed), model)
    step = stepper(row, model, tokens(size, device, 0))
    found = [step(tokens(size, device, index % 8)) for index in range(LOSS_STEPS)]
    return torch.stack(found).tolist()


def compare_losses(benchmark: Benchmark, size: Size, device: str) -> dict[str, object]:
    """Losses from the same start, their distance, and how far runs lie apart anyway."""
    runs = {}
    for key, (name, seed) in benchmark.runs.items():
        runs[key] = losses(benchmark, name, size, device, seed)
        free()

    def distance(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(runs[one], runs[other], strict=True))

    return {
        "runs": runs,
        "largest_difference": {name: distance(*pair) for name, pair in benchmark.distances.items()},
    }


def floor(size: Size, device: str) -> dict[str, float]:
    """The arithmetic of `frozen`, without adapters, and the time it takes at the speed of one large product."""
    config = size.config
    shape = ModelConfig(
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
    )
    tera = 2 * size.batch * shape.forward_flops(size.length) / 1e12  # the gradient of the activations costs the same
    matrix = torch.randn(size.product, size.product, device=device, dtype=torch.bfloat16)
    evidence = measure_time(lambda: matrix @ matrix, device, dtype=matrix.dtype, shape=f"{size.product}³")
    speed = 2 * size.product**3 / (evidence.median_ms * 1e-3) / 1e12
    return {"tflop": tera, "product_tflops": speed, "floor_ms": tera / speed * 1e3}


def report(figures: Iterable[Figure]) -> None:
    print(f"{'':<32}{'median':>11}{'10–90 %':>20}{'peak':>13}{'trained':>16}{'first step':>12}")
    for figure in figures:
        found = figure.evidence
        print(
            f"{figure.row:<32}{found.median_ms:>8.1f} ms{found.low_ms:>10.1f} – {found.high_ms:<7.1f}"
            f"{figure.peak_mb:>10.0f} MB{figure.trainable:>16,}{figure.first_step_s:>10.1f} s"
        )


def open_record(path: Path | None, what: str, size: Size, versions: dict[str, str]) -> dict[str, object]:
    """What a file holds so far, as `engine.experiments._lora.recorded_steps` reads it; without a file, no runs.

    Raises:
        ValueError: the file's runs are of another model or other versions.
    """
    head = {"model": size.config, "versions": {name: version.partition("+")[0] for name, version in versions.items()}}
    log = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {**head, "runs": []}
    if {name: log[name] for name in head} != head:
        raise ValueError(f"{path} has runs of another model or other versions: give another file.")
    return {"what": what, "recorded": datetime.date.today().isoformat(), **head, "runs": log["runs"]}


def run(benchmark: Benchmark) -> int:
    """Measure as the command line says, print, write the record; 1 if the time ran out before the last row."""
    rows = benchmark.rows
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--rows", nargs="*", choices=list(rows), default=list(rows))
    parser.add_argument(
        "--profile",
        nargs="*",
        choices=list(rows),
        default=[],
        help="print these rows' longest kernels; --json keeps the last",
    )
    parser.add_argument("--no-losses", action="store_true", help="leave out the comparison of the losses")
    parser.add_argument("--seconds", type=float, default=270, help="no row is begun after this time")
    parser.add_argument("--json", type=Path, help="add this run, with its evidence, to those of this file")
    parser.add_argument("--note", default="", help="what is to be known about this run, with --json")
    arguments = parser.parse_args()
    size, device, started = SMALL if arguments.small else LARGE, arguments.device, time.perf_counter()
    versions = {name: importlib.metadata.version(name) for name in benchmark.packages}
    try:
        record = open_record(arguments.json, benchmark.what, size, versions)
    except ValueError as error:
        parser.error(str(error))
    entry = {"note": arguments.note, "floor": floor(size, device), "rows": []}
    record["runs"].append(entry)

    def write() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")

    figures, left_out = [], []
    if not arguments.no_losses:
        entry["losses"] = compare_losses(benchmark, size, device)
        print("largest difference of the losses over", LOSS_STEPS, "steps:", entry["losses"]["largest_difference"])
        write()
    for name in arguments.rows:
        if time.perf_counter() - started > arguments.seconds:
            left_out.append(name)
            continue
        figures.append(measure(name, rows[name], size, device))
        entry["rows"].append(asdict(figures[-1]))
        free()
        report(figures[-1:])
        write()
    for name in arguments.profile:
        entry["profile"], shown = profile(name, rows[name], size, device)
        print(name, shown, sep="\n")
        free()
        write()
    print()
    print(" · ".join(f"{name} {version}" for name, version in versions.items()), "·", device_name(device))
    print(f"floor {entry['floor']['floor_ms']:.1f} ms at {entry['floor']['product_tflops']:.0f} TFLOP/s")
    report(figures)
    if left_out:
        print(f"No time was left for: {', '.join(left_out)}.")
    return int(bool(left_out))
