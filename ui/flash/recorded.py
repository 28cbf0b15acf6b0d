"""What a GPU gave when it was recorded, below what this device gives: labelled, and drawn dashed."""

from __future__ import annotations

import streamlit as st

from engine.experiments import flash_decode, flash_speed
from engine.experiments._flash_recorded import P, R, Recorded
from ui.prose import plain


def heading(recorded: Recorded[P, R], shape: str, *, dashed: bool = True) -> None:
    """A line that says where and when, and one that says of what.

    Args:
        recorded: a run.
        shape: what was computed, in words.
        dashed: whether its lines are.
    """
    found = recorded.found
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    now = "not measured now, so its lines are dashed" if dashed else "not measured now"
    st.markdown(f"#### {plain(found.device.removeprefix('NVIDIA '))}, recorded")
    st.caption(plain(f"Recorded on an {found.device} on {recorded.date}, {versions}; {now}. {shape}"))


def sweep_in_words(params: flash_speed.Params) -> str:
    """The recorded shape, since it need not be that of the controls."""
    batch = (
        f"{params.max_length:,} tokens a batch at every length"
        if params.tokens == "constant tokens"
        else f"batch {params.batch}"
    )
    mask = "under a causal mask" if params.causal else "without a mask"
    words = f"{params.dtype}, {batch}, {params.heads} heads of {params.head_dim}, {mask}, {params.direction}."
    if params.tokens == "constant tokens":
        words += (
            " As T doubles, the batch halves: what grows as T² for one sequence doubles here, what grows as T stays."
        )
    return f"{words} Of what was recorded it is the nearest to the settings, in direction, mask and head width."


def decode_in_words(params: flash_decode.Params) -> str:
    """Likewise."""
    return (
        f"{params.dtype}, batch {params.batch}, {params.heads} heads of {params.head_dim} on {params.kv_heads} "
        f"key/value heads, our own split in {params.splits} parts."
    )
