"""A low-rank map of its own: x·A·B·s, to be added to what a frozen layer gives.

Legend: I inputs, O outputs, R rank; A (I, R), B (R, O), s scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.attention import finite_product
from engine.errors import InputError

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1e6
"""Of α: far from what anyone trains with, and so that s and 1/s leave float32 room for what they multiply."""

ScalingRule = Callable[[float, int], float]
"""(alpha, R) → s."""


def standard_scaling(alpha: float, rank: int) -> float:
    """s = α / R.

    Source: Hu et al. 2021, section 4.1, https://arxiv.org/abs/2106.09685.
    """
    return alpha / rank


def rank_stabilized_scaling(alpha: float, rank: int) -> float:
    """s = α / √R (rsLoRA): the update and its gradients keep their size as the rank grows, under α / R they shrink.

    Source: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
    """
    return alpha / math.sqrt(rank)


class LoRALayer(nn.Module):
    """x·A·B·s with s = α / R.

    A starts uniform in ±1/√I (standard deviation 1/√(3I)), B at exactly 0, and so does the output. The gradient of A is
    s·xᵀ·g·Bᵀ: exactly 0 until the first step has moved B.

    Args:
        in_features: I.
        out_features: O.
        rank: R, from 1 to the smaller of I and O.
        alpha: α, from `SMALLEST_ALPHA` to `LARGEST_ALPHA`; R when left out, which makes s = 1.
        scaling_rule: s from α and R.

    Raises:
        InputError: the rank or α is out of range.

    Source: Hu et al. 2021, equation 3, https://arxiv.org/abs/2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        *,
        scaling_rule: ScalingRule = standard_scaling,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        alpha = rank if alpha is None else alpha
        if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
            raise InputError(f"alpha is {alpha}: it must be from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}.")
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.scaling_rule = scaling_rule
        self.scaling = scaling_rule(alpha, rank)
        self.A = nn.Parameter(torch.empty(in_features, rank))
        self.B = nn.Parameter(torch.empty(rank, out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A anew and set B to 0."""
        bound = self.in_features**-0.5
        self.A.uniform_(-bound, bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) → (…, O), finite for every finite x: what would overflow saturates."""
        u = finite_product(lambda x: x @ self.A.to(x.dtype), x)  # (…, R)
        return finite_product(lambda u: u @ (self.scaling * self.B).to(u.dtype), u)  # (…, O)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, scaling={self.scaling:.4g}"


def check_rank(rank: int, in_features: int, out_features: int, layer: str | None = None) -> None:
    """Raise `InputError` unless the rank is from 1 to the smaller side of a layer, which is named if it has a name."""
    most = min(in_features, out_features)
    if not 1 <= rank <= most:
        where = f" for {layer}" if layer else ""
        raise InputError(
            f"The rank is {rank}{where}: it must be from 1 to {most}, the smaller side of a layer with "
            f"{in_features} inputs and {out_features} outputs."
        )
