"""The Tiles view: one head in tiles, step by step, with the numbers of a row and the bytes that were moved.

All steps come with one result; going through them is this page's, and starts no job.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import flash_tiles
from engine.experiments._flash import number_in_words
from ui import chart, export, run, theme
from ui.charts import flash_tiles as charts
from ui.charts.flash_tiles import Tiles
from ui.charts.memory import amount
from ui.flash.settings import PREFIX, Settings

RUN = f"{PREFIX}_tiles_run"
STEP = f"{PREFIX}_step"
_PLAYING = f"_{PREFIX}_playing"
_SEEN = f"_{PREFIX}_step_of"
_PACE = 0.7  # seconds a step
_GRID_HEIGHT, _OUTPUT_HEIGHT, _TRAFFIC_HEIGHT, _MEMORY_HEIGHT = 520, 300, 230, 340
_SHOWN_SCORES = 8
_ROUNDING = 1e-5  # of an output in float32


def tiles(given: Settings) -> None:
    """The buttons of the stepper, and below them the step that they lead to."""
    found: flash_tiles.Result | None = run.run("flash_tiles", given.params, key=RUN)
    if found is None:
        if run.is_running(RUN):
            st.skeleton(height=_GRID_HEIGHT)
        return
    params: flash_tiles.Params = run.params_of(RUN)
    steps = len(found.query_block)
    state = st.session_state
    if state.get(_SEEN, params) != params:
        state[_PLAYING] = False
    state[_SEEN] = params
    if STEP in state:
        state[STEP] = min(state[STEP], steps)
    elif STEP not in st.query_params:
        state[STEP] = first_step(found)
    playing = state.get(_PLAYING, False)
    if params.on_chip is not None:
        st.caption(
            f"{params.on_chip:g} KiB on the chip hold tiles of {found.block_q} rows and {found.block_k} columns: these "
            "count, and not the two sliders. Empty the field for on-chip memory to choose the tiles yourself."
        )
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.button("Start", key=f"_{STEP}_first", icon=":material/first_page:", on_click=_go, args=(0,))
        st.button("Back", key=f"_{STEP}_back", icon=":material/chevron_left:", on_click=_move, args=(-1, steps))
        st.button(
            "Pause" if playing else "Play",
            key=f"_{STEP}_play",
            type="primary",
            icon=":material/pause:" if playing else ":material/play_arrow:",
            on_click=_play,
            args=(steps,),
        )
        st.button("Next", key=f"_{STEP}_next", icon=":material/chevron_right:", on_click=_move, args=(1, steps))
        st.button("End", key=f"_{STEP}_last", icon=":material/last_page:", on_click=_go, args=(steps,))
    st.fragment(_step, run_every=_PACE if playing else None)(found, params, playing)
    _memory(params)


def _memory(params: flash_tiles.Params) -> None:
    """What on-chip memory is worth: arithmetic, and the same at every step."""
    curve = flash_tiles.predict_traffic(params)
    chosen = None if params.on_chip is None else params.on_chip * 1024
    st.markdown("**What on-chip memory is worth**, counted and by the paper's theorem")
    fig = charts.on_chip(curve.on_chip, curve.counted, curve.theorem, curve.standard, chosen, mode=theme.mode())
    key = f"{PREFIX}_on_chip"
    chart.figure(fig, key=key, sentence=curve.sentence, height=_MEMORY_HEIGHT)


def first_step(found: flash_tiles.Result) -> int:
    """Where a visitor comes in: at the followed row's second tile, the first one that has something to rescale."""
    visited = found.row_steps[~found.skipped[found.row_steps]]
    return int(visited[min(1, len(visited) - 1)])


def _go(step: int) -> None:
    st.session_state[STEP] = step
    st.session_state[_PLAYING] = False


def _move(by: int, steps: int) -> None:
    _go(min(max(st.session_state.get(STEP, 0) + by, 0), steps))


def _play(steps: int) -> None:
    playing = not st.session_state.get(_PLAYING, False)
    if playing and st.session_state.get(STEP, 0) >= steps:
        st.session_state[STEP] = 0
    st.session_state[_PLAYING] = playing


def _pause() -> None:
    st.session_state[_PLAYING] = False


