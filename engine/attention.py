"""Attention as the papers write it: every weight visible, nothing fused.

`attention_stages` keeps every intermediate for drawing, `attend` runs the same arithmetic and keeps only what a layer
returns. Fused kernels compute the same output without ever holding the weights; what is here is what they are
checked against.

Legend: B batch, H query heads, G key/value heads, T queries, S keys, d head width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.masks import causal as causal_mask
from engine.masks import materialize
from engine.rotary import RotaryEmbedding, rotate


class AttentionStages(NamedTuple):
    """Every intermediate of attention, in order; all but the last are (..., H, T, S).

    scores = QKᵀ; scaled = scores · scale / temperature; masked = scaled, −∞ where forbidden;
    weights = softmax(masked), zero rows where everything is forbidden; output = weights · V, (..., H, T, d).
    """

    scores: Tensor
    scaled: Tensor
    masked: Tensor
    weights: Tensor
    output: Tensor


def attention_stages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
) -> AttentionStages:
    """softmax(QKᵀ · scale / temperature + mask) · V with every intermediate kept.

    Args:
        query: (..., H, T, d).
        key: (..., G, S, d); H must be a multiple of G, and head h reads key head h // (H / G).
        value: (..., G, S, d).
        mask: broadcastable to (..., H, T, S); 0 or False means "may not attend".
        scale: factor on the scores, 1/√d when left out.
        temperature: above 1 flattens the weights, below 1 sharpens them.

    Returns:
        `AttentionStages`; scores to weights in float32 when the input is half precision.

    Raises:
        ValueError: the heads do not group, or the temperature is not positive.

    Source: Vaswani et al. 2017, equation 1, https://arxiv.org/abs/1706.03762; grouped queries: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245.
    """
    key, value = _group(query, key), _group(query, value)  # (..., H, S, d)
    gain = _gain(query, scale, temperature)
    scores = _scores(query, key, gain)
    scaled = scores * gain
    masked = scaled if mask is None else scaled.masked_fill(mask == 0, -math.inf)
    weights = _softmax(scaled, mask)
    return AttentionStages(scores, scaled, masked, weights, _mix(weights, value))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`attention_stages` for layers: the same numbers, and only the last two of them are kept.

    Returns:
        output (..., H, T, d) and weights (..., H, T, S), both in the query's dtype.
    """
    key, value = _group(query, key), _group(query, value)  # (..., H, S, d)
    gain = _gain(query, scale, temperature)
    weights = _softmax(_scores(query, key, gain) * gain, mask)
    return _mix(weights, value), weights.to(query.dtype)


