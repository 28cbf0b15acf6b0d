"""What is timed of a model that writes: a prompt that is read at once, and one more token with the others in a cache.

Legend: B batch, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.model import Decoder, KVCache


def reading(model: Decoder, ids: Tensor) -> Callable[[], Tensor]:
    """A call that reads the prompts `ids` (B, T) into a fresh cache and returns the logits of what follows, (B, V)."""

    def read() -> Tensor:
        cache = KVCache(model, *ids.shape)
        return model.lm_head(model.hidden(ids, cache)[:, -1])

    return read


def continuing(model: Decoder, ids: Tensor) -> Callable[[], Tensor]:
    """The same for the last tokens of `ids` alone, those before them being in a cache; it may be made repeatedly."""
    before = ids.shape[1] - 1
    cache = KVCache(model, *ids.shape)
    if before:
        model.hidden(ids[:, :before], cache)

    def read() -> Tensor:
        for layer in cache.layers:
            layer.length = before
        return model.lm_head(model.hidden(ids[:, before:], cache)[:, -1])

    return read
