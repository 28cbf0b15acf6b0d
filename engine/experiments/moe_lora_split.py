"""Two inputs with opposite targets and two experts: the selection bias pushes them apart, round by round.

Legend: S rounds, D width of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from engine.errors import JobCancelledError
from engine.experiments import ExperimentParams

if TYPE_CHECKING:
    from torch import Tensor

    from engine.runtime.jobs import Job

WIDTH = 64
"""D, of inputs and outputs."""

Kind = Literal["sigmoid", "softmax"]

_RANK = 4


class Params(ExperimentParams):
    """Two inputs, a mixture of two experts of which each input takes one, and how it learns."""

    similarity: float = Field(
        0.0,
        ge=-0.99,
        le=0.99,
        title="Similarity of the inputs",
        description="Their cosine: the more alike they are, the more a router must turn to tell them apart.",
        json_schema_extra={"step": 0.01},
    )
    bias_rate: float = Field(
        0.02,
        ge=0,
        le=1,
        title="Bias rate",
        description="First step of the bias, on the selection only; 0 leaves it off.",
        json_schema_extra={"step": 0.01},
    )
    kind: Kind = Field(
        "sigmoid", title="Gates", description="Sigmoid scores each expert by itself, softmax against the other."
    )
    learning_rate: float = Field(
        0.01, gt=0, le=1, title="Learning rate", description="Of AdamW, for experts and router alike."
    )
    rounds: int = Field(100, ge=1, le=400, title="Rounds", description="Updates on both inputs together.")
    seed: int = Field(5, ge=0, le=9999, title="Seed", description="Of the inputs, the target and the first weights.")
    others: int = Field(
        0, ge=0, le=20, title="Other seeds", description="The next ones, run as well to see whether theirs part too."
    )


@dataclass(frozen=True)
class Result:
    """How the two inputs fared; index 0 is before the first round.

    Args:
        scores: (S + 1, 2, 2), of each input for each expert, to which the bias is added: σ(logit), with softmax the
            logit itself.
        bias: (S + 1, 2), of each expert.
        chosen: (S + 1, 2), the expert that each input takes.
        loss: (S + 1, 2), mean squared error of each input.
        cosine: of the two inputs, as drawn.
        others: of each other seed the round from which on its inputs take different experts to the end; None if they
            do not.
    """

    scores: np.ndarray
    bias: np.ndarray
    chosen: np.ndarray
    loss: np.ndarray
    cosine: float
    others: list[int | None]

    @property
    def lead(self) -> np.ndarray:
        """(S + 1, 2), by how much each input's score for expert 0 exceeds that for expert 1."""
        return self.scores[..., 0] - self.scores[..., 1]

    @property
    def handicap(self) -> np.ndarray:
        """(S + 1,), what the bias takes from expert 0's lead: an input takes expert 0 if its lead is larger."""
        return self.bias[:, 1] - self.bias[:, 0]

    @property
    def apart(self) -> bool:
        """Whether they end on different experts."""
        return bool(self.chosen[-1, 0] != self.chosen[-1, 1])

    @property
    def settled(self) -> int | None:
        """The round from which on they take different experts to the end; None if they do not."""
        together = np.flatnonzero(self.chosen[:, 0] == self.chosen[:, 1])
        if not self.apart:
            return None
        return int(together[-1]) + 1 if len(together) else 0


def run(params: Params, job: Job) -> Result:
    """Take all rounds, AdamW on the mean squared error alone; then the other seeds likewise."""
    found = _train(params, job.device)
    others = []
    for index in range(params.others):
        if job.cancelled:
            raise JobCancelledError("The job was cancelled before all seeds were run.")
        others.append(_train(params.model_copy(update={"seed": params.seed + 1 + index}), job.device).settled)
        job.report(1 + index, params.others)
    return replace(found, others=others)


def _train(params: Params, device: str) -> Result:
    import torch
    from torch.nn import functional as F

    from engine.moe.lora import MoELoRALayer

    torch.manual_seed(params.seed)
    layer = MoELoRALayer(WIDTH, WIDTH, 2, _RANK, kind=params.kind, bias_rate=params.bias_rate).to(device)
    target = torch.randn(WIDTH)
    inputs, targets = _inputs(params.similarity).to(device), torch.stack([target, -target]).to(device)  # (2, D)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=params.learning_rate)
    scores, bias, chosen, losses = [], [], [], []

    @torch.no_grad()
    def look() -> None:
        layer.eval()
        indices, log_scores = layer.router.select(layer.router.logits(inputs))
        scores.append((log_scores.exp() if params.kind == "sigmoid" else log_scores).tolist())
        bias.append(layer.router.selection_bias.tolist())
        chosen.append(indices[:, 0].tolist())
        losses.append((layer(inputs) - targets).square().mean(1).tolist())
        layer.train()

    look()
    for _ in range(params.rounds):
        optimizer.zero_grad()
        F.mse_loss(layer(inputs), targets).backward()
        optimizer.step()
        look()
    cosine = round(F.cosine_similarity(inputs[0], inputs[1], dim=0).item(), 4) + 0.0
    return Result(np.array(scores), np.array(bias), np.array(chosen), np.array(losses), cosine, [])


def _inputs(similarity: float) -> Tensor:
    """Two vectors of norm √D with this cosine, (2, D)."""
    import torch

    first, other = torch.linalg.qr(torch.randn(WIDTH, 2)).Q.T
    second = similarity * first + (1 - similarity**2) ** 0.5 * other
    return WIDTH**0.5 * torch.stack([first, second])
