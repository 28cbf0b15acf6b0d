"""What the experiments of the LoRA lab share: where adapters go, how large they are, and what a model learns from.

Needs no torch.

Legend: L layers, D model width, F feed-forward width, H query heads, G key/value heads, d head width, I inputs,
O outputs, R rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from engine import catalogue
from engine.architecture import ATTENTION, FEED_FORWARD, ModelConfig
from engine.errors import InputError
from engine.finetuning import Method
from engine.finetuning.facts import Fact, parse_facts, read_facts

__all__ = [
    "BYTES",
    "SHAPES",
    "TARGETS",
    "AdapterSize",
    "Fact",
    "Method",
    "ModelName",
    "RecordedSteps",
    "Shape",
    "StepCost",
    "Targets",
    "adapter_parameters",
    "parse_facts",
    "read_facts",
    "recorded_steps",
    "shape_of",
]

ModelName = Literal["storyteller", "smollm2-135m"]
Targets = Literal["all", "attention", "feed-forward", "query and value"]


TARGETS: dict[Targets, tuple[str, ...]] = {
    "all": (*ATTENTION, *FEED_FORWARD),
    "attention": ATTENTION,
    "feed-forward": FEED_FORWARD,
    "query and value": ("q_proj", "v_proj"),
}
"""Which projections of every layer are adapted."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model of Llama's architecture.

    Args:
        name: what it is called.
        d_model: D.
        ffn_dim: F.
        num_layers: L.
        num_heads: H.
        num_kv_heads: G.
        head_dim: d.
        vocab_size: V.
        tied: whether the head shares the embedding's weights.
    """

    name: str
    d_model: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @cached_property
    def config(self) -> ModelConfig:
        """The same as a decoder's configuration."""
        return ModelConfig(
            d_model=self.d_model,
            ffn_dim=self.ffn_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tied,
        )


SHAPES = [
    Shape("storyteller", 256, 768, 6, 8, 4, 32, 4096, tied=True),
    Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
    Shape("1.1 B, Llama-shaped", 2048, 5632, 22, 32, 4, 64, 32000, tied=False),
    Shape("Llama 7B", 4096, 11008, 32, 32, 32, 128, 32000, tied=False),
    Shape("Llama 3 70B", 8192, 28672, 80, 64, 8, 128, 128256, tied=False),
]
"""As published; the first two are the models that can be trained here."""

_TRAINABLE: dict[str, Shape] = {catalogue.STORYTELLER: SHAPES[0], catalogue.SMOLLM2: SHAPES[1]}


