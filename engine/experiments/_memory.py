"""What the experiments of the memory lab share: the knobs of a training plan, and what was recorded on a GPU.

Needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from engine.architecture import ModelConfig
from engine.experiments import ExperimentParams, _lora
from engine.memory_budget import GB, MOST, PARTS, budget, optimizer_bytes
from engine.training_plan import Method, Optimizer, Plan, Weights

__all__ = ["GB", "MOST", "PARTS", "SHAPES", "Plan", "Weights", "budget"]
"""What pages take from here, the arithmetic's own names among them."""

ShapeName = Literal["storyteller", "SmolLM2-135M", "1.1 B, Llama-shaped", "Llama 7B", "Llama 3 70B"]
Trained = Literal["LoRA", "full fine-tuning"]

SHAPES = {shape.name: shape for shape in _lora.SHAPES}
"""By name."""

CONTEXTS: dict[ShapeName, int] = {
    "storyteller": 512,
    "SmolLM2-135M": 8192,
    "1.1 B, Llama-shaped": 2048,
    "Llama 7B": 4096,
    "Llama 3 70B": 8192,
}
"""Tokens that the model of that shape was trained to read at once; of 7 B that is Llama 2.

Source: storyteller's own record, and ``max_position_embeddings`` of SmolLM2-135M, TinyLlama-1.1B, Llama-2-7b and
Meta-Llama-3-70B on the Hugging Face Hub.
"""

_LONGEST = 2**17


class PlanParams(ExperimentParams):
    """What is trained, and how."""

    shape: ShapeName = Field("Llama 7B", title="Shape of the model", description="Dimensions as published.")
    method: Trained = Field(
        "LoRA", title="What is trained", description="Adapters beside frozen weights, or all weights."
    )
    weights: Weights = Field(
        "nf4, double quantized",
        title="Frozen weights are in",
        description="QLoRA is LoRA beside weights in 4 bits. Double quantized: the scales are in 8 bits as well. "
        "Embeddings, norms and the head stay in 16 bits, as QLoRA leaves them. Weights that are trained themselves "
        "stay in bfloat16 unless float32 is chosen.",
    )
    rank: int = Field(16, ge=1, le=128, title="Rank", description="R of every adapter.")
    targets: _lora.Targets = Field("all", title="Adapted matrices", description="Which of a block's have an adapter.")
    batch: int = Field(2, ge=1, le=256, title="Batch", description="Texts that are computed at once.")
    length: int = Field(1024, ge=16, le=_LONGEST, title="Length", description="Tokens of each text.")
    optimizer: Optimizer = Field(
        "AdamW",
        title="Optimizer",
        description="8-bit keeps a byte for each of AdamW's two means. Paged: the state of large tensors may wait in "
        "the computer's own memory.",
    )
    checkpointing: bool = Field(
        False,
        title="Gradient checkpointing",
        description="Keep only each block's input and compute the rest again in the backward pass.",
    )

    @model_validator(mode="after")
    def _adapts(self) -> PlanParams:
        _lora.adapter_parameters(SHAPES[self.shape], self.rank, self.targets)
        return self

    @property
    def trainable_weights(self) -> Weights:
        """The format in which all weights could be trained: float32 if that is chosen, else bfloat16."""
        return "float32" if self.weights == "float32" else "bfloat16"

    def plan(self, method: Method | None = None, weights: Weights | None = None, *, on_cuda: bool = True) -> Plan:
        """These settings as a plan, or the same with another method or format of the weights."""
        method = method or self.method
        weights = self.trainable_weights if method == "full fine-tuning" else weights or self.weights
        return Plan(
            SHAPES[self.shape].config.model_copy(update={"max_seq_len": _LONGEST}),
            method,
            weights,
            self.rank,
            _lora.TARGETS[self.targets],
            self.batch,
            self.length,
            self.optimizer,
            self.checkpointing,
            on_cuda,
        )