def _step(found: flash_tiles.Result, params: flash_tiles.Params, playing: bool) -> None:
    """The slider and what it shows; played, each drawing is a step further, until the last or a hand on the slider."""
    steps, state = len(found.query_block), st.session_state
    if playing:
        if not state.get(_PLAYING, False) or state.get(STEP, 0) >= steps:
            state[_PLAYING] = False
            st.rerun()
        state[STEP] = state.get(STEP, 0) + 1
    step = st.slider(
        "Tiles done",
        0,
        steps,
        key=STEP,
        bind="query-params",
        on_change=_pause,
        help="In the order in which they are computed; the next one is drawn as “now”, and at the end all are done.",
    )
    left, right = st.columns([5, 4], gap="medium")
    mode = theme.mode()
    with left:
        fig = charts.grid(_drawn(found, params), step, params.row, mode=mode)
        key = f"{PREFIX}_grid"
        chart.figure(fig, key=key, sentence=tile_sentence(found, params, step), height=_GRID_HEIGHT)
        export.export(
            fig, key=key, name="flash-tiles", experiment="flash_tiles", params=params, data=lambda: table(found)
        )
    with right:
        _row(found, params, step, mode)
    done = _moved(found, step)
    fig = charts.traffic(*done, found.flash_bytes, found.standard_bytes, mode=mode)
    key = f"{PREFIX}_traffic"
    chart.figure(fig, key=key, sentence=traffic_sentence(found, step), height=_TRAFFIC_HEIGHT)


def _drawn(found: flash_tiles.Result, params: flash_tiles.Params) -> Tiles:
    return Tiles(
        found.query_block,
        found.key_block,
        found.skipped,
        found.partial,
        found.grid,
        found.block_q,
        found.block_k,
        params.length,
    )


def tile_sentence(found: flash_tiles.Result, params: flash_tiles.Params, step: int) -> str:
    """Which tile is computed now, or what was done in all."""
    steps = len(found.query_block)
    if step >= steps:
        left_out = int(found.skipped.sum())
        words = f"All {steps} tiles are done" if steps > 1 else "The only tile is done"
        if left_out:
            words += f", {left_out} of them skipped: the causal mask hides all of what is in them"
        return f"{words}. The whole matrix of {params.length} × {params.length} scores was never there at once."
    queries = _block(int(found.query_block[step]), found.block_q, params.length)
    keys = _block(int(found.key_block[step]), found.block_k, params.length)
    where = f"Step {step + 1} of {steps}: queries {queries} against keys {keys}"
    if found.skipped[step]:
        return f"{where}. The causal mask hides all of this tile: it is skipped, its keys and values are not even read."
    cut = " The mask hides the part of it that lies in the future." if found.partial[step] else ""
    fresh = (
        "Queries, keys and values are"
        if _is_first(found, step)
        else "The queries stay on the chip; keys and values are"
    )
    return f"{where}. {fresh} read, the scores computed and used on the chip, and forgotten.{cut}"


def _is_first(found: flash_tiles.Result, step: int) -> bool:
    """Whether a step is the first of its block of queries that computes anything."""
    same = np.flatnonzero((found.query_block == found.query_block[step]) & ~found.skipped)
    return bool(len(same)) and int(same[0]) == step


def traffic_sentence(found: flash_tiles.Result, step: int) -> str:
    """The bytes so far, and what the end of it is worth."""
    read, written = _moved(found, step)
    when = "before this step" if step < len(found.query_block) else "in all"
    return (
        f"Between the card's main memory (HBM) and the small fast memory on the chip: {amount(read)} read and "
        f"{amount(written)} written {when}; the dashed line is where it ends. Standard attention writes the "
        f"whole matrix of scores and reads it back, twice. {found.sentence}"
    )


def table(found: flash_tiles.Result) -> pd.DataFrame:
    """The steps as rows."""
    return pd.DataFrame(
        {
            "query_block": found.query_block,
            "key_block": found.key_block,
            "skipped": found.skipped,
            "partial": found.partial,
            "bytes_read": found.bytes_read,
            "bytes_written": found.bytes_written,
        }
    )


