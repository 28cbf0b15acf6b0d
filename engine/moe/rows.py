"""What happens to the rows besides the products: tokens are gathered for their experts, gated, and summed per token.

On CUDA `engine.moe.kernels` does each in one pass over memory and in a fixed order, so that a run repeats to the bit;
what is written here in plain PyTorch is the definition, and what a compiler fuses by itself.

Legend: N tokens, A assignments (rows), D model width, F feed-forward width.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Assignments:
    """Which token each row belongs to; a token may have any number of rows.

    Args:
        tokens: the rows' tokens, (A,) int64.
        num_tokens: N.
    """

    def __init__(self, tokens: Tensor, num_tokens: int) -> None:
        self.tokens = tokens
        self.num_tokens = num_tokens

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """The rows in the order of their tokens, (A,), and where in it each token's begin and the last ends, (N + 1,).

        All rows of a token are known so without waiting for the GPU, whatever was dropped.
        """
        tokens, order = self.tokens.sort(stable=True)
        return order, torch.searchsorted(tokens, torch.arange(self.num_tokens + 1, device=tokens.device))


def gather(x: Tensor, assignments: Assignments) -> Tensor:
    """rows[a] = x[token of a].

    Args:
        x: (N, D).
        assignments: A of them.

    Returns:
        (A, D).
    """
    if kernels_for(x):
        return _Gather.apply(x, assignments)
    return x[assignments.tokens]


def combine(rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
    """y[n] = Σ gates[a] · rows[a] over the assignments a of token n, summed in float32; 0 for a token without any.

    Args:
        rows: (A, D).
        gates: (A,).
        assignments: A of them.

    Returns:
        (N, D) in the rows' dtype.
    """
    if kernels_for(rows):
        return _Combine.apply(rows, gates, assignments)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    weighted = gates[:, None].to(dtype) * rows.to(dtype)  # (A, D)
    total = weighted.new_zeros(assignments.num_tokens, rows.shape[1])
    return total.index_add(0, assignments.tokens, weighted).to(rows.dtype)


def silu_times(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up.

    Args:
        gate_up: gate and up side by side, (A, 2F).

    Returns:
        (A, F).
    """
    if kernels_for(gate_up):
        return _SiluTimes.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)  # (A, F) each
    return F.silu(gate) * up


def kernels_for(like: Tensor) -> ModuleType | None:
    """`engine.moe.kernels` for a tensor on CUDA, None elsewhere, where Triton is not installed and in what compiles."""
    if not (like.is_cuda and HAS_TRITON and like.dtype in KERNEL_DTYPES) or torch.compiler.is_compiling():
        return None
    from engine.moe import kernels

    return kernels


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, assignments: Assignments) -> Tensor:
        ctx.assignments = assignments
        return x.index_select(0, assignments.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return kernels_for(gradient).sum_rows(gradient, None, *ctx.assignments.by_token), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
        ctx.save_for_backward(rows, gates)
        ctx.assignments = assignments
        return kernels_for(rows).sum_rows(rows, gates, *assignments.by_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, gates = ctx.saved_tensors
        return *kernels_for(rows).sum_rows_backward(gradient, rows, gates, ctx.assignments.tokens), None


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return kernels_for(gate_up).silu_times(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return kernels_for(gate_up).silu_times_backward(gradient, gate_up)
