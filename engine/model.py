"""A modern decoder-only transformer, from the parts of `engine.attention`: token ids in, logits of the next token out.

    model = Decoder(ModelConfig(d_model=256, num_layers=6, num_heads=8))
    logits = model(ids)  # (B, T) → (B, T, V)

Modules are named as in Llama's checkpoints, so that their weights need no translation (`engine.llama`).

Legend: B batch, T tokens, S tokens with those of the cache, L layers, H query heads, G key/value heads, d head width,
D model width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.architecture import ModelConfig
from engine.attention import MultiHeadAttention, attend
from engine.errors import InputError
from engine.masks import causal, materialize
from engine.rotary import RotaryEmbedding, rotate

__all__ = ["Decoder", "KVCache", "ModelConfig", "Parts", "create_test_transformer", "evaluating", "together"]

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention: query (B, H, T, d), key and value (B, G, S, d) → (B, H, T, d); the queries are the last of S."""


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention through PyTorch's fused kernels, which never hold the weights; an `AttentionFunction`."""
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    whole = num_queries == num_keys
    mask = None if whole or num_queries == 1 else materialize(causal, num_queries, num_keys, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=whole, enable_gqa=query.shape[1] != key.shape[1]
    )


def visible_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same arithmetic with every weight spelled out; an `AttentionFunction`."""
    return attend(query, key, value, materialize(causal, query.shape[-2], key.shape[-2], device=query.device))[0]


def together(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same x, as if they were called one after the other.

    Layers of one class may know a way that takes fewer kernels: the class then has a method `together` with these
    arguments. Layers with hooks are called, so that whoever watches them sees what goes in and out.
    """
    kind = type(layers[0])
    if hasattr(kind, "together") and all(type(layer) is kind and not has_hooks(layer) for layer in layers):
        return kind.together(layers, x)
    return tuple(layer(x) for layer in layers)


def has_hooks(layer: nn.Module) -> bool:
    """Whether a call of `layer` itself, without its parts, is more than its class's `forward`.

    That is so with hooks of its own, with hooks of all modules, and where the layer's own `forward` was replaced, as
    accelerate does to bring weights from elsewhere.
    """
    forward, backward = layer._forward_hooks, layer._backward_hooks
    own = forward or backward or layer._forward_pre_hooks or layer._backward_pre_hooks
    return bool(own or "forward" in layer.__dict__ or torch.nn.modules.module._has_any_global_hook())