def _moved(found: flash_tiles.Result, step: int) -> tuple[int, int]:
    """Bytes read and written once `step` steps are done."""
    return (0, 0) if step == 0 else (int(found.bytes_read[step - 1]), int(found.bytes_written[step - 1]))


def _row(found: flash_tiles.Result, params: flash_tiles.Params, step: int, mode: theme.Mode) -> None:
    """What the followed row holds after the step that is drawn, and the arithmetic of it."""
    place = int(np.searchsorted(found.row_steps, step, side="right")) - 1
    place = min(place, len(found.row_steps) - 1)
    with st.container(horizontal=True, key=f"{PREFIX}_row_state"):
        held = place >= 0 and math.isfinite(float(found.maximum[place]))
        st.metric(f"Row {params.row}: maximum m", _number(float(found.maximum[place])) if held else "−∞")
        st.metric("Sum l", _number(float(found.sum[place])) if held else "0")
    st.markdown(arithmetic(found, params, step, place))
    running = found.output[place] / found.sum[place] if held and found.sum[place] > 0 else None
    all_outputs = np.divide(
        found.output, found.sum[:, None], out=np.zeros_like(found.output), where=found.sum[:, None] > 0
    )
    reach = np.concatenate([all_outputs.ravel(), found.row_reference, [0.0]])
    fig = charts.output(running, found.row_reference, (float(reach.min()), float(reach.max())), mode=mode)
    key = f"{PREFIX}_row_output"
    chart.figure(fig, key=key, sentence=output_sentence(found, params, running), height=_OUTPUT_HEIGHT)


def arithmetic(found: flash_tiles.Result, params: flash_tiles.Params, step: int, place: int) -> str:
    """The last update of the row with its real numbers, as Markdown."""
    if place < 0:
        return f"Row {params.row} has not been read yet: m = −∞, l = 0, O = 0."
    now = int(found.row_steps[place]) == step
    when = "Now" if now else f"Last at step {int(found.row_steps[place]) + 1}"
    if found.skipped[found.row_steps[place]]:
        return f"**{when}:** the tile is skipped, and m, l and O stay as they are."
    scores = found.row_scores[place]
    scores = scores[np.isfinite(scores)]
    before, after = float(found.maximum_before[place]), float(found.maximum[place])
    rescale, added = float(found.rescale[place]), float(np.nansum(found.row_probabilities[place]))
    shown = ", ".join(_number(float(score)) for score in scores[:_SHOWN_SCORES])
    more = f", … ({len(scores)} in all)" if len(scores) > _SHOWN_SCORES else ""
    if not len(scores):
        return f"**{when}:** the mask hides all of the tile from row {params.row}: m, l and O stay as they are."
    old = _number(before)
    return "\n".join(
        [
            f"**{when}:** the tile brings the scores {shown}{more}.",
            "",
            f"- m = max({old}, {_number(float(scores.max()))}) = **{_number(after)}**",
            f"- factor on what is held: e^(m before − m) = e^({old} − {_signed(after)}) = **{_number(rescale)}**",
            f"- l = {_number(rescale)} × {_number(float(found.sum_before[place]))} + {_number(added)} = "
            f"**{_number(float(found.sum[place]))}**",
            f"- O = {_number(rescale)} × O + Σ e^(score − m) · v, a sum over {len(scores)} values v",
        ]
    )


def output_sentence(found: flash_tiles.Result, params: flash_tiles.Params, running: np.ndarray | None) -> str:
    """How far the row's output is from the end."""
    if running is None:
        return f"The output of row {params.row}, O / l: there is none yet. Bars will grow to the short lines."
    apart = float(np.abs(running - found.row_reference).max())
    if apart < _ROUNDING:
        return (
            f"The output of row {params.row}, O / l, is standard attention's, to the {number_in_words(apart)} by which "
            "float32 rounds: nothing was approximated."
        )
    return (
        f"The output of row {params.row}, O / l, is a correct average over the keys seen so far; from that over all "
        f"keys it is at most {apart:.2g} away."
    )


def _block(block: int, size: int, length: int) -> str:
    first, last = block * size, min((block + 1) * size, length) - 1
    return str(first) if first == last else f"{first} to {last}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float) -> str:
    """A number as it stands behind a minus sign."""
    return f"({_number(value)})" if value < 0 else _number(value)
