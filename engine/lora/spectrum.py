"""How many directions an update really uses: the singular values of ΔW = s·(A·B)ᵀ, without ever making ΔW.

Legend: I inputs, O outputs, R rank; A (I, R), B (R, O), s scaling; σ (R,) singular values, largest first.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def singular_values(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """The singular values of s·A·B through the factors: A = Q_A·R_A, Bᵀ = Q_B·R_B, σ = s·svd(R_A·R_Bᵀ).

    The Qs are orthonormal and change no singular value, so that an R × R matrix is all that is decomposed:
    O((I + O)·R²) operations in place of O(I·O·min(I, O)).

    Args:
        A: (I, R).
        B: (R, O).
        scaling: s.

    Returns:
        σ, (R,) or (I,) or (O,), whichever is fewest, in at least float32; all others of ΔW are 0. What is no larger
        than the rounding of so large factors, R·ε·|s|·‖A‖_F·‖B‖_F, is 0 too: factors that cancel have no direction.
    """
    precise = torch.promote_types(A.dtype, torch.float32)
    R_A = torch.linalg.qr(A.to(precise), mode="r").R  # (R, R)
    R_B = torch.linalg.qr(B.to(precise).T, mode="r").R  # (R, R)
    sigma = torch.linalg.svdvals(R_A @ R_B.T)  # (R,)
    rounding = A.shape[1] * torch.finfo(precise).eps * R_A.norm() * R_B.norm()
    return abs(scaling) * torch.where(sigma > rounding, sigma, 0.0)


def captured_energy(sigma: Tensor) -> Tensor:
    """The share of ‖ΔW‖²_F that the first k directions hold, Σ_{i≤k} σᵢ² / Σ σᵢ², for every k, (R,); 0 if ΔW = 0."""
    energy = sigma.square()
    total = energy.sum()
    return energy.cumsum(0) / total if total > 0 else torch.zeros_like(energy)


def effective_rank(sigma: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σ σ: R for R equal singular values, 1 for a single one, 0 if ΔW = 0.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = sigma.sum()
    if not total > 0:
        return 0.0
    return torch.special.entr(sigma / total).sum().exp().item()


def stable_rank(sigma: Tensor) -> float:
    """‖ΔW‖²_F / ‖ΔW‖²₂ = Σ σᵢ² / σ₁², from 1 to the rank, unmoved by tiny singular values; 0 if ΔW = 0.

    Source: Rudelson and Vershynin 2007, https://arxiv.org/abs/math/0503442.
    """
    largest = sigma.max()
    return (sigma / largest).square().sum().item() if largest > 0 else 0.0


@torch.no_grad()
def delta_weight(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW = s·(A·B)ᵀ itself, (O, I) as `nn.Linear` holds its weight, for drawing."""
    precise = torch.promote_types(A.dtype, torch.float32)
    return scaling * (A.to(precise) @ B.to(precise)).T
