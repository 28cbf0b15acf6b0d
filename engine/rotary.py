"""Rotary position embedding: turn each pair of features by an angle that grows with the position.

Legend: T positions, d head width; a plane is a pair of features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys so that their product depends on the distance between them alone.

    Feature i and feature i + d/2 form a plane; at position m it turns by m·θ_i with θ_i = theta^(−2i/d):

        x'_i       = x_i·cos(mθ_i) − x_{i+d/2}·sin(mθ_i)
        x'_{i+d/2} = x_{i+d/2}·cos(mθ_i) + x_i·sin(mθ_i)

    The pairing of halves is that of Llama's checkpoints in the Hugging Face format.

    Args:
        head_dim: d, even.
        theta: base of the angles; larger turns slower and reaches further.

    Raises:
        ValueError: `head_dim` is odd.

    Source: Su et al. 2021, RoFormer, section 3.2, https://arxiv.org/abs/2104.09864.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim ({head_dim}) must be even: rotary embedding turns pairs of features")
        self.head_dim, self.theta = head_dim, theta

    def table(self, positions: Tensor) -> Tensor:
        """cos and sin of m·θ_i at `positions` (T,): (T, 2, d/2), float32, where the positions are.

        One table serves all queries and keys at these positions, in every layer (`rotate`).
        """
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions.float()[:, None] * self.theta**-exponents  # (T, d/2)
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` (..., T, d) to `positions` (T,); the shape and dtype stay."""
        return rotate(x, self.table(positions.to(x.device)))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.head_dim}, theta={self.theta:g}"


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate `x` (..., T, d) by the angles of a `RotaryEmbedding.table` (T, 2, d/2); the shape and dtype stay.

    A table with more dimensions, (T, 1, 2, d/2) say, turns an `x` that has them too, (..., T, H, d).

    Computes in float32 at least. The inverse of a rotation is its transpose, so that the gradient is rotated back by
    the same table, and nothing else is saved for it.
    """
    return _Rotation.apply(x, table)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _turn(gradient, *ctx.saved_tensors, -1), None


def _turn(x: Tensor, table: Tensor, direction: int) -> Tensor:
    cos, sin = table[..., :1, :], table[..., 1, :]  # (T, 1, d/2), (T, d/2)
    planes = x.unflatten(-1, (2, -1))  # (..., T, 2, d/2)
    turned = planes * cos
    turned[..., 0, :].addcmul_(planes[..., 1, :], sin, value=-direction)
    turned[..., 1, :].addcmul_(planes[..., 0, :], sin, value=direction)
    turned = turned.flatten(-2)  # and no `.to` that does nothing: compiled, PyTorch 2.11 finds no way back through it
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)
