"""What the experiments of the attention lab share: their parameters, and traces kept on the worker.

Legend: T tokens, L layers, H heads, d head width, D model width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from pydantic import Field, field_validator

from engine import catalogue, local_models
from engine.errors import InputError, JobCancelledError
from engine.experiments import ExperimentParams

if TYPE_CHECKING:
    from torch import Tensor

    from engine.pretrained import Pretrained
    from engine.runtime.jobs import Job
    from engine.tracing import Intervention, Trace

MAX_TOKENS = 128
"""Longer texts make maps in which nobody can read a token."""

MAX_CHARACTERS = 20_000

REPEATING_TEXT = "Lily met a green frog, a red bird and a blue cat. Then Tom met a green frog, a red bird and a blue"
"""A text in which the next token is to be found by looking back: induction heads show what they do."""

PROBE_PERIOD = 25
PROBE_SEEDS = range(4)


class TextParams(ExperimentParams):
    """A model and a text for it to read. The time limit leaves room for a model that is fetched and converted first."""

    time_limit: ClassVar[float] = 180.0

    text: str = Field(
        "Mia and Sam went to the forest. They saw a blue owl. Mia and",
        title="Your text",
        description=f"Anything you like, up to {MAX_TOKENS} tokens.",
        json_schema_extra={"widget": "area"},
    )
    model: str = Field(
        catalogue.DEFAULT,
        title="Model",
        description="storyteller (our own, small), smollm2-135m, all-minilm-l6-v2 (an encoder), any Hugging Face id, a "
        "local folder with a config.json, or a .gguf file.",
        max_length=300,
    )
    weights: Literal["trained", "untrained"] = Field(
        "trained",
        title="Weights",
        description="Untrained: one fresh MultiHeadAttention on the same token embeddings, to see what training did.",
    )
    cut: bool = Field(
        False, title="Cut long text", description=f"Use the first {MAX_TOKENS} tokens of a text that is longer."
    )

    def cache_token(self) -> str:
        """When a local model changed last."""
        return str(local_models.modified(self.model))

    @field_validator("text")
    @classmethod
    def _something_to_read(cls, text: str) -> str:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"The text has {len(text):,} characters; the lab takes {MAX_CHARACTERS:,}: paste a part of it."
            )
        if not text:
            raise ValueError("The text is empty: type a few words.")
        if not text.strip():
            raise ValueError("The text has only spaces: type a few words.")
        return text

    @field_validator("model")
    @classmethod
    def _some_model(cls, model: str) -> str:
        if not model.strip():
            raise ValueError(f"No model is named: {catalogue.DEFAULT} is always there.")
        return model.strip()


class HeadParams(TextParams):
    """One head of it, and what the learner changes about its attention."""

    layer: int = Field(5, ge=0, le=511, title="Layer", description="Counted from 0, the layer next to the input.")
    head: int = Field(0, ge=0, le=511, title="Head", description="Counted from 0 within the layer.")
    temperature: float = Field(
        1.0,
        ge=0.1,
        le=5.0,
        title="Temperature",
        description="Divides the logits before the softmax: below 1 sharpens the attention, above 1 flattens it.",
        json_schema_extra={"step": 0.1},
    )
    mask: Literal["own", "causal", "bidirectional", "sliding window", "prefix LM"] = Field(
        "own", title="Mask", description="Which keys a query may look at. Own: as the model was trained."
    )
    window: int = Field(
        4,
        ge=1,
        le=MAX_TOKENS,
        title="Window",
        description="Keys that a query sees with the sliding window, itself included.",
    )
    prefix: int = Field(
        4,
        ge=0,
        le=MAX_TOKENS,
        title="Prefix",
        description="Tokens at the start that see each other in both directions.",
    )
    drop: int = Field(
        -1,
        ge=-1,
        le=MAX_TOKENS - 1,
        title="Drop a token",
        description="Delete this token from the text; −1 deletes none.",
    )
    reach: Literal["this head", "every head"] = Field(
        "this head",
        title="Temperature and mask act on",
        description="This head alone, or every head of every layer.",
    )

    @property
    def changes_attention(self) -> bool:
        """Whether temperature or mask differ from what the model does by itself."""
        return self.temperature != 1.0 or self.mask != "own"


def note(params: HeadParams, chosen: Tensor, own: Tensor) -> str:
    """A sentence for a mask that makes no difference on this text, else empty; both masks are bool (T, T)."""
    length = len(own)
    if params.mask == "own" or not chosen.equal(own):
        return ""
    what = {
        "sliding window": f"A window of {params.window} on {length} tokens",
        "prefix LM": f"A prefix of {params.prefix}",
    }.get(params.mask, f"The {params.mask} mask")
    return f"{what} allows exactly what the model's own mask allows here: it changes nothing."


def read(params: TextParams, job: Job) -> tuple[Pretrained, tuple[int, ...]]:
    """The model on the job's device, and the text as token ids.

    Raises:
        InputError: the text is too long, or the model cannot be had.
    """
    from engine import pretrained

    model = pretrained.load(params.model, job.device)
    if job.cancelled:
        raise JobCancelledError("The job was cancelled while its model was loaded.")
    ids = model.encode(model.truncate(params.text, MAX_TOKENS) if params.cut else params.text)
    if len(ids) > MAX_TOKENS:
        raise InputError(
            f"The text has {len(ids)} tokens; the lab shows up to {MAX_TOKENS}. Shorten it, or cut it to the first "
            f"{MAX_TOKENS}."
        )
    return model, tuple(ids)


def check_head(params: HeadParams, num_layers: int, num_heads: int, length: int) -> None:
    """Raise `InputError` unless layer, head and the dropped token exist."""
    for name, index, count, owner in (
        ("layer", params.layer, num_layers, "The model"),
        ("head", params.head, num_heads, "The layer"),
        ("token", params.drop, length, "The text"),
    ):
        if index >= count:
            raise InputError(f"There is no {name} {index}: {owner.lower()} has {count} of them, 0 to {count - 1}.")
    if params.drop >= 0 and length == 1:
        raise InputError("The text has one token: dropping it leaves nothing to attend to.")


def without(ids: tuple[int, ...], drop: int) -> tuple[int, ...]:
    """`ids` less the token at `drop`; −1 drops none."""
    return ids if drop < 0 else ids[:drop] + ids[drop + 1 :]


_KEPT = 6
_kept: WeakKeyDictionary[Pretrained, OrderedDict[Hashable, Any]] = WeakKeyDictionary()
_probes: WeakKeyDictionary[Pretrained, dict[str, tuple[Tensor, int]]] = WeakKeyDictionary()


def _keep(model: Pretrained, key: Hashable, compute: Callable[[], Any]) -> Any:
    """The last few things computed from `model`, which go when the model goes: they must not keep it in memory."""
    kept = _kept.setdefault(model, OrderedDict())
    if key not in kept:
        kept[key] = compute()
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def trace(model: Pretrained, weights: str, ids: tuple[int, ...]) -> Trace:
    """The untouched pass over `ids`, kept: a slider moves over the same text many times."""
    from engine import tracing

    if weights == "untrained":
        return _keep(model, ("untrained", ids), lambda: untrained_trace(model, ids))
    return _keep(model, ("trained", ids), lambda: tracing.trace(model, list(ids), last_logits=True))


def changed_trace(model: Pretrained, params: HeadParams, ids: tuple[int, ...]) -> Trace:
    """The pass with the learner's temperature and mask inside the model, so that everything after it follows."""
    from engine import tracing

    if not params.changes_attention:
        return trace(model, params.weights, ids)
    one_head = params.reach == "this head"
    change = tracing.Intervention(
        temperature=params.temperature,
        mask=None if params.mask == "own" else mask_matrix(params, trace(model, params.weights, ids), params.layer),
        layer=params.layer if one_head else None,
        head=params.head if one_head else None,
    )
    if params.weights == "untrained":
        return untrained_trace(model, ids, change)
    return tracing.trace(model, list(ids), change, last_logits=True)


