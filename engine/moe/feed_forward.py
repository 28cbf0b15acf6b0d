"""A feed-forward network of which every token uses a part: E SwiGLU experts and the router that chooses K of them.

    layer = MoEFeedForward(d_model=512, ffn_dim=1024, num_experts=8, top_k=2)
    y = layer(x)  # (B, T, D) → (B, T, D)

The experts' weights are stacked and named as in transformers' Mixtral, so that they need no translation.

Legend: B batch, T tokens of a text, N tokens in all, D model width, F feed-forward width, E experts, K chosen per
token, A assignments (token, expert).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.moe.grouped import Groups, grouped_product
from engine.moe.routing import ExpertRouter
from engine.moe.rows import Assignments, combine, gather, silu_times

__all__ = ["MoEFeedForward", "load_mixtral_block"]


class MoEFeedForward(nn.Module):
    """y = Σ g_e(x) · (silu(x·G_eᵀ) ⊙ x·U_eᵀ)·D_eᵀ over the experts that the router chose for the token.

    The rows are sorted by expert, so that each layer of all experts is one grouped product; gate and up are one matrix.
    A token that no expert takes, because of capacity or padding, gets exactly 0.

    Args:
        d_model: D.
        ffn_dim: F, of one expert.
        num_experts: E.
        top_k: K.
        router: the router, made from the other arguments when left out.
        kind: of routing, see `engine.moe.kinds`.
        capacity_factor: how many times its fair share an expert takes at most; no limit when left out.

    Raises:
        InputError: a size is not positive, the router is for other sizes, or it says so.

    Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Jiang et al. 2024, Mixtral,
    https://arxiv.org/abs/2401.04088; sorted rows: Gale et al. 2022, MegaBlocks, https://arxiv.org/abs/2211.15841.
    """

    def __init__(
        self,
        d_model: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        router: ExpertRouter | None = None,
        kind: str = "softmax",
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or ffn_dim < 1:
            raise InputError(f"d_model ({d_model}) and ffn_dim ({ffn_dim}) must be at least 1.")
        if router is None:
            router = ExpertRouter(d_model, num_experts, top_k, kind=kind, capacity_factor=capacity_factor)
        if router.weight.shape != (num_experts, d_model):
            raise InputError(
                f"The router's weight is {tuple(router.weight.shape)}, the layer needs {(num_experts, d_model)}: "
                "make both for the same number of experts and the same width."
            )
        self.router = router
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn_dim, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, ffn_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the experts' weights as `nn.Linear` draws its own: uniform within ±1/√inputs."""
        for weights in (self.gate_up_proj, self.down_proj):
            bound = weights.shape[-1] ** -0.5
            weights.uniform_(-bound, bound)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """What the experts make of x.

        Args:
            x: (…, D).
            padding: (…,) bool, True where x is padding, which goes to no expert.

        Returns:
            (…, D).
        """
        routing = self.router.route(x, padding)
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        assignments, groups = Assignments(routing.tokens, len(tokens)), Groups(routing.counts)
        rows = gather(tokens, assignments)  # (A, D)
        hidden = silu_times(grouped_product(rows, self.gate_up_proj.mT, groups))  # (A, F)
        outputs = grouped_product(hidden, self.down_proj.mT, groups)  # (A, D)
        return combine(outputs, routing.gates, assignments).view(x.shape)

    def extra_repr(self) -> str:
        """The sizes."""
        num_experts, d_model, ffn_dim = self.down_proj.shape
        return f"d_model={d_model}, ffn_dim={ffn_dim}, num_experts={num_experts}"


@torch.no_grad()
def load_mixtral_block(block: nn.Module) -> MoEFeedForward:
    """The same layer as a `MixtralSparseMoeBlock` of transformers 5, with a copy of its weights.

    Args:
        block: transformers' block, on any device and in any dtype.

    Raises:
        InputError: its activation is not SiLU, or it chooses one expert alone, whose gate is always 1 there.
    """
    gate, experts = block.gate, block.experts
    if not isinstance(experts.act_fn, nn.SiLU) and type(experts.act_fn).__name__ != "SiLUActivation":
        raise InputError(f"The block's activation is {experts.act_fn}: only SiLU is known here.")
    if gate.top_k == 1:
        raise InputError("The block's top_k is 1 and its gates are 1: here such a gate is the expert's probability.")
    num_experts, d_model, ffn_dim = experts.down_proj.shape
    layer = MoEFeedForward(d_model, ffn_dim, num_experts, gate.top_k)
    layer.to(experts.down_proj.device, experts.down_proj.dtype)
    layer.router.weight.copy_(gate.weight)
    layer.gate_up_proj.copy_(experts.gate_up_proj)
    layer.down_proj.copy_(experts.down_proj)
    return layer.train(block.training)