def shape_of(model: ModelName) -> Shape:
    """The dimensions of a model that can be trained here, by its name in `engine.catalogue`."""
    return _TRAINABLE[model]


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is.

    Args:
        per_module: numbers that the adapter of each projection of one layer has.
        total: of all layers.
        share: `total` over the parameters of the whole model, from 0 to 1.
    """

    per_module: dict[str, int]
    total: int
    share: float

    def nbytes(self, dtype: str) -> int:
        """Bytes of the adapter in a dtype that `BYTES` lists."""
        return self.total * BYTES[dtype]


def adapter_parameters(shape: Shape, rank: int, targets: Targets) -> AdapterSize:
    """The size of adapters of one rank, R·(I + O) for each projection of every layer.

    Args:
        shape: of the model.
        rank: R, from 1 to the smallest side of what is adapted.
        targets: a key of `TARGETS`.

    Raises:
        InputError: the rank is out of range.
    """
    shapes = {name: shape.config.projections[name] for name in TARGETS[targets]}
    smallest = min(min(sides) for sides in shapes.values())
    if not 1 <= rank <= smallest:
        raise InputError(f"rank is {rank}: it must be from 1 to {smallest}, the smallest side of what is adapted.")
    per_module = {name: rank * (inputs + outputs) for name, (inputs, outputs) in shapes.items()}
    total = shape.num_layers * sum(per_module.values())
    return AdapterSize(per_module, total, total / shape.config.num_parameters)


_RECORDED = Path(__file__).parents[1] / "recorded"


@dataclass(frozen=True)
class StepCost:
    """What one training step costs one way of training, as it was recorded.

    Args:
        way: as the rows of tests/benchmarks/lora_training_step.py are called, e.g. ``"ours, Decoder"``.
        run: in which run of the benchmark, from 0.
        median_ms, low_ms, high_ms: of a step; the 10th and the 90th percentile.
        peak_bytes: at the step's peak, weights and optimizer included.
        timed: steps that were timed.
    """

    way: str
    run: int
    median_ms: float
    low_ms: float
    high_ms: float
    peak_bytes: float
    timed: int


@dataclass(frozen=True)
class RecordedSteps:
    """Training steps of one large model on a GPU, as they were recorded.

    Args:
        measured: every way in every run.
        notes: of each run, what is to be known about it; the last run is of the code as it is.
        floor_ms: the arithmetic of the model's forward pass and of its activations' gradient, at the speed of one large
            product, both of the last run.
        kernels: share of a step's kernel time, by kind, in the last profile of our Decoder; empty if there is none.
        profiled: in which run that was, from 0; None if in none.
        losses: of every step from one start, nats a token, by what was run.
        parameters: of the model.
        vocab_size: V.
        workload: batch and adapters, in words.
        device, dtype: where, in what.
        date: when, as 2026-01-31.
        versions: of the libraries.
    """

    measured: tuple[StepCost, ...]
    notes: tuple[str, ...]
    floor_ms: float
    kernels: dict[str, float]
    profiled: int | None
    losses: dict[str, tuple[float, ...]]
    parameters: int
    vocab_size: int
    workload: str
    device: str
    dtype: str
    date: str
    versions: dict[str, str]

    @property
    def latest(self) -> dict[str, StepCost]:
        """Each way as the last run that has it measured it."""
        return {cost.way: cost for cost in self.measured}

    def loss_difference(self, one: str, other: str, steps: int | None = None) -> float:
        """The largest difference between the losses of two runs, over their first steps or all."""
        pairs = zip(self.losses[one][:steps], self.losses[other][:steps], strict=True)
        return max(abs(loss - other_loss) for loss, other_loss in pairs)

    @property
    def provenance(self) -> str:
        """Where, when and with what, in a few words."""
        versions = ", ".join(f"{name} {self.versions[name].rpartition('.')[0]}" for name in ("torch", "peft"))
        return f"recorded on an {self.device.removeprefix('NVIDIA ')}, {self.date}, {versions}"


@lru_cache(maxsize=2)
def recorded_steps(of: Literal["lora", "qlora"] = "lora") -> RecordedSteps | None:
    """What a training step costs on an H200, with PEFT's adapters and with ours, on a 16-bit or on a 4-bit model.

    Returns:
        The recording, or None where its file is missing.
    """
    try:
        log = json.loads((_RECORDED / f"{of}_training_step_h200.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    runs = log["runs"]
    rows = [(number, row) for number, run in enumerate(runs) for row in run["rows"]]
    evidence = rows[-1][1]["evidence"]
    compared = [run["losses"]["runs"] for run in runs if "losses" in run]
    profiles = [(number, run["profile"]) for number, run in enumerate(runs) if "profile" in run]
    profiles = [found for found in profiles if found[1]["row"] == "ours, Decoder"]
    profiled, profile = profiles[-1] if profiles else (None, {"kernels_ms": {}, "all_kernels_ms": 1.0})
    return RecordedSteps(
        measured=tuple(
            StepCost(
                way=row["row"],
                run=number,
                peak_bytes=1e6 * row["peak_mb"],
                timed=row["evidence"]["runs"],
                **{name: row["evidence"][name] for name in ("median_ms", "low_ms", "high_ms")},
            )
            for number, row in rows
        ),
        notes=tuple(run["note"] for run in runs),
        floor_ms=runs[-1]["floor"]["floor_ms"],
        kernels={kind: ms / profile["all_kernels_ms"] for kind, ms in profile["kernels_ms"].items()},
        profiled=profiled,
        losses={name: tuple(losses) for name, losses in compared[-1].items()} if compared else {},
        parameters=max(row["trainable"] for _, row in rows),
        vocab_size=log["model"]["vocab_size"],
        workload=evidence["shape"],
        device=evidence["device"],
        dtype=evidence["dtype"],
        date=log["recorded"],
        versions=log["versions"],
    )
