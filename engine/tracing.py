"""What happens inside a pretrained model on one text: attention, queries, keys, values, hidden states, logits.

Fused kernels never hold the attention weights, so a model is loaded with an attention implementation of our own,
registered with transformers' `AttentionInterface`. While `trace` runs it computes with `engine.attention`, keeps what
it sees and applies the learner's `Intervention`; at all other times it hands over to PyTorch's fused kernel.

Legend: B batch (always 1 here), T tokens, L layers, H query heads, G key/value heads, d head width, D model width,
V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.attention import MultiHeadAttention, attend
from engine.errors import InputError
from engine.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from engine.pretrained import Pretrained

OBSERVED = "workbench_observed"
"""Name under which our attention is registered; pass it as `attn_implementation`."""

_EXTRA_TERMS = ("softcap", "position_bias", "s_aux", "sinks")
"""What some models add between QKᵀ and the softmax, by the name of the argument; none of it is in the formula drawn."""

_HALF_ROTARY = ("llama", "mistral", "qwen2")
"""Architectures whose rotary embedding pairs the halves of a head, as `RotaryEmbedding` does."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change to the attention of one head, of one layer, or of the whole model.

        weights = softmax(QKᵀ · scale / temperature + mask)

    Args:
        temperature: above 1 flattens the weights, below 1 sharpens them.
        mask: (T, T) bool, True = may attend, in place of the model's own; it may allow what the model never sees.
        layer: index of the layer to change, every layer when left out.
        head: index of the head to change, every head when left out.
    """

    temperature: float = 1.0
    mask: Tensor | None = None
    layer: int | None = None
    head: int | None = None

    def check(self, pretrained: Pretrained, length: int) -> None:
        """Raise `InputError` unless this makes sense for `length` tokens in `pretrained`."""
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"The temperature is {self.temperature:g}: give a number above 0.")
        if self.layer is not None:
            _check_index("layer", self.layer, pretrained.num_layers, pretrained.name)
        if self.head is not None:
            _check_index("head", self.head, pretrained.num_heads, pretrained.name)
        if self.mask is not None and tuple(self.mask.shape) != (length, length):
            raise InputError(
                f"The mask is {'×'.join(map(str, self.mask.shape))}, the text has {length} tokens: "
                f"give a mask of {length}×{length}."
            )


@dataclass(frozen=True, eq=False)
class Trace:
    """Everything that was seen of one forward pass.

    Args:
        ids: (T,) token ids.
        tokens: T printable labels.
        attention: (L, H, T, T), query × key; rows sum to 1, or to 0 where a mask forbids everything.
        queries: (L, H, T, d), position embedding included.
        keys: (L, G, T, d), position embedding included.
        values: (L, G, T, d).
        scales: L factors on QKᵀ, usually 1/√d.
        masks: (L, T, T) bool, what the model itself allows, before any intervention.
        hidden: (L + 1, T, D); entry l is what layer l receives, the last one what the head of the model receives.
        logits: (T, V), or (1, V) if only the last position was asked for; None for a model without a vocabulary head.
    """

    ids: Tensor
    tokens: list[str]
    attention: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    scales: tuple[float, ...]
    masks: Tensor
    hidden: Tensor
    logits: Tensor | None


class FusedDifference(NamedTuple):
    """Largest absolute difference between the traced pass and the same pass through the fused kernel."""

    hidden: float
    logits: float | None


class NextToken(NamedTuple):
    """A candidate for the next token."""

    label: str
    id: int
    probability: float


@dataclass
class _Recorder:
    """Computes the attention of the layers of one forward pass, in order, and keeps what it sees."""

    intervention: Intervention
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention of the next layer; output (B, H, T, d)."""
        change = self.intervention
        own = {"mask": mask, "scale": scale, "temperature": 1.0}
        changed = own | {"temperature": change.temperature}
        if change.mask is not None:
            changed["mask"] = change.mask.to(query.device)
        here = change.layer in (None, len(self.weights))
        knobs = changed if here and change.head is None else own
        output, weights = attend(query, key, value, **knobs)  # (B, H, T, d), (B, H, T, T)
        if here and change.head is not None:
            head, group = change.head, change.head // (query.shape[1] // key.shape[1])
            output[:, head : head + 1], weights[:, head : head + 1] = attend(
                query[:, head : head + 1], key[:, group : group + 1], value[:, group : group + 1], **changed
            )
        self.queries.append(query)
        self.keys.append(key)
        self.values.append(value)
        self.weights.append(weights)
        self.masks.append(mask)
        self.scales.append(scale)
        return output


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)
"""The recorder of the pass that this thread is in: a context variable, so that models in other threads are not seen."""


