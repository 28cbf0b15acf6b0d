"""What a GPU gave when it was recorded, below what this device gives: labelled, and drawn dashed."""

from __future__ import annotations

import streamlit as st

from engine.experiments import flash_decode, flash_speed
from engine.experiments._flash_recorded import P, R, Recorded
from ui.prose import plain


def heading(recorded: Recorded[P, R], shape: str) -> None:
    """A line that says where and when, and one that says of what.

    Args:
        recorded: a run.
        shape: what was computed, in words.
    """
    found = recorded.found
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    st.markdown(f"#### {plain(found.device.removeprefix('NVIDIA '))}, recorded")
    st.caption(plain(f"Recorded on an {found.device} on {recorded.date}, {versions}; not measured now. {shape}"))


def sweep_in_words(params: flash_speed.Params) -> str:
    """The recorded shape, since it need not be that of the controls."""
    batch = (
        f"{params.max_length:,} tokens a batch at every length"
        if params.tokens == "constant tokens"
        else f"batch {params.batch}"
    )
    mask = "under a causal mask" if params.causal else "without a mask"
    return f"{params.dtype}, {batch}, {params.heads} heads of {params.head_dim}, {mask}, {params.direction}."


def decode_in_words(params: flash_decode.Params) -> str:
    """Likewise."""
    return (
        f"{params.dtype}, batch {params.batch}, {params.heads} heads of {params.head_dim} on {params.kv_heads} "
        f"key/value heads, our own split in {params.splits} parts."
    )
