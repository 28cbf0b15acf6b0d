"""Multi-head attention whose queries and keys have adapters.

Legend: B batch, H heads, T queries, S keys, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from engine.attention import MultiHeadAttention
from engine.lora.layer import LoRALayer


class AttentionWithLoRA(MultiHeadAttention):
    """Attention with W_q + s·A_q·B_q and W_k + s·A_k·B_k for W_q and W_k; all but the adapters is frozen.

    Args:
        base_attention: is frozen, and used as it is.
        lora_q: adapter of its queries, D → H·d.
        lora_k: adapter of its keys, D → G·d.

    Raises:
        ValueError: an adapter has not the shape of its projection.

    Source: Hu et al. 2021, section 4.2, https://arxiv.org/abs/2106.09685, which adapts W_q and W_v.
    """

    def __init__(self, base_attention: MultiHeadAttention, lora_q: LoRALayer, lora_k: LoRALayer) -> None:
        nn.Module.__init__(self)  # the projections are the base's: none are made here
        for name, lora, base in (("q", lora_q, base_attention.q_proj), ("k", lora_k, base_attention.k_proj)):
            given, wanted = (lora.in_features, lora.out_features), (base.in_features, base.out_features)
            if given != wanted:
                raise ValueError(f"lora_{name} maps {given[0]} to {given[1]}, {name}_proj {wanted[0]} to {wanted[1]}")
        self.d_model, self.head_dim = base_attention.d_model, base_attention.head_dim
        self.num_heads, self.num_kv_heads = base_attention.num_heads, base_attention.num_kv_heads
        self.base_attention = base_attention.requires_grad_(False)
        self.lora_q, self.lora_k = lora_q, lora_k

    @property
    def q_proj(self) -> Callable[[Tensor], Tensor]:
        """x (B, T, D) → adapted queries (B, T, H·d)."""
        return lambda x: self.base_attention.q_proj(x) + self.lora_q(x)

    @property
    def k_proj(self) -> Callable[[Tensor], Tensor]:
        """x (B, S, D) → adapted keys (B, S, G·d)."""
        return lambda x: self.base_attention.k_proj(x) + self.lora_k(x)

    @property
    def v_proj(self) -> nn.Linear:
        """The base's."""
        return self.base_attention.v_proj

    @property
    def o_proj(self) -> nn.Linear:
        """The base's."""
        return self.base_attention.o_proj

    @property
    def rotary(self) -> nn.Module | None:
        """The base's."""
        return self.base_attention.rotary

    def reset_parameters(self) -> None:
        """Start the adapters anew; the base stays as it is."""
        self.lora_q.reset_parameters()
        self.lora_k.reset_parameters()

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters, and only these."""
        yield from self.lora_q.parameters()
        yield from self.lora_k.parameters()


def create_attention_with_lora(d_model: int, rank: int, num_heads: int = 4) -> AttentionWithLoRA:
    """A fresh `MultiHeadAttention`, frozen, with fresh adapters on its queries and keys.

    Args:
        d_model: D.
        rank: R, from 1 to D.
        num_heads: H, a divisor of D.

    Raises:
        ValueError: a number is out of range.
    """
    base = MultiHeadAttention(d_model, num_heads)
    return AttentionWithLoRA(base, LoRALayer(d_model, d_model, rank), LoRALayer(d_model, d_model, rank))
