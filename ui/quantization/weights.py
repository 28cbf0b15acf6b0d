"""The Weights view: what became of the weights, which error that is, and the block that one weight can wreck."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import quantization, quantization_crosscheck
from ui import chart, clicks, compare, evidence, export, run, theme
from ui.charts import quantization as charts
from ui.prose import plain
from ui.quantization.sentences import decibels, errors_sentence, outliers_sentence, size_sentence, strip_sentence
from ui.quantization.settings import BLOCK, KEPT, PREFIX, Settings, choose_block, shared

_HEIGHT, _BLOCK_HEIGHT, _STRIP_HEIGHT = 360, 430, 110
_SHOWN = 128  # weights of a block that can be told apart on a screen
_CHECK = f"{PREFIX}_crosscheck"


@dataclass(frozen=True)
class _Side:
    """One run as it is drawn: A or B, or the only one.

    Args:
        name: "A", "B" or "".
        found, params: the run.
        scope: what the axes of both sides show.
    """

    name: str
    found: quantization.Result
    params: quantization.Params
    scope: _Scope

    @property
    def noun(self) -> str:
        """What shares a scale."""
        return self.params.scale.removeprefix("per ")


@dataclass(frozen=True)
class _Scope:
    """Ends of axes that have room for the results of both sides.

    Args:
        span: of the weights and the levels.
        top: the largest share of a bin.
        reach: the largest weight or level of a block.
        error_span: of the errors.
        error_top: the largest share of a bin of errors.
        most: the largest error in a block.
    """

    span: tuple[float, float]
    top: float
    reach: float
    error_span: tuple[float, float]
    error_top: float
    most: float

    @classmethod
    def of(cls, found: list[quantization.Result]) -> _Scope:
        spans = [charts.span_of(each.edges, each.levels) for each in found]
        return cls(
            span=(min(low for low, _ in spans), max(high for _, high in spans)),
            top=max(float(max(each.original.max(), each.dequantized.max())) / each.count for each in found),
            reach=max(float(max(abs(each.block.levels).max(), abs(each.block.original).max())) for each in found),
            error_span=(
                min(float(each.error_edges[0]) for each in found),
                max(float(each.error_edges[-1]) for each in found),
            ),
            error_top=max(float(each.error_counts.max()) / each.count for each in found),
            most=max(float(abs(each.block.error).max()) for each in found),
        )


def weights(given: Settings) -> None:
    """Draw the weights of the page, beside those of the pinned run A if there is one."""
    pinned = compare.pin(given.params, prefix=PREFIX)
    runs = [("", given.found, given.found_params)]
    if pinned is not None:
        found = run.run("quantization", pinned, key=f"{PREFIX}_pinned_run")
        if found is None:
            return
        seen = run.params_of(f"{PREFIX}_pinned_run")
        runs = [("A", found, seen), ("B", given.found, given.found_params)]
    scope = _Scope.of([found for _, found, _ in runs])
    sides = [_Side(*each, scope) for each in runs]
    if pinned is None:
        _totals(sides[0])
        left, right = st.columns([3, 2], gap="small")
        with left:
            _histograms(sides[0])
        with right:
            _errors(sides[0])
    else:
        _beside(sides, _titled_totals)
        _beside(sides, _histograms)
        _beside(sides, _errors)
    if given.found.num_blocks > 1:
        _chooser(sides[-1])
    if any(side.found.num_blocks > 1 for side in sides):
        _beside(sides, _strip)
    _beside(sides, _block)
    _crosscheck(given.found, given.found_params)


def _beside(sides: list[_Side], draw: Callable[[_Side], None]) -> None:
    """Both sides in one row, so that what belongs together is at one height."""
    for place, side in zip(st.columns(len(sides), gap="medium"), sides, strict=True):
        with place:
            draw(side)


def _titled_totals(side: _Side) -> None:
    st.markdown(f"**{side.name}** · {plain(side.params.in_words)}")
    _totals(side)


def _totals(side: _Side) -> None:
    found = side.found
    lost = found.distortion.sqnr_db
    with st.container(horizontal=True, key=f"{PREFIX}_totals{side.name}"):
        st.metric(
            "Signal to noise",
            decibels(lost),
            help="SQNR: the weights' mean square over that of the errors. 10 dB are a factor of ten.",
        )
        st.metric(
            "Bits per weight",
            f"{found.bits_per_weight:.3g}",
            help=f"{found.payload_bits:.3g} for the codes and {found.scale_bits:.3g} for the scales.",
        )
        st.metric(
            "Below the bound",
            decibels(found.bound_db - lost) if math.isfinite(lost) else "—",
            help=plain(found.bound_note),
        )
        st.metric(
            "Size",
            f"{found.nbytes / found.original_nbytes:.0%} of bfloat16",
            help=f"{found.nbytes:,} bytes instead of {found.original_nbytes:,}.",
        )
    if said := size_sentence(found.nbytes, found.original_nbytes):
        st.caption(plain(said))


def _histograms(side: _Side) -> None:
    found, key = side.found, f"{PREFIX}_histograms{side.name}"
    whose = "levels" if found.num_blocks == 1 else f"levels of {side.noun} {found.block.index:,}"
    fig = charts.histograms(
        found.edges,
        found.original,
        found.dequantized,
        found.levels,
        whose_levels=whose,
        span=side.scope.span,
        top=side.scope.top,
        mode=theme.mode(),
    )
    said = " ".join(filter(None, (found.source, found.sentence, outliers_sentence(found, side.params))))
    chart.figure(fig, key=key, sentence=said, height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="quantization-weights",
        experiment="quantization",
        params=side.params,
        data=lambda: pd.DataFrame(
            {
                "from": found.edges[:-1],
                "to": found.edges[1:],
                "original": found.original,
                "dequantized": found.dequantized,
            }
        ),
    )


def _errors(side: _Side) -> None:
    found, key = side.found, f"{PREFIX}_errors{side.name}"
    rms = math.sqrt(found.distortion.mse)
    fig = charts.errors(
        found.error_edges,
        found.error_counts,
        rms,
        span=side.scope.error_span,
        top=side.scope.error_top,
        mode=theme.mode(),
    )
    chart.figure(fig, key=key, sentence=errors_sentence(found), height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="quantization-errors",
        experiment="quantization",
        params=side.params,
        data=lambda: pd.DataFrame(
            {"from": found.error_edges[:-1], "to": found.error_edges[1:], "weights": found.error_counts}
        ),
    )


def _block(side: _Side) -> None:
    found, view = side.found, side.found.block
    part = charts.window(view.original, _SHOWN)
    places = _first_place(side) + np.arange(len(view.original))
    key = f"{PREFIX}_block_chart{side.name}"
    fig = charts.block(
        places[part],
        view.original[part],
        view.dequantized[part],
        view.levels,
        reach=side.scope.reach,
        most=side.scope.most,
        noun=side.noun,
        mode=theme.mode(),
    )
    sentence = found.block_sentence
    if part.stop - part.start < view.size:
        sentence += f" Seen are {part.stop - part.start} of its {view.size:,} weights, around the largest."
    chart.figure(fig, key=key, sentence=sentence, height=_BLOCK_HEIGHT)
    export.export(
        fig,
        key=key,
        name="quantization-block",
        experiment="quantization",
        params=side.params,
        data=lambda: pd.DataFrame(
            {"place": places, "original": view.original, "dequantized": view.dequantized, "error": view.error}
        ),
    )


def _first_place(side: _Side) -> int:
    """Place in its block of the first weight that the result holds: of a large block it is a part."""
    found, params = side.found, side.params
    sizes = {"per block": params.block_size, "per channel": found.count // found.shape[0], "per tensor": found.count}
    return found.block.start - found.block.index * sizes[params.scale]


def _strip(side: _Side) -> None:
    """The errors of all blocks, and which of them is looked at."""
    found = side.found
    if found.num_blocks == 1:
        return
    key = f"{PREFIX}_strip{side.name}"
    fig = charts.block_errors(
        found.block_errors, found.block_edges, found.block.index, noun=side.noun, mode=theme.mode()
    )
    leads = side.name != "A"
    sentence = strip_sentence(found, side.noun) + (" Choose a place to open it." if leads else "")
    chart.figure(fig, key=key, sentence=sentence, height=_STRIP_HEIGHT)
    if leads:
        clicks.on_cell_click(key, lambda x, _: _open(found, x))


def _open(found: quantization.Result, place: int) -> None:
    if place < len(found.worst_blocks):
        choose_block(int(found.worst_blocks[place]))


def _chooser(side: _Side) -> None:
    """Which block: by number, the worst, or the one that the largest weight is in."""
    found, noun = side.found, side.noun
    worst = int(found.worst_blocks[found.block_errors.argmax()])
    if (held := st.session_state.get(BLOCK)) is not None and held >= found.num_blocks:
        st.session_state[BLOCK] = None
    with st.container(horizontal=True, vertical_alignment="bottom"):
        number = st.number_input(
            f"{noun.capitalize()} from 0 to {found.num_blocks - 1:,}",
            0,
            found.num_blocks - 1,
            None,
            key=BLOCK,
            placeholder=f"{found.block.index} has the largest weight",
            bind="query-params",
            width=260,
        )
        KEPT.keep(BLOCK, number, None if number is None else str(number))
        st.button("Largest weight", key=f"_{PREFIX}_largest", on_click=choose_block, args=(None,))
        st.button(f"Worst {noun}", key=f"_{PREFIX}_worst", on_click=choose_block, args=(worst,))


def _crosscheck(found: quantization.Result, params: quantization.Params) -> None:
    """The same weights quantized by bitsandbytes."""
    st.markdown("**Against bitsandbytes**, on these weights")
    if found.crosscheck:
        st.caption(plain(found.crosscheck))
        return
    wanted = quantization_crosscheck.Params(**shared(quantization_crosscheck.Params, params))
    run.watch("quantization_crosscheck", wanted, lambda checked, _: _checked(checked), key=_CHECK, height=60)


def _checked(checked: quantization_crosscheck.Result) -> None:
    if checked.reason:
        st.caption(plain(checked.reason))
        return
    same = checked.differing_codes == 0 and checked.differing_values == 0
    badge = ":green-badge[:material/check: the same]" if same else ":orange-badge[:material/info: not the same]"
    st.markdown(f"{badge} {plain(checked.sentence)}")
    for name, measured in (("Ours", checked.ours), ("bitsandbytes", checked.theirs)):
        if measured:
            st.caption(name)
            evidence.evidence(measured)