def describe(plan: Plan) -> str:
    """A plan in a few words, e.g. ``"LoRA, nf4, rank 16, AdamW, 2 × 1,024 tokens"``."""
    words = [plan.method, plan.weights]
    if plan.method == "LoRA":
        words.append(f"rank {plan.rank}")
    words += [plan.optimizer, f"{plan.batch} × {plan.length:,} tokens"]
    return ", ".join(words + ["checkpointing"] * plan.checkpointing)


def differences(plan: Plan, other: Plan) -> list[str]:
    """In which of the settings of this lab two plans differ, in the order in which they weigh.

    The rank and the matrices of adapters count where both have some, and the head where weights are in few bits.
    """
    both_adapt = plan.method == other.method == "LoRA"
    found = {
        "what is trained": plan.method != other.method,
        "format of the weights": plan.weights != other.weights,
        "checkpointing": plan.checkpointing != other.checkpointing,
        "shape": _dimensions(plan) != _dimensions(other),
        "optimizer": plan.optimizer != other.optimizer,
        "rank": both_adapt and plan.rank != other.rank,
        "adapted matrices": both_adapt and set(plan.targets) != set(other.targets),
        "batch": plan.batch != other.batch,
        "length": plan.length != other.length,
        "head in few bits": plan.head_is_quantized != other.head_is_quantized,
    }
    return [name for name, differs in found.items() if differs]


def _dimensions(plan: Plan) -> tuple[object, ...]:
    config = plan.config
    return tuple(config.projections.items()), config.num_layers, config.vocab_size, config.tie_embeddings


@dataclass(frozen=True)
class BytesEach:
    """What full fine-tuning keeps throughout, in bytes for each of the model's parameters.

    Args:
        weight, gradient: of each.
        state: of the optimizer, on the card.
        paged: of the optimizer, not on the card.
    """

    weight: float
    gradient: float
    state: float
    paged: float

    @property
    def total(self) -> float:
        """Wherever it is."""
        return self.weight + self.gradient + self.state + self.paged


def bytes_each(plan: Plan) -> BytesEach:
    """Those of `plan`, which trains everything."""
    on_card, paged = optimizer_bytes(plan)
    count = plan.config.num_parameters
    return BytesEach(plan.width, plan.width, on_card / count, paged / count)


_RECORDED = Path(__file__).parents[1] / "recorded" / "memory_prediction_h200.json"


@dataclass(frozen=True)
class RecordedRow:
    """One plan on a GPU.

    Args:
        row: what it is called.
        plan: what was trained, and how.
        predicted, measured: peak in bytes.
    """

    row: str
    plan: Plan
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Recorded:
    """What tests/benchmarks/memory_prediction.py found on a GPU.

    Args:
        rows: every plan that was measured.
        paged: the paged optimizer's run as `memory_paged.Result` says it, as plain values; None if it failed.
        provenance: where, when and with what, in a few words.
    """

    rows: tuple[RecordedRow, ...]
    paged: dict[str, Any] | None
    provenance: str


@lru_cache(maxsize=1)
def recorded() -> Recorded | None:
    """The recording that comes with the engine; None where it is missing."""
    return read(_RECORDED) if _RECORDED.exists() else None


def read(path: Path) -> Recorded:
    """A file that tests/benchmarks/memory_prediction.py has written; rows that failed are left out."""
    log = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {log['versions'][name]}" for name in ("torch", "bitsandbytes"))
    config = ModelConfig(**{name: value for name, value in log["model"].items() if name in ModelConfig.model_fields})
    rows = tuple(
        RecordedRow(entry["row"], _plan(config, entry["plan"]), entry["predicted"]["peak"], entry["measured"]["peak"])
        for entry in log["rows"]
        if "error" not in entry
    )
    return Recorded(
        rows,
        None if "error" in log["paged"] else log["paged"],
        f"recorded on an {log['device'].removeprefix('NVIDIA ')}, {log['recorded']}, {versions}",
    )


def _plan(config: ModelConfig, fields: dict[str, Any]) -> Plan:
    """A plan from a file."""
    return Plan(config, **{**fields, "targets": tuple(fields["targets"])})
