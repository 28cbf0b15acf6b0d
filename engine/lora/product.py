"""x·Wᵀ + b + s·x·A·B with few kernels and little saved memory, forward and backward.

`adapted_linear_reference` is the formula; `adapted_linear` gives the same numbers for a frozen W, and `adapted_linears`
for several W at once that read the same x (queries, keys and values, say).

Legend: N rows of x (all but its last dimension), I inputs, O outputs, R rank; W (O, I), A (I, R), B (R, O), s scaling;
Σ over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from engine.autocast import product_dtype, without_autocast


class PackedWeight(Protocol):
    """A weight that is kept in few bits, `engine.quantization.production.StoredWeight` say."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W, (O, I), without a gradient."""


class AdaptedWeight(NamedTuple):
    """A frozen linear map and its low-rank update.

    Args:
        weight: W, (O, I), as it is or packed.
        bias: b, (O,), or None.
        A: (I, R), in any floating dtype.
        B: (R, O), likewise.
        scaling: s.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float


def adapted_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """x·Wᵀ + b + s·(x·A)·B as it is written, (…, I) → (…, O). The others as in `AdaptedWeight`."""
    return F.linear(x, weight, bias) + scaling * (x @ A @ B)


def adapted_linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """x·Wᵀ + b + s·(x·A)·B for a frozen W and b, (…, I) → (…, O): `adapted_linears` of one."""
    return adapted_linears(x, [AdaptedWeight(weight, bias, A, B, scaling)])[0]


def adapted_linears(x: Tensor, adapted: Sequence[AdaptedWeight]) -> tuple[Tensor, ...]:
    """x·Wᵀ + b + s·(x·A)·B for each of several frozen W and b that read the same x.

    With g the gradient of an output, u = x·A and v = s·g·Bᵀ, the gradients are

        x: Σ (g·W + v·Aᵀ)        A: xᵀ·v        B: s·uᵀ·g

    so that x and u are all that the backward pass needs beyond the weights and the factors. The products with x are
    taken for all A at once, [A₁ A₂ …]; every addition happens inside the product that follows it, and s is a factor
    that the products take: no elementwise pass over anything of x's or an output's size. Left to autograd the formula
    saves as much, but adds four such passes for each W, and two for each further W that reads x.

    Computes in x's dtype, or in autocast's where that is on. A and B are cast to it once, for forward and backward
    (they are small); W only if it must be. W and b get no gradient; there is no second derivative.

    A packed W is dequantized when it is needed and given up at once, in the forward pass and again in the backward
    pass: at no time are there two of them, and what is kept for the backward pass is the packed one.

    Args:
        x: (…, I), contiguous or not.
        adapted: one or more, all with I inputs; O, R and s may differ.

    Returns:
        (…, O) for each.

    Raises:
        RuntimeError: from autograd, if a result is differentiated twice.

    Source: Hu et al. 2021, equation 3, https://arxiv.org/abs/2106.09685.
    """
    weights, biases, As, Bs, scalings = zip(*adapted, strict=True)
    return _AdaptedLinears.apply(x.to(product_dtype(x)), scalings, *weights, *biases, *As, *Bs)


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *operands: Any) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = _in_groups(operands, len(scalings))
        ctx.scalings, ctx.ranks = scalings, [A.shape[1] for A in As]
        ctx.dtypes = [factor.dtype for factor in (*As, *Bs)]
        A = (torch.cat(As, dim=1) if len(As) > 1 else As[0]).to(x.dtype)  # (I, ΣR)
        Bs = [B.to(x.dtype) for B in Bs]
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        u = rows @ A  # (N, ΣR)
        outputs = []
        for weight, bias, B, s, u_own in zip(weights, biases, Bs, scalings, _columns(u, ctx.ranks), strict=True):
            y = F.linear(rows, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))  # (N, O)
            outputs.append(_add_product(y, u_own, B, s).view(*x.shape[:-1], y.shape[-1]))
        ctx.packed = [None if isinstance(weight, Tensor) else weight for weight in weights]
        saved = [weight if isinstance(weight, Tensor) else None for weight in weights]
        ctx.save_for_backward(x, u, A, *saved, *Bs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(gradients[0]):  # what forward has cast is not to be cast again
            return _gradients(ctx, gradients)


def _gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    x, u, A, *others = ctx.saved_tensors
    count, ranks = len(gradients), ctx.ranks
    saved, Bs = _in_groups(others, count)
    x_wanted, _, *wanted = ctx.needs_input_grad
    _, _, As_wanted, Bs_wanted = _in_groups(wanted, count)
    dtypes_A, dtypes_B = _in_groups(ctx.dtypes, count)
    gs = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]  # (N, O) each
    v = torch.empty_like(u)  # (N, ΣR)
    for v_own, g, B, s in zip(_columns(v, ranks), gs, Bs, ctx.scalings, strict=True):
        v_own.addmm_(g, B.t(), beta=0, alpha=s)
    of_x, of_As, of_Bs = None, [None] * count, [None] * count
    if x_wanted:
        for g, packed, weight in zip(gs, ctx.packed, saved, strict=True):
            W = _dense(packed or weight, x.dtype)
            of_x = g @ W if of_x is None else _add_product(of_x, g, W)  # (N, I)
            del W  # or it were there while the next one is made
        of_x = _add_product(of_x, v, A.t()).view(x.shape)
    if any(As_wanted):
        of_A = x.reshape(-1, x.shape[-1]).t() @ v  # (I, ΣR)
        of_As = [own.to(dtype) for own, dtype in zip(_columns(of_A, ranks), dtypes_A, strict=True)]
    if any(Bs_wanted):  # beta = 0: the first argument is not read, it only gives the shape
        each = zip(Bs, _columns(u, ranks), gs, ctx.scalings, dtypes_B, strict=True)
        of_Bs = [torch.addmm(B, u_own.t(), g, beta=0, alpha=s).to(dtype) for B, u_own, g, s, dtype in each]
    return of_x, None, *(None,) * 2 * count, *of_As, *of_Bs


def _columns(matrix: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Views of so many columns each."""
    return (matrix,) if len(sizes) == 1 else matrix.split_with_sizes(sizes, dim=1)


def _in_groups(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _dense(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """total + factor·left·right, into `total` itself.

    A compiler would copy `total` first: it gets a sum, to fuse with what follows, and the factor on the small matrix.
    """
    if torch.compiler.is_compiling():
        return total + left @ (right if factor == 1 else factor * right)
    return total.addmm_(left, right, alpha=factor)