class SwiGLU(nn.Module):
    """(silu(x·W_gate) ⊙ x·W_up)·W_down.

    Args:
        d_model: D.
        ffn_dim: F.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.up_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        gate, up = together((self.gate_proj, self.up_proj), x)  # (…, F) each
        return self.down_proj(F.silu(gate) * up)


@dataclass(frozen=True)
class Parts:
    """What a decoder is put together from, where there is a choice.

    Args:
        attention: how queries, keys and values become the heads' outputs.
        feed_forward: makes the feed-forward network of one layer, (…, D) → (…, D).
    """

    attention: AttentionFunction = fused_attention
    feed_forward: Callable[[ModelConfig], nn.Module] = lambda config: SwiGLU(config.d_model, config.ffn_dim)


class LayerCache:
    """Keys and values that one layer has computed so far.

    Args:
        keys: room for them, (B, G, capacity, d).
        values: likewise.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, d) each; returns all there are now, (B, G, S, d) each."""
        start, end = self.length, self.length + key.shape[-2]
        if end > self._keys.shape[-2]:
            raise InputError(f"The cache holds {self._keys.shape[-2]} tokens, {end} are given: make it larger.")
        self.length = end
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class KVCache:
    """Keys and values of every layer, so that a token is computed once: 2·L·B·G·capacity·d numbers.

    Args:
        model: the decoder that it is for.
        batch_size: B.
        capacity: how many tokens it can hold.

    Raises:
        InputError: the model does not take that many tokens.
    """

    def __init__(self, model: Decoder, batch_size: int, capacity: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        _check_length(capacity, config)
        shape = (2, batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.layers = [LayerCache(*weight.new_zeros(shape)) for _ in model.layers]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.layers[0].length


class Block(nn.Module):
    """One layer: x ← x + attention(norm(x)), then x ← x + feed_forward(norm(x)).

    Args:
        config: of the whole model.
        parts: what it is made from.

    Source: pre-normalisation, Xiong et al. 2020; as a whole: Touvron et al. 2023, Llama.
    """

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = MultiHeadAttention(
            config.d_model, config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
        )
        self.attention = parts.attention
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = parts.feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, G, T, d) of x (B, T, D), rotated by `table` (T, 2, d/2).

        Nothing is saturated here, unlike in `MultiHeadAttention.project`: the norm bounds what is projected.
        """
        attention = self.self_attn
        heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = together(projections, self.input_layernorm(x))  # (B, T, H·d), (B, T, G·d) twice
        both = torch.cat([query, key], dim=-1).unflatten(-1, (-1, width))  # (B, T, H + G, d), turned at once
        query, key = rotate(both, table[:, None]).split_with_sizes([heads, groups], dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), attention.split_heads(value)

    def forward(self, x: Tensor, table: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) → (B, T, D) at the positions of `table`; with a cache, x continues what is in it."""
        query, key, value = self.project(x, table)
        if cache is not None:
            key, value = cache.extend(key, value)  # (B, G, S, d)
        heads = self.attention(query, key, value)  # (B, H, T, d)
        del query, key, value  # or they would be held through the feed-forward network
        x = x + self.dropout(self.self_attn.o_proj(heads.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, L blocks, a last norm and the head: the logits of the token that follows each position.

    A fresh model's matrices are normal with σ = √(2 / 5D), those that write into the residual stream divided by √(2L),
    so that its first loss is close to ln V. Experts' stacked matrices are drawn alike; routers draw their own weights.

    Args:
        config: its shape.
        parts: what it is made from.

    Source: Touvron et al. 2023, Llama; initialisation: Nguyen and Salazar 2019, Radford et al. 2019.
    """

    def __init__(self, config: ModelConfig, parts: Parts | None = None) -> None:
        super().__init__()
        parts = parts or Parts()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(Block(config, parts) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.gradient_checkpointing = False
        """Whether training keeps only the blocks' inputs and computes the rest again in the backward pass."""
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as the class describes."""
        std = (2 / (5 * self.config.d_model)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("router.weight"):
                self.get_submodule(name.removesuffix(".weight")).reset_parameters()
            elif parameter.dim() < 2:
                parameter.fill_(1.0)  # the norms' gains
            else:
                writes = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                parameter.normal_(0.0, std / (2 * self.config.num_layers) ** 0.5 if writes else std)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head receives, (B, T, D). Arguments as in `forward`."""
        ids = ids.to(self.embed_tokens.weight.device)
        start = 0 if cache is None else cache.length
        _check_length(start + ids.shape[1], self.config)
        x = self.dropout(self.embed_tokens(ids))  # (B, T, D)
        table = self.rotary.table(torch.arange(start, start + ids.shape[1], device=ids.device))  # (T, 2, d/2)
        recomputed = self.gradient_checkpointing and self.training and cache is None
        for index, block in enumerate(self.layers):
            if recomputed:
                x = checkpoint(block, x, table, use_reentrant=False)
            else:
                x = block(x, table, None if cache is None else cache.layers[index])
        return self.norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            ids: (B, T) token ids on any device; with a cache, those that follow what is in it.
            cache: keys and values of earlier tokens; it is extended.

        Returns:
            (B, T, V).

        Raises:
            InputError: the text is longer than the model's context.
        """
        return self.lm_head(self.hidden(ids, cache))

    def attention_maps(self, ids: Tensor) -> Tensor:
        """The attention weights of every layer and head on `ids` (B, T): (L, B, H, T, T), rows sum to 1."""
        maps = []
        with evaluating(self):
            x = self.embed_tokens(ids.to(self.embed_tokens.weight.device))
            mask = materialize(causal, x.shape[1], device=x.device)
            table = self.rotary.table(torch.arange(x.shape[1], device=x.device))  # (T, 2, d/2)
            for block in self.layers:
                maps.append(attend(*block.project(x, table), mask)[1])
                x = block(x, table)
        return torch.stack(maps)


def create_test_transformer(layers: int, d_model: int) -> Decoder:
    """A small decoder over a vocabulary of 1000, ids (B, T) → logits (B, T, 1000).

    Args:
        layers: L.
        d_model: D, even.

    Raises:
        InputError: there is no layer, or the width is not even.
    """
    heads = next((heads for heads in (8, 4, 2) if d_model % (2 * heads) == 0), 1)
    return Decoder(ModelConfig(d_model=d_model, num_layers=layers, num_heads=heads))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients; afterwards every module is in the mode that it was in."""
    with in_mode(model, training=False), torch.no_grad():
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """With all of `model` in training mode or out of it; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_length(length: int, config: ModelConfig) -> None:
    if length > config.max_seq_len:
        raise InputError(
            f"The text has {length} tokens, the model's context holds {config.max_seq_len}: "
            f"shorten it by {length - config.max_seq_len}."
        )
