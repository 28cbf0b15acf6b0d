"""What a GPU gave when it was recorded, below what this device gives: of what model, in words."""

from __future__ import annotations

from engine.experiments._full_model import SwitchParams


def size_in_words(params: SwitchParams) -> str:
    """The recorded sizes, since they need not be those of the controls."""
    return (
        f"A fresh model of {params.num_layers} layers, {params.d_model} wide, {params.num_heads} heads; adapters of "
        f"rank {params.rank}, {params.experts} experts, {params.top_k} a token; {params.batch_size} × {params.length} "
        "tokens. Of what was recorded it is the nearest to the settings in parameters times tokens."
    )
