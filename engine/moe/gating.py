"""The choice of K experts for each token without sorting the tokens, and what it does to columns that lie side by side.

What is written here in plain PyTorch is the definition; on CUDA `engine.moe.gating_kernels` does each in one launch.

Legend: N tokens, E experts, K experts chosen per token, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from engine.moe.rows import HAS_TRITON


class Choice(NamedTuple):
    """What a token's experts are and how much each one counts.

    Args:
        indices: best first, −1 for padding, (N, K).
        gates: in the same order; of no meaning for padding, (N, K).
    """

    indices: Tensor
    gates: Tensor

    def without(self, expert: int) -> Choice:
        """The same with the gate of one expert taken for 0."""
        return self._replace(gates=self.gates.masked_fill(self.indices == expert, 0))


def gate_columns(u: Tensor, choice: Choice, num_experts: int, rank: int, scaling: float, limit: float) -> Tensor:
    """Each expert's R columns of u times s and its gate, exactly 0 for the tokens that did not choose it.

    Args:
        u: (N, E·R), or (N, R) if all experts read the same; NaN counts as 0, and what is beyond ±limit as that.
        choice: of the N tokens.
        num_experts: E.
        rank: R.
        scaling: s.
        limit: see u.

    Returns:
        (N, E·R) in u's dtype.
    """
    if has_kernels(u, num_experts):
        return _GateColumns.apply(u, choice.gates, choice.indices, (num_experts, rank, scaling, limit))
    places = choice.indices.remainder(num_experts + 1)  # padding's −1 becomes E
    table = choice.gates.new_zeros(len(u), num_experts + 1).scatter(1, places, choice.gates)[:, :-1]  # (N, E)
    return scaled(within(u, limit).unflatten(1, (-1, rank)), scaling * table[:, :, None]).flatten(1)


def scaled(u: Tensor, gates: Tensor) -> Tensor:
    """u·gates, rounded to u's dtype once: gates alone may be beyond it."""
    return (u.to(torch.promote_types(u.dtype, gates.dtype)) * gates).to(u.dtype)


def within(u: Tensor, limit: float) -> Tensor:
    """u with what is beyond ±limit as that, and NaN as 0."""
    return u.nan_to_num(0.0, limit, -limit).clamp(-limit, limit)


def has_kernels(like: Tensor, num_experts: int) -> bool:
    """Whether the kernels take such a tensor: on CUDA, up to float32, and not in what is being compiled."""
    if not (like.is_cuda and HAS_TRITON) or torch.compiler.is_compiling() or like.dtype == torch.float64:
        return False
    from engine.moe.gating_kernels import LARGEST_EXPERTS

    return num_experts <= LARGEST_EXPERTS


def choose_in_one_launch(
    product: Tensor, bias: Tensor, valid: Tensor | None, counts: Tensor | None, top_k: int, options: dict[str, float]
) -> Choice:
    """`engine.moe.gating_kernels.choose` with a gradient; `options` are the keywords of that."""
    return Choice(*_ChooseInOneLaunch.apply(product, bias, valid, counts, top_k, options))


class _ChooseInOneLaunch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        product: Tensor,
        bias: Tensor,
        valid: Tensor | None,
        counts: Tensor | None,
        top_k: int,
        options: dict[str, float],
    ) -> tuple[Tensor, Tensor]:
        from engine.moe import gating_kernels

        indices, gates = gating_kernels.choose(product, bias, valid, counts, top_k=top_k, **options)
        ctx.save_for_backward(product, indices, gates)
        ctx.mark_non_differentiable(indices)
        ctx.options = options
        return indices, gates

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, _: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from engine.moe import gating_kernels

        return gating_kernels.choose_backward(gradient, *ctx.saved_tensors, **ctx.options), None, None, None, None, None


class _GateColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, gates: Tensor, indices: Tensor, sizes: tuple) -> Tensor:
        from engine.moe import gating_kernels

        ctx.save_for_backward(u, indices, gates)
        ctx.sizes = sizes
        return gating_kernels.gate_columns(u, indices, gates, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from engine.moe import gating_kernels

        return *gating_kernels.gate_columns_backward(gradient, *ctx.saved_tensors, *ctx.sizes[1:]), None, None
