"""What the experiments of the MoE-LoRA lab share: the mixture's settings, and the plain LoRAs that it is compared with.

Needs no torch.

Legend: L layers, I inputs, O outputs, E experts, K chosen per token, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from engine.experiments import ExperimentParams, _lora, _router, lora
from engine.experiments._lora import ModelName, Targets
from engine.moe.tasks import read_tasks

Kind = Literal["sigmoid", "softmax", "noisy", "random"]
"""Of routing. Expert choice is left out: it would let a token's experts depend on tokens that come after it."""

Role = Literal["MoE-LoRA", "LoRA, equal parameters", "LoRA, equal FLOPs"]

ROLES: tuple[Role, ...] = ("MoE-LoRA", "LoRA, equal parameters", "LoRA, equal FLOPs")

LEARNING_RATES: dict[Role, float] = {
    "MoE-LoRA": 8e-3,
    "LoRA, equal parameters": 4e-3,
    "LoRA, equal FLOPs": 8e-3,
}
"""Of each run: what `best_rates` says of `tried_rates`, the same tries and the same rule for all three."""

_RATES_RECORD = Path(__file__).parents[1] / "recorded" / "moe_lora_learning_rates.json"


@dataclass(frozen=True)
class Try:
    """One training of one run with one learning rate, by tests/benchmarks/moe_lora_rates.py.

    Args:
        role: of the run.
        learning_rate: the highest.
        seed: of the first values and the order.
        right: share of the questions that are never trained on that was answered rightly at the end.
        loss: of these, in nats a token.
    """

    role: Role
    learning_rate: float
    seed: int
    right: float
    loss: float


@dataclass(frozen=True)
class TriedRates:
    """All of them.

    Args:
        tries: in the order of the record.
        steps: of each training.
        device: where they ran.
        date: when.
    """

    tries: tuple[Try, ...]
    steps: int
    device: str
    date: str


@lru_cache(maxsize=1)
def tried_rates() -> TriedRates | None:
    """The tries as they were recorded; None if there is no record."""
    if not _RATES_RECORD.is_file():
        return None
    log = json.loads(_RATES_RECORD.read_text(encoding="utf-8"))
    run = log["runs"][-1]
    return TriedRates(tuple(Try(**one) for one in run["tries"]), run["steps"], log["device"], run["recorded"])


def best_rates(tries: Sequence[Try]) -> dict[Role, float]:
    """Of the rates tried for each run the one with most right answers over all seeds; of equal ones, with least loss.

    Args:
        tries: of every run with every rate and seed.
    """

    def merit(role: Role, rate: float) -> tuple[float, float]:
        own = [one for one in tries if (one.role, one.learning_rate) == (role, rate)]
        return sum(one.right for one in own), -sum(one.loss for one in own)

    rates = sorted({one.learning_rate for one in tries})
    return {role: max(rates, key=lambda rate: merit(role, rate)) for role in ROLES}


TASK_NAMES = tuple(task.name for task in read_tasks())

SCALING = 2.0
"""s of every adapter, α / R: the same for all of them, whatever their rank."""

_LONGEST = 24
"""Tokens of the longest lesson, in round numbers."""


@dataclass(frozen=True)
class Size:
    """What an adapter is, over all layers of a model.

    Args:
        rank: R, of each expert if there are several.
        trainable: numbers that are trained.
        flops: that it adds to the forward pass of one token, a multiplication and an addition counted as two.
    """

    rank: int
    trainable: int
    flops: int


