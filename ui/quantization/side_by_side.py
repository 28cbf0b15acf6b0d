"""The Side by side view: one prompt, continued by both models, and what became of the attention of one head."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import quantization_side_by_side
from ui import chart, clicks, export, run, theme
from ui.charts import attention as attention_charts
from ui.charts import quantization_layers as charts
from ui.prose import plain
from ui.quantization.sentences import change, perplexity, size_sentence
from ui.quantization.settings import PREFIX, Settings, choose_head, has_chosen_head

_RUN = f"{PREFIX}_side_run"
_HEIGHT = 430


def side_by_side(given: Settings) -> None:
    """Both models on the prompt of the page."""
    found = run.run("quantization_side_by_side", given.params, key=_RUN)
    if found is None:
        if run.is_running(_RUN):
            st.skeleton(height=_HEIGHT)
        return
    params = run.params_of(_RUN)
    if params == given.params and not has_chosen_head(params):
        choose_head(*most_moved(found.moved_by_head))
        st.rerun()
    _totals(found)
    left, right = st.columns(2, gap="medium")
    for place, name, tokens in (
        (left, "Original", found.original_tokens),
        (right, f"Quantized · {params.in_words}", found.quantized_tokens),
    ):
        with place, st.container(border=True, height="stretch"):
            st.markdown(f"**{plain(name)}**")
            st.markdown(f":gray[{plain(params.prompt)}]{continuation(tokens, found.first_difference)}")
    st.caption(plain(found.sentence))
    _attention(found, params)


def continuation(tokens: list[str], first_difference: int | None) -> str:
    """New tokens as Markdown: what both models say plainly, what only this one says in bold, its first token marked."""
    texts = [token.replace("␣", " ").replace("⏎", " ").replace("↵", " ") for token in tokens]
    if first_difference is None:
        return plain("".join(texts))
    common, differs = "".join(texts[:first_difference]), texts[first_difference:]
    words = plain(common) + (" " if common.endswith(" ") else "")
    if not differs:
        return f"{words} :orange-badge[ends here]"
    first, rest = differs[0].strip() or "blank", plain("".join(differs[1:]))
    return f"{words} :orange-badge[{plain(first)}]{rest}"


def _totals(found: quantization_side_by_side.Result) -> None:
    with st.container(horizontal=True, key=f"{PREFIX}_side_totals"):
        st.metric(
            "Same tokens at the start",
            f"{_agreeing(found)} of {len(found.original_tokens)}",
            help="Until the models first say something different; from there on they tell different stories.",
        )
        st.metric("Perplexity, original", perplexity(found.original_perplexity))
        st.metric(
            "Perplexity, quantized",
            perplexity(found.quantized_perplexity),
            help=f"It {change(found.original_perplexity, found.quantized_perplexity)}, on {found.perplexity_tokens:,} "
            "tokens of the shipped stories.",
        )
        st.metric(
            "Size of the layers",
            f"{found.quantized_nbytes / found.original_nbytes:.0%} of bfloat16",
            help=f"{found.bits_per_weight:.3g} bits per weight.",
        )
    if said := size_sentence(found.quantized_nbytes, found.original_nbytes):
        st.caption(plain(said))


def _agreeing(found: quantization_side_by_side.Result) -> int:
    return len(found.original_tokens) if found.first_difference is None else found.first_difference


def _attention(found: quantization_side_by_side.Result, params: quantization_side_by_side.Params) -> None:
    head = params.attention_layer, params.attention_head
    which = ", the one that quantization moves most" if head == most_moved(found.moved_by_head) else ""
    st.markdown(f"**Attention of layer {head[0]}, head {head[1]}** on the prompt{which}")
    mode, tokens = theme.mode(), found.prompt_tokens
    moved = found.quantized_map - found.original_map
    difference = attention_charts.difference(moved, tokens, mode=mode)
    difference.update_traces(colorbar_tickformat="+.2~p")  # small moves fill the scale, whole per cents would repeat
    drawn = (
        ("before", attention_charts.weights(found.original_map, tokens, mode=mode), "Before: the original model."),
        ("after", attention_charts.weights(found.quantized_map, tokens, mode=mode), "After: the quantized model."),
        ("moved", difference, found.map_sentence),
    )
    places = [*st.columns(2, gap="small"), *st.columns(2, gap="small")]
    for place, (name, fig, sentence) in zip(places, drawn, strict=False):
        with place:
            key = f"{PREFIX}_side_{name}"
            chart.figure(fig, key=key, sentence=sentence, height=_HEIGHT)
            export.export(
                fig,
                key=key,
                name=f"quantization-attention-{name}",
                experiment="quantization_side_by_side",
                params=params,
                data=lambda: _long(found),
            )
    with places[-1]:
        _heads(found, params)


def _heads(found: quantization_side_by_side.Result, params: quantization_side_by_side.Params) -> None:
    """How much the attention of every head moved; choosing one opens it."""
    layers, heads = found.moved_by_head.shape
    key = f"{PREFIX}_side_heads"
    fig = charts.layer_map(
        found.moved_by_head,
        [str(layer) for layer in range(layers)],
        [str(head) for head in range(heads)],
        title="attention that went elsewhere",
        tickformat=".2~p",
        hover=[
            [f"layer {y}, head {x}<br>{found.moved_by_head[y, x]:.1%} went elsewhere" for x in range(heads)]
            for y in range(layers)
        ],
        across="head →",
        chosen=(params.attention_layer, params.attention_head),
        mode=theme.mode(),
    )
    chart.figure(fig, key=key, sentence=heads_sentence(found.moved_by_head), height=_HEIGHT)
    clicks.on_cell_click(key, lambda x, y: _open(layers, heads, x, y))
    export.export(
        fig,
        key=key,
        name="quantization-heads",
        experiment="quantization_side_by_side",
        params=params,
        data=lambda: pd.DataFrame(
            [{"layer": y, "head": x, "moved": found.moved_by_head[y, x]} for y in range(layers) for x in range(heads)]
        ),
    )


def most_moved(moved: np.ndarray) -> tuple[int, int]:
    """Layer and head of the largest of `moved`, (L, H)."""
    layer, head = np.unravel_index(int(moved.argmax()), moved.shape)
    return int(layer), int(head)


def heads_sentence(moved: np.ndarray) -> str:
    """Which head's attention moved most, in words."""
    layer, head = most_moved(moved)
    return (
        f"Over all heads {moved.mean():.1%} of the attention went to other tokens; most in layer {layer}, head {head}, "
        f"with {moved.max():.1%}. Choose a head to see its maps."
    )


def _open(layers: int, heads: int, x: int, y: int) -> None:
    if y < layers and x < heads:
        choose_head(y, x)


def _long(found: quantization_side_by_side.Result) -> pd.DataFrame:
    tokens = found.prompt_tokens
    query, key = (axis.ravel() for axis in np.indices(found.original_map.shape))
    return pd.DataFrame(
        {
            "query": query,
            "query_token": [tokens[index] for index in query],
            "key": key,
            "key_token": [tokens[index] for index in key],
            "original": found.original_map.ravel(),
            "quantized": found.quantized_map.ravel(),
        }
    )
