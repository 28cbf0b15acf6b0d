"""The shape of a decoder, and what follows from it without building one: parameters, FLOPs, bytes.

Free of torch, so that a page can predict before anything runs.

Legend: L layers, H query heads, G key/value heads, d head width, D model width, F feed-forward width, V vocabulary,
T tokens.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from engine.settings import Settings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
"""A block's matrices."""

QUANTIZED_BLOCK = 32
"""The least weights that share a scale in 4 bits; a row holds a whole number of such blocks."""

_FFN_MULTIPLE = 32


class ModelConfig(Settings):
    """Every number that shapes a `Decoder`, and which techniques `engine.create_optimized_model` puts on it.

    Raises:
        InputError: a value is wrong; the message names the field, the value and what is allowed.
    """

    d_model: int = Field(256, ge=2, description="D, the width of the residual stream.")
    num_layers: int = Field(6, ge=1, description="L.")
    num_heads: int = Field(8, ge=1, description="H, query heads of a layer.")
    num_kv_heads: int = Field(
        default_factory=lambda data: data.get("num_heads", 1),
        ge=1,
        description="G, key and value heads of a layer; fewer than H is grouped-query attention.",
    )
    head_dim: int = Field(default_factory=lambda data: _head_dim(data), ge=2, description="d, even, D / H by default.")
    ffn_dim: int = Field(
        default_factory=lambda data: _ffn_dim(data),
        ge=1,
        description="F, width inside the feed-forward network, by default 8·D/3 rounded up to a multiple of 32.",
    )
    vocab_size: int = Field(1000, ge=2, description="V.")
    max_seq_len: int = Field(2048, ge=2, description="Longest text in tokens.")
    rope_theta: float = Field(10000.0, gt=0, allow_inf_nan=False, description="Base of the rotary angles.")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="Added to the mean square in RMSNorm.")
    tie_embeddings: bool = Field(True, description="Whether the head shares the embedding's weights.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of every residual update that is dropped in training.")
    use_lora: bool = Field(False, description="Adapters of low rank on the frozen matrices of every layer.")
    lora_rank: int = Field(16, ge=1, description="R, of every adapter, those of experts included.")
    use_quantization: bool = Field(False, description="The layers' matrices are frozen in 4 bits (NF4).")
    use_flashattention: bool = Field(False, description="Attention in tiles, without the matrix of its weights.")
    use_moe: bool = Field(
        False, description="The adapters of the feed-forward networks are mixtures, of which a router chooses."
    )
    num_experts: int = Field(4, ge=1, description="E, adapters of one mixture.")
    top_k: int = Field(
        default_factory=lambda data: min(2, data.get("num_experts", 2)), ge=1, description="K, experts of one token."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if "head_dim" not in self.model_fields_set and self.d_model % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}: it must divide d_model, which is {self.d_model}.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: it must be even, since rotary embedding turns pairs.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}: it must divide num_heads, which is {self.num_heads}."
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}: it must be at most num_experts, which is {self.num_experts}.")
        adapted = ATTENTION * self.use_lora + FEED_FORWARD * (self.use_lora or self.use_moe)
        smallest = min((min(self.projections[name]) for name in adapted), default=self.lora_rank)
        if self.lora_rank > smallest:
            raise ValueError(
                f"lora_rank is {self.lora_rank}: it must be at most {smallest}, the smallest side of a matrix."
            )
        for name, (inputs, _) in self.projections.items():
            if self.use_quantization and inputs % QUANTIZED_BLOCK:
                raise ValueError(
                    f"use_quantization is True: every matrix must have a multiple of {QUANTIZED_BLOCK} inputs, and "
                    f"{name} has {inputs}; change d_model, head_dim or ffn_dim."
                )
        return self

    def changed(self, **values: Any) -> Self:
        """The same but for `values`, checked anew; what followed from others, such as `head_dim`, stays.

        Raises:
            InputError: as for a new one.
        """
        return type(self)(**{**self.model_dump(), **values})

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model without adapters, a tied head counted once."""
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * (self._layer_matrices + 2 * self.d_model) + self.d_model

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a block's seven matrices, by name."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.d_model, queries),
            "k_proj": (self.d_model, keys),
            "v_proj": (self.d_model, keys),
            "o_proj": (queries, self.d_model),
            "gate_proj": (self.d_model, self.ffn_dim),
            "up_proj": (self.d_model, self.ffn_dim),
            "down_proj": (self.ffn_dim, self.d_model),
        }

    @property
    def _layer_matrices(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    def forward_flops(self, length: int) -> float:
        """FLOPs of one forward pass over T tokens without adapters: 2 per weight and token, and causal attention.

            2·T·(L·(2D(H + G)d + 3DF) + DV) + 2·L·H·T²·d

        A training step costs three times as much: the backward pass takes two products for each of the forward pass.

        Source: Kaplan et al. 2020, table 1, with half of the attention since it is causal.
        """
        weights = self.num_layers * self._layer_matrices + self.d_model * self.vocab_size
        attention = 2 * self.num_layers * self.num_heads * length**2 * self.head_dim
        return 2.0 * length * weights + attention


def _head_dim(data: dict) -> int:
    return max(2, data.get("d_model", 2) // data.get("num_heads", 1))


def _ffn_dim(data: dict) -> int:
    return -(-8 * data.get("d_model", 2) // 3 // _FFN_MULTIPLE) * _FFN_MULTIPLE
