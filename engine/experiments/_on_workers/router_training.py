"""The small mixture-of-experts language model of the router lab, how it learns, and what is written down meanwhile.

Legend: M checkups, N held-out tokens, E experts, J sources, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data import Dataset
from engine.errors import InputError
from engine.experiments._router_languages import NAMES, Languages
from engine.experiments._router_sources import Specialisation, Typical, find_typical, specialise
from engine.experiments.router_collapse import BLOCK_SIZE, D_MODEL, FFN_DIM, VOCAB_SIZE
from engine.model import Decoder, ModelConfig, Parts, SwiGLU, evaluating
from engine.moe.balance import auxiliary_loss
from engine.moe.feed_forward import MoEFeedForward
from engine.moe.observation import observing
from engine.moe.routing import ExpertRouter, check_finite
from engine.moe.statistics import Load, load_from_counts
from engine.trainer import DivergedError, Precision, Trainer, TrainerOptions, summed_loss


def build(num_experts: int, top_k: int, bias_rate: float) -> Decoder:
    """Two layers: the feed-forward network of the first is dense, that of the second a mixture of experts.

    Source: the first layers stay dense as in DeepSeek-V3, section 4.2, https://arxiv.org/abs/2412.19437.
    """
    config = ModelConfig(
        d_model=D_MODEL, num_layers=2, num_heads=2, ffn_dim=FFN_DIM, vocab_size=VOCAB_SIZE, max_seq_len=BLOCK_SIZE
    )
    router = ExpertRouter(D_MODEL, num_experts, top_k, bias_rate=bias_rate, bias_step="fixed")
    layers = iter((SwiGLU(D_MODEL, FFN_DIM), MoEFeedForward(D_MODEL, FFN_DIM, num_experts, top_k, router=router)))
    return Decoder(config, Parts(feed_forward=lambda _: next(layers)))


class BalancedTrainer(Trainer):
    """A `Trainer` whose loss may contain the routers' auxiliary loss, and that looks at what they decide.

        loss = −mean ln p(next token) + weight · Σ over routers of E·Σₑ fₑ·Pₑ

    Args:
        model, dataset, options: as `Trainer`'s.
        aux_weight: of the auxiliary loss; 0 for none.
        settings: as `Trainer`'s others.

    Raises:
        DivergedError: while training also if a router's logits are no finite numbers; the message names the layer.

    Source: Fedus et al. 2021, equation 4, https://arxiv.org/abs/2101.03961.
    """

    def __init__(
        self, model: Decoder, dataset: Dataset, options: TrainerOptions, *, aux_weight: float, **settings: Any
    ) -> None:
        self.aux_weight = aux_weight
        self.next_token_loss = 0.0
        self.chosen: list[Tensor] = []
        """How often each expert was chosen in the steps so far, (E,) each; whoever reads it may empty it."""
        super().__init__(model, dataset, options, **settings)

    def _configure(self, options: TrainerOptions, optimizer: torch.optim.Optimizer) -> None:
        super()._configure(options, optimizer)
        self._loss = self._balanced_loss

    def _balanced_loss(self, model: Decoder, inputs: Tensor, targets: Tensor, precision: Precision) -> Tensor:
        """The summed loss of the tokens, and as many times the auxiliary loss."""
        try:
            with observing(model) as seen:
                loss = summed_loss(model, inputs, targets, precision)
            for layer, routing in seen:
                check_finite(routing, f"The router in {layer}")  # on a GPU the router itself does not look
        except InputError as error:
            self._stop_routing(str(error))
        self.chosen += [routing.wanted for _, routing in seen]
        self.next_token_loss = loss.item() / targets.numel()
        if not self.aux_weight:
            return loss
        return loss + targets.numel() * self.aux_weight * sum(auxiliary_loss(routing) for _, routing in seen)

    def _stop_routing(self, what: str) -> NoReturn:
        step = self.step + 1
        raise DivergedError(f"Training stopped at step {step} of {self.total_steps}: {what.rstrip('.')}.", step)


@dataclass(frozen=True)
class Checkup:
    """How the model does after `step` on the held-out tokens, and how busy its experts were in training.

    Args:
        step: steps taken.
        loss: mean next-token loss, in nats a token.
        source_loss: (J,), the same for each source.
        load: of the experts on the held-out tokens.
        trained: the same on the tokens of the steps since the last checkup; None if there were no steps.
        bias: (E,), for the selection.
        router_entropy: mean entropy of a token's probabilities, in nats.
        directions: that the tokens at the router spread over.
        specialisation: of the experts.
    """

    step: int
    loss: float
    source_loss: np.ndarray
    load: Load
    trained: Load | None
    bias: np.ndarray
    router_entropy: float
    directions: float
    specialisation: Specialisation


@dataclass
class Diary:
    """What is written down about a run.

    Args:
        model: that learns.
        languages: what from.
    """

    model: Decoder
    languages: Languages
    losses: list[float] = field(default_factory=list)
    checkups: list[Checkup] = field(default_factory=list)
    typical: tuple[Typical, ...] = ()

    def __post_init__(self) -> None:
        blocks = self.languages.held_out
        self._batch = blocks.batch(torch.arange(len(blocks))).to(next(self.model.parameters()).device)
        per_source = self._batch.inputs.numel() // len(NAMES)
        self._sources = np.repeat(np.arange(len(NAMES)), per_source)  # (N,)
        self._labels = [_printable(self.languages.tokenizer.decode([index])) for index in range(VOCAB_SIZE)]

    def examine(self, step: int, chosen: list[Tensor]) -> None:
        """Look at the model after `step`; `chosen` is how often each expert was since the last time."""
        if self.checkups and self.checkups[-1].step == step:
            return
        mixture, inputs = self.model.layers[-1].mlp, []
        handle = mixture.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2)))
        with evaluating(self.model), observing(self.model) as seen:
            logits = self.model(self._batch.inputs)  # (B, T, V)
        handle.remove()
        losses = F.cross_entropy(logits.flatten(0, 1), self._batch.targets.flatten(), reduction="none")  # (N,)
        source_loss = losses.view(len(NAMES), -1).mean(1).double().cpu().numpy()
        ((_, routing),) = seen
        tokens, experts = routing.tokens.cpu().numpy(), routing.experts.cpu().numpy()
        num_experts = routing.logits.shape[-1]
        self.checkups.append(
            Checkup(
                step=step,
                loss=float(source_loss.mean()),
                source_loss=source_loss,
                load=load_from_counts(routing.counts.cpu().numpy()),
                trained=load_from_counts(torch.stack(chosen).sum(0).cpu().numpy()) if chosen else None,
                bias=mixture.router.selection_bias.cpu().numpy().copy(),
                router_entropy=torch.special.entr(routing.probs).sum(-1).mean().item(),
                directions=count_directions(inputs[0]),
                specialisation=specialise(self._sources, tokens, experts, len(NAMES), num_experts),
            )
        )
        ids = self._batch.inputs.flatten().tolist()
        self.typical = find_typical([self._labels[index] for index in ids], self._sources, tokens, experts, num_experts)


def count_directions(x: Tensor) -> float:
    """How many directions the rows of x (N, D) spread over: (Σ λ)² / Σ λ² of the eigenvalues of xᵀx.

    From 1, all rows on one line, to D, all directions alike; known as the participation ratio.
    """
    moments = x.float().T @ x.float()  # (D, D)
    return (moments.trace().square() / moments.square().sum()).item()


def _printable(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"