def _observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **extras: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (B, H, T, d) tensors in, output (B, T, H, d) and weights out."""
    present = [name for name in _EXTRA_TERMS if extras.get(name) is not None]
    if present:
        raise InputError(
            f"The attention of this model has an extra term ({present[0]}) that the formula shown here lacks: "
            "choose a model with plain softmax attention."
        )
    recorder = _recorder.get()
    if recorder is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **extras)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = recorder.attend(query, key, value, attention_mask, scale)
    return output.transpose(1, 2).contiguous(), recorder.weights[-1]


def _observed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: a bool mask, always spelled out while tracing (fused kernels may skip it)."""
    if _recorder.get() is not None:
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(OBSERVED, _observed_attention)
AttentionMaskInterface.register(OBSERVED, _observed_mask)


def trace(
    pretrained: Pretrained, ids: list[int], intervention: Intervention | None = None, *, last_logits: bool = False
) -> Trace:
    """Run `pretrained` on `ids` and keep all that attention does.

        attention[l, h] = softmax(queries[l, h] · keys[l, g]ᵀ · scales[l]), g = h // (H / G)

    Args:
        pretrained: the model.
        ids: T token ids, at least one.
        intervention: a change to the attention; later layers see its consequences.
        last_logits: compute the logits of the last position alone, which is all that a next token needs.

    Returns:
        A `Trace` on the model's device.

    Raises:
        InputError: no tokens, more than the model takes, an id that it does not have, or a senseless intervention.
    """
    _check_ids(pretrained, ids)
    intervention = intervention or Intervention()
    intervention.check(pretrained, len(ids))
    recorder = _Recorder(intervention)
    token = _recorder.set(recorder)
    try:
        output = _forward(pretrained, ids, last_logits)
    finally:
        _recorder.reset(token)
    if len(recorder.weights) != pretrained.num_layers:
        raise InputError(
            f"Only {len(recorder.weights)} of the {pretrained.num_layers} layers of {pretrained.name} show their "
            "attention: choose a model in which every layer is softmax attention."
        )
    length, logits = len(ids), output.get("logits")
    everything = torch.ones(length, length, dtype=torch.bool, device=pretrained.device)
    return Trace(
        ids=torch.tensor(ids, device=pretrained.device),
        tokens=pretrained.readable(ids),
        attention=torch.cat(recorder.weights),
        queries=torch.cat(recorder.queries),
        keys=torch.cat(recorder.keys),
        values=torch.cat(recorder.values),
        scales=tuple(recorder.scales),
        masks=torch.stack([everything if mask is None else mask[0, 0] for mask in recorder.masks]),
        hidden=torch.cat(output.hidden_states),
        logits=None if logits is None else logits[0],
    )


def fused_pass(pretrained: Pretrained, ids: list[int], *, last_logits: bool = False) -> Any:
    """Run `pretrained` on `ids` through `torch.nn.functional.scaled_dot_product_attention`, which keeps no weights.

    Args:
        pretrained: the model.
        ids: T token ids, at least one.
        last_logits: as for `trace`.

    Returns:
        transformers' output: ``hidden_states``, and ``logits`` where the model has them.

    Raises:
        InputError: as for `trace`.
    """
    _check_ids(pretrained, ids)
    return _forward(pretrained, ids, last_logits)


def fused_difference(pretrained: Pretrained, traced: Trace) -> FusedDifference:
    """How far the traced pass is from the same pass through fused kernels.

        max |traced − fused| over all hidden states, and over all logits of the trace

    Args:
        pretrained: the model.
        traced: what `trace` returned for it, without an intervention.
    """
    last_logits = traced.logits is not None and len(traced.logits) < len(traced.tokens)
    fused = fused_pass(pretrained, traced.ids.tolist(), last_logits=last_logits)
    hidden = (traced.hidden - torch.cat(fused.hidden_states)).abs().max().item()
    if traced.logits is None:
        return FusedDifference(hidden, None)
    return FusedDifference(hidden, (traced.logits - fused.logits[0]).abs().max().item())