class MixtureParams(ExperimentParams):
    """A model and the mixture of adapters on it."""

    model: ModelName = Field(
        "storyteller",
        title="Model",
        description="storyteller (our own, 5.8 M parameters, a minute) or smollm2-135m (takes much longer on a CPU).",
    )
    experts: int = Field(4, ge=1, le=8, title="Experts", description="Adapters that each adapted projection has.")
    top_k: int = Field(1, ge=1, le=8, title="Experts a token (K)", description="How many of them adapt each token.")
    rank: int = Field(4, ge=1, le=16, title="Rank of each expert", description="Columns of A, rows of B.")
    targets: Targets = Field("all", title="Adapted projections", description="Which matrices of every layer.")
    kind: Kind = Field(
        "sigmoid",
        title="Routing",
        description="Sigmoid scores each expert by itself, softmax against the others, noisy adds noise while "
        "training, random draws lots: what a router must beat.",
    )
    bias_rate: float = Field(
        0.02,
        ge=0,
        le=1,
        title="Bias rate",
        description="First step of the bias that sends texts to idle experts, on the selection only; 0 leaves it off.",
        json_schema_extra={"step": 0.01},
    )
    shared_a: bool = Field(
        False, title="One A for all", description="Experts read alike and write each its own, as in HydraLoRA."
    )
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of the first values and of the lessons' order.")

    @model_validator(mode="after")
    def _check_sizes(self) -> MixtureParams:
        _router.check_top_k(self.top_k, self.experts)
        equal, widest = self._equal_rank(), self._smallest_side()
        if equal > widest:
            raise ValueError(
                f"{self.experts} experts of rank {self.rank} have the parameters of one LoRA of rank {equal}, but the "
                f"smallest side of what is adapted is {widest}: choose fewer experts or a lower rank."
            )
        return self

    @property
    def sides(self) -> list[tuple[int, int]]:
        """(I, O) of each adapted projection of one layer."""
        shapes = _lora.shape_of(self.model).config.projections
        return [shapes[name] for name in _lora.TARGETS[self.targets]]

    def mixture(self) -> Size:
        """Of the mixture, over all layers.

        parameters = Σ E·R·(I + O) + E·I          with one A for all  Σ R·I + E·R·O + E·I
        FLOPs      = 2·Σ K·R·(I + O) + E·I        with one A for all  2·Σ R·I + K·R·O + E·I

        E·I is the router. FLOPs are those of the K experts that a token needs; the concatenated form, which is faster
        for small ranks, computes all E.
        """
        E, K, R, layers = self.experts, self.top_k, self.rank, self._layers
        readers, read = (1, 1) if self.shared_a else (E, K)
        trainable = sum(R * (readers * inputs + E * outputs) + E * inputs for inputs, outputs in self.sides)
        products = sum(R * (read * inputs + K * outputs) + E * inputs for inputs, outputs in self.sides)
        return Size(R, layers * trainable, 2 * layers * products)

    def plain(self, rank: int) -> Size:
        """Of a LoRA with this rank, over all layers."""
        numbers = self._layers * rank * self._sum_of_sides
        return Size(rank, numbers, 2 * numbers)

    def size(self, role: Role) -> Size:
        """Of the mixture, or of the LoRA whose rank comes closest to it in parameters or in FLOPs a token."""
        if role == "MoE-LoRA":
            return self.mixture()
        if role == "LoRA, equal parameters":
            return self.plain(self._equal_rank())
        return self.plain(max(1, round(self.mixture().flops / self.plain(1).flops)))

    def _equal_rank(self) -> int:
        return max(1, round(self.mixture().trainable / self.plain(1).trainable))

    def _smallest_side(self) -> int:
        return min(min(sides) for sides in self.sides)

    @property
    def _layers(self) -> int:
        return _lora.shape_of(self.model).num_layers

    @property
    def _sum_of_sides(self) -> int:
        return sum(inputs + outputs for inputs, outputs in self.sides)

    def activation_bytes(self, lessons: int) -> int:
        """What the routers and experts of so many lessons keep for the backward pass, about.

        4·(3·E·R + 16·E + 2·O) for each token and adapted projection: x·A three times (with the gates, without them,
        and what is saturated of it), the router's tables, and what the mixture adds twice.
        """
        width = sum(3 * self.experts * self.rank + 16 * self.experts + 2 * outputs for _, outputs in self.sides)
        return 4 * lessons * _LONGEST * self._layers * width


def tuning_bytes(params: MixtureParams, lessons: int) -> int:
    """What training the mixture allocates at its peak: that of a LoRA with as many parameters, and what routing adds.

    Args:
        params: of the mixture.
        lessons: in one batch.
    """
    alike = lora.Params(model=params.model, targets=params.targets, rank=min(64, params.size(ROLES[1]).rank),
                        batch_size=min(128, lessons))  # fmt: skip
    beyond = 4 * 4 * max(0, params.mixture().trainable - alike.predict().trainable)
    return alike.memory_bytes() + beyond + params.activation_bytes(lessons)
