"""The Budget view: every way to train the model, stacked from what it holds, against the card."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import memory
from engine.experiments._memory import MOST, PARTS, bytes_each
from ui import chart, export, theme
from ui.charts import memory as charts
from ui.charts.memory import Stack, amount
from ui.memory.settings import PREFIX, WEIGHTS, titled
from ui.prose import plain

_HEIGHT = 520


def budget(params: memory.Params) -> None:
    """Arithmetic alone, drawn at every move of a control."""
    found = memory.compute(params)
    _verdict(params, found)
    bars = [
        Stack(f"{titled(way.name)}, {WEIGHTS[way.weights]}", way.peak.parts, number == found.chosen)
        for number, way in enumerate(found.ways)
    ]
    fig = charts.stacks(bars, card=found.card_bytes, mode=theme.mode())
    key = f"{PREFIX}_stacks"
    chart.figure(fig, key=key, sentence=found.sentence, height=_HEIGHT)
    export.export(fig, key=key, name="memory", experiment="memory", params=params, data=lambda: table(found))
    st.markdown(f"**What fits {params.card} GB**")
    st.table(_fits(params, found), border="horizontal")
    st.caption(plain(_context(params, found)))
    st.caption(
        "GB are 10⁹ bytes. Makers count in 2³⁰: a card sold as 24 GB has 25.8. The difference, 7%, is left for what "
        "no plan counts: CUDA's own memory, and gaps between blocks. Generating is counted where it holds most, while "
        "a prompt of all tokens is read at once; that bar was compared with processors only, those of training with "
        "a GPU as well."
    )
    st.caption(plain(full_fine_tuning(params)))
    with st.expander("What each part is, and how much of the chosen plan", icon=":material/help:"):
        st.table(_parts(found), border="horizontal")


def full_fine_tuning(params: memory.Params) -> str:
    """What full fine-tuning keeps for each of the model's numbers, by the chosen plan, beside what is common."""
    each = bytes_each(params.plan("full fine-tuning"))
    state = f"{each.state:.2f} of the means of {params.optimizer}"
    if each.paged:
        state += f" and {each.paged:.2f} more of them paged, not on the card"
    return (
        f"Full fine-tuning keeps {each.total:.2f} bytes for each of the model's numbers here: {each.weight:.0f} of "
        f"the weight, {each.gradient:.0f} of its gradient, {state}. Mixed precision as it is common, weights and "
        "gradients in 16 bits beside weights and AdamW's means in float32, keeps 16."
    )


def table(found: memory.Result) -> pd.DataFrame:
    """The numbers behind the figure: bytes of every part at each way's peak."""
    rows = [
        {"way": way.name, "weights in": way.weights, "moment": way.peak.name, **way.peak.parts, "peak": way.peak.total}
        for way in found.ways
    ]
    columns = ["way", "weights in", "moment", *(part for part in PARTS), "peak"]
    return pd.DataFrame(rows).reindex(columns=columns).fillna(0)


def _verdict(params: memory.Params, found: memory.Result) -> None:
    """Whether the chosen plan fits, and what the card has room for."""
    way = found.ways[found.chosen]
    left = found.card_bytes - way.peak.total
    with st.container(horizontal=True, key=f"{PREFIX}_verdict"):
        st.metric(
            f"{titled(way.name)} on {params.card} GB",
            "fits" if way.fits else "does not fit",
            delta=f"{amount(abs(left))} {'left' if way.fits else 'too much'}",
            delta_color="normal" if way.fits else "inverse",
            delta_arrow="off",
        )
        st.metric("Peak", amount(way.peak.total), help=f"Of the fullest moment of a step: {way.peak.name}.")
        st.metric("Largest batch", _most(way.largest_batch), help=f"Texts of {params.length:,} tokens at once.")
        st.metric(
            "Longest texts",
            _longest(way, found.context),
            help=f"Tokens, with {params.batch} at once. {_context(params, found)}",
        )


def _fits(params: memory.Params, found: memory.Result) -> pd.DataFrame:
    rows = {
        titled(way.name): {
            "peak": amount(way.peak.total),
            "fits": "yes" if way.fits else "no",
            f"largest batch of {params.length:,} tokens": _most(way.largest_batch),
            f"longest texts, {params.batch} at once": _longest(way, found.context)
            + (", all it reads" if way.largest_length >= found.context else ""),
            "paged, not on the card": amount(way.paged_bytes) if way.paged_bytes else "—",
        }
        for way in found.ways
    }
    return pd.DataFrame(rows).T


def _parts(found: memory.Result) -> pd.DataFrame:
    way = found.ways[found.chosen]
    rows = {
        part: {
            "at the peak": amount(way.peak.parts[part]) if part in way.peak.parts else "—",
            "share": f"{way.peak.parts.get(part, 0) / way.peak.total:.0%}",
            "what it is": meaning,
        }
        for part, meaning in PARTS.items()
    }
    return pd.DataFrame(rows).T


def _longest(way: memory.Way, context: int) -> str:
    return _most(min(way.largest_length, context))


def _context(params: memory.Params, found: memory.Result) -> str:
    """How much the model reads at most, and what there would be room for."""
    way = found.ways[found.chosen]
    words = f"{params.shape} reads {found.context:,} tokens at most"
    if way.largest_length > found.context:
        words += f"; the card would have room for texts of {_most(way.largest_length)} with {way.name}"
    if params.length > found.context:
        words += f"; the {params.length:,} that are chosen are counted all the same"
    return f"{words}."


def _most(value: int) -> str:
    if not value:
        return "none"
    return f"{value:,}{' or more' if value == MOST else ''}"
