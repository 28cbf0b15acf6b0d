"""Rotary position embedding: turn each pair of features by an angle that grows with the position.

Legend: T positions, d head width.
"""

from __future__ import annotations

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

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` (..., T, d) to `positions` (T,); the shape and dtype stay."""
        exponents = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32) / self.head_dim
        angles = positions.to(x.device).float()[:, None] * self.theta**-exponents  # (T, d/2)
        cos, sin = angles.cos(), angles.sin()
        first, second = x.float().chunk(2, dim=-1)  # (..., T, d/2) each
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.head_dim}, theta={self.theta:g}"