def mask_matrix(params: HeadParams, own: Trace, layer: int) -> Tensor:
    """The chosen mask as a bool (T, T) on the trace's device. A window keeps the direction of the model's own mask."""
    from engine.masks import bidirectional, causal, intersection, materialize, prefix_lm, sliding_window

    if params.mask == "own":
        return own.masks[layer]
    looks_ahead = bool(own.masks[layer].triu(1).any())
    chosen = {
        "causal": lambda: causal,
        "bidirectional": lambda: bidirectional,
        "sliding window": lambda: intersection(bidirectional if looks_ahead else causal, sliding_window(params.window)),
        "prefix LM": lambda: prefix_lm(params.prefix),
    }[params.mask]()
    return materialize(chosen, len(own.tokens), device=own.attention.device)


def untrained_trace(model: Pretrained, ids: tuple[int, ...], change: Intervention | None = None) -> Trace:
    """One fresh `MultiHeadAttention` on the model's token embeddings, normalised as its initialisation expects."""
    import torch

    from engine.attention import MultiHeadAttention, attend
    from engine.masks import bidirectional, causal, materialize
    from engine.tracing import Trace

    width = model.model.get_input_embeddings().embedding_dim
    if width != model.d_model:
        raise InputError(
            f"{model.name} has token embeddings of width {width} and layers of width {model.d_model}: an untrained "
            "layer cannot read them as they are."
        )

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        attention = MultiHeadAttention(model.d_model, model.num_heads, head_dim=model.head_dim).to(model.device)
        embedded = model.model.get_input_embeddings()(torch.tensor([ids], device=model.device)).float()
        x = torch.nn.functional.layer_norm(embedded, (model.d_model,))  # (1, T, D)
        query, key, value = attention.project(x, x, x)  # (1, H, T, d)
        own = materialize(bidirectional if model.kind == "encoder" else causal, len(ids), device=model.device)  # (T, T)
        output, weights = attend(query, key, value, own)
        if change is not None:
            heads = slice(None) if change.head is None else slice(change.head, change.head + 1)
            output[:, heads], weights[:, heads] = attend(
                query[:, heads],
                key[:, heads],
                value[:, heads],
                own if change.mask is None else change.mask,
                temperature=change.temperature,
            )
        joined = attention.o_proj(output.transpose(1, 2).flatten(2))  # (1, T, D)
    return Trace(
        ids=torch.tensor(ids),
        tokens=model.readable(list(ids)),
        attention=weights,
        queries=query,
        keys=key,
        values=value,
        scales=(model.head_dim**-0.5,),
        masks=own[None],
        hidden=torch.cat([x, joined]),
        logits=None,
    )


def probe(model: Pretrained, weights: str) -> tuple[Tensor, int]:
    """Attention (L, H, 2P, 2P) on random tokens said twice, averaged over seeds, and P."""
    kept = _probes.setdefault(model, {})
    if weights not in kept:
        kept[weights] = _probe(model, weights)
    return kept[weights]


def _probe(model: Pretrained, weights: str) -> tuple[Tensor, int]:
    import torch

    from engine import tracing
    from engine.head_statistics import repeated_random_tokens

    limit = model.max_tokens or 2 * PROBE_PERIOD
    period = min(PROBE_PERIOD, limit // 2, model.vocab_size)
    maps = []
    for seed in PROBE_SEEDS:
        ids = tuple(repeated_random_tokens(model.vocab_size, period, 1, seed)[0].tolist())
        seen = (
            untrained_trace(model, ids) if weights == "untrained" else tracing.trace(model, list(ids), last_logits=True)
        )
        maps.append(seen.attention.float())
    return torch.stack(maps).mean(0), period