def _group(query: Tensor, key: Tensor) -> Tensor:
    """Repeat each key (or value) head for the query heads that share it."""
    heads, groups = query.shape[-3], key.shape[-3]
    if heads == groups:
        return key
    if heads % groups:
        raise ValueError(f"the number of query heads ({heads}) must be a multiple of the key heads ({groups})")
    return key.repeat_interleave(heads // groups, dim=-3)


def _gain(query: Tensor, scale: float | None, temperature: float) -> float:
    gain = (query.shape[-1] ** -0.5 if scale is None else scale) / temperature if temperature > 0 else math.nan
    if not math.isfinite(gain):
        raise ValueError(f"temperature ({temperature}) must be greater than 0, and scale / temperature finite")
    return gain


def _scores(query: Tensor, key: Tensor, gain: float) -> Tensor:
    """QKᵀ, at least in float32. Entries beyond ±√(max / (d · gain)) saturate: no product of finite input overflows."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    limit = math.sqrt(torch.finfo(query.dtype).max / (2 * query.shape[-1] * max(abs(gain), 1.0)))
    return query.clamp(-limit, limit) @ key.clamp(-limit, limit).mT  # (..., H, T, S)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the allowed keys, exactly 0 elsewhere; a row with no allowed key is 0 throughout, gradients too.

    A finite fill instead of −∞ keeps a fully masked row free of 0/0, which would poison the gradients.
    """
    if mask is None:
        return logits.softmax(dim=-1)
    forbidden = mask == 0
    values = logits.masked_fill(forbidden, torch.finfo(logits.dtype).min)
    del logits  # at most two of these (..., H, T, S) are alive at a time
    values = values.softmax(dim=-1)
    return values.masked_fill(forbidden, 0.0)


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted mean of the values, (..., H, T, d); rounding must not carry it past the largest finite number."""
    limits = torch.finfo(value.dtype)
    return (weights.to(value.dtype) @ value).clamp(limits.min, limits.max)


class ScaledDotProductAttention(nn.Module):
    """One head on whole vectors: softmax(QKᵀ/√D + mask) · V.

    Args:
        d_model: D, the width of queries, keys and values.
        causal: forbid attention to later positions. With fewer queries than keys, the queries are the last positions.

    Source: Vaswani et al. 2017, section 3.2.1, https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, d_model: int, causal: bool = False) -> None:
        super().__init__()
        self.d_model, self.causal = d_model, causal

    def forward(self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from Q (B, T, D) to K and V (B, S, D).

        Args:
            Q: (B, T, D).
            K: (B, S, D).
            V: (B, S, D).
            mask: broadcastable to (B, T, S); 0 means "may not attend". Holds in addition to `causal`.

        Returns:
            output (B, T, D) and weights (B, T, S), whose rows sum to 1, or to 0 where everything is forbidden.

        Raises:
            ValueError: a width is not `d_model`, or the mask does not broadcast.
        """
        for name, tensor in (("Q", Q), ("K", K), ("V", V)):
            if tensor.shape[-1] != self.d_model:
                raise ValueError(f"{name} must be {self.d_model} wide, its shape is {tuple(tensor.shape)}")
        if self.causal:
            below = materialize(causal_mask, Q.shape[-2], K.shape[-2], device=Q.device)
            mask = below if mask is None else below & (mask != 0)
        if mask is not None:
            _check_broadcast(mask, (*Q.shape[:-1], K.shape[-2]))
        return attend(Q, K, V, mask)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.d_model}, causal={self.causal}"


class MultiHeadAttention(nn.Module):
    """Several heads side by side, each attending in its own d-dimensional projection.

    head_h = softmax(rot(xW_q^h) · rot(xW_k^g)ᵀ / √d + mask) · xW_v^g, where g = h // (H / G)
    output = [head_1 … head_H] · W_o

    A fresh layer's heads already differ. Queries and keys start uniform with variance 2/D (Xavier's with gain √2 for a
    square matrix), so that the logits of standard-normal input start with standard deviation 2; and the sign of every
    other head's W_q is chosen such that neighbouring heads react oppositely to the mean direction of the input.

    Args:
        d_model: D.
        num_heads: H.
        num_kv_heads: G, H when left out; fewer is grouped-query attention (Ainslie et al. 2023).
        head_dim: d, D / H when left out.
        bias: whether the projections have one.
        rotary: position embedding for queries and keys, or None.

    Raises:
        ValueError: D is no multiple of H, or H no multiple of G.

    Source: Vaswani et al. 2017, section 3.2.2, https://arxiv.org/abs/1706.03762; initialisation: Glorot and Bengio
    2010.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1:
            raise ValueError(f"num_heads ({num_heads}) and num_kv_heads ({num_kv_heads}) must be at least 1")
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model ({d_model}) must be divisible by num_heads ({num_heads})")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})")
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.q_proj = nn.Linear(d_model, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, d_model, bias=bias)
        self.rotary = rotary
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as the class describes."""
        for projection, variance in ((self.q_proj, 2.0), (self.k_proj, 2.0), (self.v_proj, 1.0), (self.o_proj, 1.0)):
            bound = math.sqrt(3 * variance / projection.in_features)
            projection.weight.uniform_(-bound, bound)
            if projection.bias is not None:
                projection.bias.zero_()
        q_heads = self.q_proj.weight.view(self.num_heads, self.head_dim, self.d_model)
        k_heads = self.k_proj.weight.view(1, self.num_kv_heads, self.head_dim, self.d_model)
        toward_mean = (q_heads.sum(-1) * _group(q_heads[None], k_heads)[0].sum(-1)).sum(-1)  # (H,) logit of 1 with 1
        wanted = 1 - 2 * (torch.arange(self.num_heads, device=toward_mean.device) % 2)  # +1, −1, +1, …
        q_heads.mul_(torch.where(toward_mean * wanted < 0, -1.0, 1.0)[:, None, None])

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, G, S, d), rotated to their positions where there is `rotary`."""
        q = self.split_heads(finite_product(self.q_proj, query))  # (B, H, T, d)
        k = self.split_heads(finite_product(self.k_proj, key))  # (B, G, S, d)
        v = self.split_heads(finite_product(self.v_proj, value))  # (B, G, S, d)
        if self.rotary is not None:
            table = self.rotary.table(torch.arange(k.shape[-2], device=k.device))
            q, k = rotate(q, table[-q.shape[-2] :]), rotate(k, table)
        return q, k, v

    def stages(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
    ) -> AttentionStages:
        """Every intermediate of every head, before the heads are joined by W_o. Arguments as in `forward`."""
        q, k, v = self.project(query, key, value)
        return attention_stages(q, k, v, self._per_head(mask, q, k), temperature=temperature)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (B, T, D).
            key: (B, S, D).
            value: (B, S, D).
            mask: (T, S), (B, T, S) or anything that broadcasts to (B, H, T, S); 0 means "may not attend".

        Returns:
            output (B, T, D) and weights (B, H, T, S).

        Raises:
            ValueError: the mask does not broadcast.
        """
        q, k, v = self.project(query, key, value)
        output, weights = attend(q, k, v, self._per_head(mask, q, k))  # (B, H, T, d), (B, H, T, S)
        return finite_product(self.o_proj, output.transpose(1, 2).flatten(2)), weights

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, H·d) → (B, H, T, d)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _per_head(self, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        if mask is None:
            return None
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        _check_broadcast(mask, (*q.shape[:-1], k.shape[-2]))
        return mask


def finite_product(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`product(x)`, a linear map of x (..., I), finite for every finite x: what would overflow saturates.

    x is clamped so that neither the dtype that the product is computed in, which autocast may choose, nor a partial
    sum in float32 overflows; the result is clamped to the largest finite numbers of its own dtype.
    """
    device, computed = x.device.type, x.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        computed = torch.get_autocast_dtype(device)
    largest = min(torch.finfo(dtype).max for dtype in (x.dtype, computed))
    limit = min(largest, torch.finfo(torch.float32).max / (2**24 * x.shape[-1]))
    y = product(x.clamp(-limit, limit))
    return y.clamp(torch.finfo(y.dtype).min, torch.finfo(y.dtype).max)


def _check_broadcast(mask: Tensor, shape: tuple[int, ...]) -> None:
    given = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
    if len(given) > len(shape) or any(size not in (1, wanted) for size, wanted in zip(given, shape, strict=True)):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not broadcast to the weights' {tuple(shape)}")
