"""A bias that keeps experts equally busy without a loss: added to what selects them, never to what weighs them.

Legend: B texts, T tokens of a text, E experts, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, distributed, nn

from engine.errors import InputError
from engine.moe.kinds import Step

_FASTER, _SLOWER = 1.2, 0.5
_SMALLEST, _LARGEST = 1e-2, 1e3
"""Of a step, relative to the rate. With a shorter one the bias falls behind a router that goes on learning."""


class SelectionBias(nn.Module):
    """One number for each expert, nudged against its load after every backward pass.

    After a backward pass, with load the tokens that chose each expert in the forward passes that it went through,

        biasₑ ← biasₑ + stepₑ · sign(mean load − loadₑ)

    DeepSeek-V3's step is the rate itself, "fixed", which is best where a batch has many tokens: its signs are noisy
    and small steps average them. With few tokens it is too long, so that it carries two similar tokens to and fro
    between two experts together, or so short that the bias does not catch up with a router that learns. A step in
    proportion to the violation would not help, since two tokens are on one expert or they are not; nor would one that
    decays, since the router moves on. So an "adaptive" step starts at the rate, grows by 1.2 as long as an expert stays
    too busy (or too idle), and is halved when it has gone too far (Rprop): it closes in on any gap, wherever it is.

    The gradient's way through the gates is what tells that a forward pass was for training, so that neither evaluation
    nor the second forward pass of activation checkpointing counts. The nudge itself waits until the bias is needed
    outside of a backward pass: all that is computed again for one backward pass, or for several in a row, is computed
    with the bias of the first time. Only a forward pass that comes between another one and its checkpointed backward
    pass would break that.

    In data parallel training, whenever torch.distributed has a process group, the load is summed over all of its
    processes, so that the bias is that of the joined batch, and the same everywhere. This happens in the forward pass
    that is counted, or where checkpointing computes it again: reading the bias, saving it, evaluating and changing the
    mode wait for nobody. It requires that every process passes through its routers in training equally often and in the
    same order, and backward through each of these passes: one whose part of the batch is empty or padding takes part
    with it. A process that leaves out a forward pass keeps the others waiting, as it would with
    DistributedDataParallel; one that leaves out the backward pass misses the nudge.

    The bias stays in float32 when the model is converted: steps would vanish in half precision.

    Args:
        num_experts: E.
        rate: the first step; 0 for a bias that stays as it is.
        step: "adaptive" or "fixed".

    Raises:
        InputError: the rate is negative or not finite, or there is no such step.

    Source: Wang et al. 2024, algorithm 1, https://arxiv.org/abs/2408.15664; DeepSeek-V3, section 2.1.2,
    https://arxiv.org/abs/2412.19437; the step: Riedmiller and Braun 1993, "A direct adaptive method for faster
    backpropagation learning: the RPROP algorithm".
    """

    def __init__(self, num_experts: int, rate: float, step: Step = "adaptive") -> None:
        super().__init__()
        if not 0 <= rate < float("inf"):
            raise InputError(f"The bias rate is {rate}: it must be at least 0 and finite; 0 leaves the bias as it is.")
        if step not in get_args(Step):
            raise InputError(f"The step of the bias is {step!r}: choose {' or '.join(get_args(Step))}.")
        self.rate, self.step = rate, step
        self.register_buffer("values", torch.zeros(num_experts))
        self.register_buffer("nudges", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)
        self._waiting = False
        self.register_state_dict_pre_hook(_settle_before_saving)

    def watch(self, gates: Tensor, load: Callable[[], Tensor]) -> Tensor:
        """`gates` as they are; when their gradient is computed, `load()` (E,) counts, that of all processes."""
        if self.counts(gates):
            _watch(self, gates, load())
        return gates

    def counts(self, gates: Tensor) -> bool:
        """Whether what becomes of `gates`, or of that which they are made from, will move the bias."""
        return bool(self.training and self.rate and gates.requires_grad)

    def settle(self) -> None:
        """Do the nudge that waits, if there is one and no backward pass is going on."""
        if self._waiting or _in_a_group():
            _settle(self)

    def train(self, mode: bool = True) -> SelectionBias:
        """Set the mode."""
        self.settle()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectionBias:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = self._buffers[name]
            if moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.values.numel()}, rate={self.rate:g}"


def count_votes(chosen: Tensor, num_experts: int) -> Tensor:
    """How many texts have an expert among the K that most of their tokens chose.

    A text votes for K experts that it uses at all, or for as many as there are. Of experts that a text uses equally
    often those with the lowest numbers get its vote, and not a part of it each: two texts that are both split evenly
    would look balanced then, and stay as they are. Where every text is split evenly the votes are not balanced, though
    the tokens are, and the bias moves until some token changes its expert.

    Args:
        chosen: the experts of each token, −1 for padding, (B, T, K).
        num_experts: E.

    Returns:
        (E,), float32; nothing for a text of padding.
    """
    texts, top_k = chosen.flatten(1) + 1, chosen.shape[-1]  # (B, T·K), from 1 up
    counts = torch.zeros(len(texts), num_experts + 1, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(1, texts, torch.ones_like(texts))[:, 1:]  # (B, E)
    lowest_first = torch.arange(num_experts, 0, -1, device=chosen.device) - 1
    votes = (counts * num_experts + lowest_first).topk(top_k).indices  # (B, K)
    used = counts.gather(1, votes) > 0
    return torch.zeros_like(counts).scatter(1, votes, used.to(counts.dtype)).sum(0).to(torch.float32)


def _settle_before_saving(bias: SelectionBias, *_: object) -> None:
    bias.settle()


@torch.compiler.disable
def in_backward() -> bool:
    """Whether this is part of a backward pass, as the second forward pass of checkpointing is."""
    return torch._C._current_graph_task_id() != -1


@torch.compiler.disable
def _watch(bias: SelectionBias, gates: Tensor, load: Tensor) -> None:
    if _in_a_group():
        load = load.clone()
        distributed.all_reduce(load)

    def count(_gradient: Tensor) -> None:
        bias.load += load
        bias._waiting = True

    gates.register_hook(count)


def _in_a_group() -> bool:
    """Whether other processes have routers too: then a load may wait here of which another process knows."""
    return distributed.is_available() and distributed.is_initialized()


@torch.compiler.disable
@torch.no_grad()
def _settle(bias: SelectionBias) -> None:
    if in_backward():
        return
    direction = (bias.load.mean() - bias.load).sign()  # (E,)
    nudge = direction * (bias.rate if bias.step == "fixed" else _adaptive_step(bias, direction))
    bias.values += nudge
    bias.nudges.copy_(torch.where(direction == 0, bias.nudges, nudge))
    bias.load.zero_()
    bias._waiting = False


def _adaptive_step(bias: SelectionBias, direction: Tensor) -> Tensor:
    agreed = direction * bias.nudges.sign()  # (E,)
    factor = torch.where(agreed > 0, _FASTER, torch.where(agreed < 0, _SLOWER, 1.0))
    step = torch.where(bias.nudges == 0, bias.rate, bias.nudges.abs() * factor)
    return step.clamp(_SMALLEST * bias.rate, _LARGEST * bias.rate)