def next_tokens(logits: Tensor, pretrained: Pretrained, k: int = 10) -> list[NextToken]:
    """The k most probable next tokens, the most probable first: p = softmax(logits).

    Args:
        logits: (V,) of the last position, e.g. ``trace.logits[-1]``.
        pretrained: the model that they come from, for the labels.
        k: how many, from 1 to V.

    Raises:
        InputError: `k` is out of range.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"{k} next tokens were asked for: give a number from 1 to {logits.shape[-1]}.")
    probabilities, ids = logits.double().softmax(dim=-1).topk(k)
    labels = pretrained.readable(ids.tolist())
    return [NextToken(*row) for row in zip(labels, ids.tolist(), probabilities.tolist(), strict=True)]


def layer_attention(pretrained: Pretrained, layer: int) -> MultiHeadAttention:
    """The attention of one layer as our own `MultiHeadAttention`, filled with the model's weights.

    It takes what the layer's attention takes, `layer_input`, and shares no code with the model: the
    independent recomputation that a traced map is checked against.

    Args:
        pretrained: a model of Llama's shape: four projections, rotary embedding over the whole head, 1/√d.
        layer: its index.

    Raises:
        InputError: the model has another shape, or no such layer.
    """
    source = _check_llama_shape(pretrained, layer)
    attention = MultiHeadAttention(
        pretrained.d_model,
        pretrained.num_heads,
        num_kv_heads=pretrained.num_kv_heads,
        head_dim=pretrained.head_dim,
        bias=any(getattr(source, name).bias is not None for name in _PROJECTIONS),
        rotary=RotaryEmbedding(pretrained.head_dim, pretrained.model.config.rope_parameters["rope_theta"]),
    )
    with torch.no_grad():
        for name in _PROJECTIONS:
            given, own = getattr(source, name), getattr(attention, name)
            own.weight.copy_(given.weight)
            if own.bias is not None:
                own.bias.copy_(torch.zeros_like(own.bias) if given.bias is None else given.bias)
    return attention.to(pretrained.device, pretrained.dtype).eval()


def layer_input(pretrained: Pretrained, traced: Trace, layer: int) -> Tensor:
    """What the attention of a layer takes, (1, T, D): the residual stream before it, normalised as the layer does.

    Args:
        pretrained: a model of Llama's shape.
        traced: its trace.
        layer: its index.

    Raises:
        InputError: the model has another shape, or no such layer.
    """
    _check_llama_shape(pretrained, layer)
    norm = pretrained.model.base_model.layers[layer].input_layernorm
    with torch.no_grad():
        return norm(traced.hidden[layer][None])


def check_observable(pretrained: Pretrained) -> None:
    """Compare the traced attention of a few tokens with what the model's own code returns.

    Raises:
        InputError: they differ, so a map drawn from the trace would not be the model's.
    """
    ids = [index % pretrained.vocab_size for index in range(4)]
    traced = trace(pretrained, ids).attention.float()  # (L, H, T, T)
    model = pretrained.model
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            own = model(torch.tensor([ids], device=pretrained.device), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(OBSERVED)
    tolerance = torch.finfo(pretrained.dtype).eps ** 0.5  # half of the digits: a missing term costs far more
    if not own or not torch.allclose(traced, torch.cat(own).float(), rtol=0.0, atol=tolerance):
        raise InputError(
            f"The attention of {pretrained.name} is not the plain softmax that is drawn here: choose another model."
        )


def _check_llama_shape(pretrained: Pretrained, layer: int) -> nn.Module:
    """The attention module of one layer; raises `InputError` unless the model has Llama's shape."""
    _check_index("layer", layer, pretrained.num_layers, pretrained.name)
    layers = getattr(pretrained.model.base_model, "layers", None)
    source = getattr(layers[layer], "self_attn", nn.Identity()) if layers is not None else nn.Identity()
    rope = getattr(pretrained.model.config, "rope_parameters", None) or {}
    plain = rope.get("rope_type") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    plain = plain and pretrained.model.config.model_type in _HALF_ROTARY
    plain = plain and math.isclose(getattr(source, "scaling", 0.0), pretrained.head_dim**-0.5)
    if not plain or {name for name, _ in source.named_children()} != set(_PROJECTIONS):
        raise InputError(
            f"{pretrained.name} is no model of Llama's shape (four projections, plain rotary embedding): "
            "its attention can be traced, but not recomputed here."
        )
    return source


def _check_index(what: str, index: int, count: int, name: str) -> None:
    if not 0 <= index < count:
        raise InputError(f"There is no {what} {index}: {name} has {what}s 0 to {count - 1}; choose one of them.")


def _check_ids(pretrained: Pretrained, ids: list[int]) -> None:
    if not ids:
        raise InputError("There are no tokens to look at: type a few words.")
    limit = pretrained.max_tokens
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"The text has {len(ids)} tokens, {pretrained.name} takes {limit}: shorten it by {len(ids) - limit}."
        )
    wrong = [index for index in ids if not 0 <= index < pretrained.vocab_size]
    if wrong:
        raise InputError(
            f"Token {wrong[0]} does not exist: {pretrained.name} has tokens 0 to {pretrained.vocab_size - 1}."
        )


def _forward(pretrained: Pretrained, ids: list[int], last_logits: bool) -> Any:
    model = pretrained.model
    trimmed = last_logits and "logits_to_keep" in inspect.signature(model.forward).parameters
    batch = torch.tensor([ids], device=pretrained.device)  # (B, T)
    with torch.no_grad():
        output = model(batch, output_hidden_states=True, **({"logits_to_keep": 1} if trimmed else {}))
    if last_logits and "logits" in output:
        output.logits = output.logits[:, -1:]  # (B, 1, V), as it is already if trimmed
    return output
