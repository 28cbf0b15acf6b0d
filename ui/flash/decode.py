"""The Decode view: one query against a long cache, where memory sets the pace, and the cache read in parts."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import flash_decode
from engine.experiments._flash import bytes_in_words, number_in_words
from engine.experiments._flash_recorded import recorded_decode
from ui import chart, export, run, theme
from ui.charts import flash as charts
from ui.charts import flash_tiles
from ui.charts.flash import Panel, short
from ui.evidence import provenance, timing
from ui.flash.missing import missing
from ui.flash.points import inverse_spread, lines
from ui.flash.recorded import decode_in_words, heading
from ui.flash.settings import PREFIX, Settings
from ui.measure_button import measure_button
from ui.prose import plain

RUN = f"{PREFIX}_decode_run"
_HEIGHT, _PARTS_HEIGHT = 740, 320
_ACROSS = "tokens in the cache, T"


def decode(given: Settings) -> None:
    """What the cache weighs, the button, and the picture as its points come."""
    params: flash_decode.Params = given.params
    with st.container(horizontal=True, key=f"{PREFIX}_cache"):
        longest = params.cache_bytes(params.max_length)
        st.metric(
            "Cache at the longest",
            bytes_in_words(longest),
            help="Keys and values of all tokens: read for each new one.",
        )
        st.metric(
            "If every head had its own",
            bytes_in_words(longest * params.heads // params.kv_heads),
            help=f"{params.heads} heads share {params.kv_heads} key/value heads.",
        )
    started = measure_button("flash_decode", params, key=RUN)
    if started is None:
        st.info(
            "A model that writes has one new query at a time, and all keys and values of what came before (the cache) "
            "to read for it. There is next to nothing to compute, so it cannot be faster than memory is read. With one "
            "query there is only one row of tiles, which leaves most of a GPU idle: to come near memory's speed, the "
            "cache is split among its multiprocessors, and the parts are merged exactly.",
            icon=":material/lightbulb:",
        )
    else:
        run.watch("flash_decode", started, _draw, key=RUN, height=_HEIGHT)
    recorded = recorded_decode()
    if recorded is not None:
        heading(recorded, decode_in_words(recorded.params))
        fig = charts.over_length(panels(recorded.found, recorded=True), mode=theme.mode(), across=_ACROSS)
        chart.figure(fig, key=f"{PREFIX}_decode_recorded", sentence=recorded.found.sentence, height=_HEIGHT)


def panels(found: flash_decode.Result, *, recorded: bool = False) -> list[Panel]:
    """Time above, and how much of the memory's speed was reached below."""
    return [
        Panel(
            "time for one token, ms",
            lines(
                found.points, lambda point: (point.median_ms, point.low_ms, point.high_ms), _hover, recorded=recorded
            ),
        ),
        Panel(
            "% of a large copy's speed",
            lines(found.points, _share, _hover, recorded=recorded),
            logarithmic=False,
            most=100.0,
        ),
    ]


def table(found: flash_decode.Result) -> pd.DataFrame:
    """The points as rows."""
    return pd.DataFrame([vars(point) for point in found.points])


def _share(point: flash_decode.Point) -> tuple[float, float, float]:
    return inverse_spread(100 * point.bandwidth_share, point.median_ms, point.low_ms, point.high_ms)


def _hover(point: flash_decode.Point) -> str:
    return (
        f"<b>{point.label}</b>, {point.length:,} tokens in the cache, {bytes_in_words(point.cache_bytes)}<br>"
        f"{timing(point)}<br>"
        f"{point.bandwidth / 1e9:.3g} GB/s, {point.bandwidth_share:.0%} of a large copy's speed"
    )


def _draw(found: flash_decode.Result, params: flash_decode.Params) -> None:
    mode = theme.mode()
    fig = charts.over_length(panels(found), mode=mode, across=_ACROSS)
    key = f"{PREFIX}_decode"
    chart.figure(fig, key=key, sentence=found.sentence, height=_HEIGHT)
    if found.ended not in ("running", "finished"):
        st.info(plain(found.ending), icon=":material/info:")
    export.export(
        fig, key=key, name="flash-decode", experiment="flash_decode", params=params, data=lambda: table(found)
    )
    _merge(found, mode)
    missing(found.absent, found.stops)
    if found.ended != "running":
        provenance(found)


def _merge(found: flash_decode.Result, mode: theme.Mode) -> None:
    """How the parts of the cache become one output."""
    merge = found.merge
    st.markdown("**The parts and their merger**, head 0")
    ends = [*merge.starts[1:].tolist(), merge.length]
    hover = [
        f"tokens {start:,} to {end - 1:,}<br>m = {m:.4g}, l = {total:.4g}<br>factor e^(m − largest m) = {factor:.4g}"
        for start, end, m, total, factor in zip(
            merge.starts.tolist(), ends, merge.maximum, merge.sum, merge.rescale, strict=True
        )
    ]
    fig = flash_tiles.parts([short(start) for start in merge.starts.tolist()], merge.share.tolist(), hover, mode=mode)
    chart.figure(fig, key=f"{PREFIX}_parts", sentence=merge_sentence(merge), height=_PARTS_HEIGHT)


def merge_sentence(merge: flash_decode.Merge) -> str:
    """What each part keeps, and that nothing is lost."""
    largest = int(merge.share.argmax())
    return (
        f"A cache of {merge.length:,} tokens with random numbers, in {len(merge.starts)} parts. Each keeps its largest "
        "score m, its sum l and its output; multiplied by e^(m − the largest m), sums and outputs add up. Part "
        f"{largest + 1} weighs most, "
        f"{merge.share[largest]:.1%}. Merged, the output differs from that of the whole cache by at most "
        f"{number_in_words(merge.difference)} in float64."
    )
