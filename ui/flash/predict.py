"""The Predict tab of the FlashAttention lab: say what twice the length costs and what tiles save, then see."""

from __future__ import annotations

import math

import streamlit as st

from engine.experiments import _flash_cost, flash_speed
from engine.experiments._flash import bytes_in_words
from ui import chart, run, theme
from ui import guess as guessing
from ui.charts import flash as charts
from ui.flash.settings import PREFIX, Settings, has_gpu
from ui.flash.speed import TIME, panels
from ui.prose import plain

_RUN = f"{PREFIX}_guess_run"
_STARTED = f"_{PREFIX}_guess_started"
_GUESS = f"{PREFIX}_speedup_guess"
_FACTORS = ("× 1", "× 2", "× 4", "× 8")
_SPEEDUPS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0)
_HEIGHT = 640
_WHY = {
    "standard": "It holds the T × T matrix of every head, which becomes four times as large; what else it holds, the "
    "output above all, only twice.",
    "flash": "Beyond queries, keys and values it holds the output, and a number or two a row: both grow as T does.",
}


def predict(given: Settings) -> None:
    """Two guesses: memory at twice the length, and how many times faster."""
    _guess_memory(given.params)
    st.divider()
    _guess_speedup(given.params)


def _guess_memory(params: flash_speed.Params) -> None:
    lines = {line.name: line for line in _flash_cost.predict(_doubled(params), on_gpu=has_gpu())}
    length = int(lines["standard"].lengths[-1])
    st.markdown(
        plain(
            f"{params.heads} heads of {params.head_dim}, {params.dtype}, {_mask(params)}: from T = {length // 2:,} to "
            f"T = {length:,}, with as many sequences."
        )
    )
    for name, question in (
        ("standard", "**By how much does the memory of standard attention grow?**"),
        ("flash", "**And in tiles?**"),
    ):
        st.markdown(question)
        guess = st.segmented_control(
            f"Your guess, {name}",
            _FACTORS,
            key=f"{PREFIX}_growth_{name}",
            bind="query-params",
            label_visibility="collapsed",
        )
        if guess is not None:
            before, after = (float(size) for size in lines[name].peak_bytes[-2:])
            _judge_growth(guess, before, after, _WHY[name])


def _doubled(params: flash_speed.Params) -> flash_speed.Params:
    """The settings with lengths up to one that has another one below it, and a batch that stays."""
    return params.model_copy(update={"tokens": "fixed batch"})


def _mask(params: flash_speed.Params) -> str:
    return "causal" if params.causal else "every token sees every token"


def _judge_growth(guess: str, before: float, after: float, why: str) -> None:
    factor = after / before
    nearest = min(_FACTORS, key=lambda one: abs(math.log(_value(one) / factor)))
    words = f"it grows from {bytes_in_words(before)} to {bytes_in_words(after)}, × {factor:.1f}"
    if guess == nearest:
        st.success(plain(f"Right: {words}. {why}"), icon=":material/check_circle:")
    else:
        st.info(plain(f"Not {guess}: {words}. {why}"), icon=":material/lightbulb:")


def _value(factor: str) -> float:
    return float(factor.removeprefix("× "))


def _guess_speedup(params: flash_speed.Params) -> None:
    device = "GPU" if has_gpu() else "processor"
    st.markdown(
        plain(
            f"How many times faster than standard attention is the fastest other one, at T = {params.max_length:,}?"
        ).join(("**", "**"))
        + f" On this {device}, {params.direction}, {params.dtype}."
    )
    guess = st.select_slider(
        "Your guess",
        _SPEEDUPS,
        1.0,
        format_func=lambda factor: f"× {factor:g}",
        key=_GUESS,
        bind="query-params",
        on_change=guessing.keep,
        args=(_GUESS,),
        disabled=run.is_running(_RUN),
    )
    started = st.session_state.get(_STARTED)
    st.button(
        "Measure it" if started is None else "Measure again",
        key=f"_{PREFIX}_guess_start",
        icon=":material/play_arrow:",
        disabled=guess is None or run.is_running(_RUN),
        on_click=_start,
        args=(params,),
    )
    if started is None:
        return
    if started != params:
        st.caption("The settings have changed since this was measured: guess again, then measure again.")
    run.watch("flash_speed", started, _verdict, key=_RUN, height=_HEIGHT)


def _start(params: flash_speed.Params) -> None:
    guessing.settle(_GUESS)
    st.session_state[_STARTED] = params
    run.ask("flash_speed", params, key=_RUN)


def speedup(found: flash_speed.Result) -> tuple[int, str, float] | None:
    """Length, name and factor of the fastest other backend at the longest sequence that standard attention ran at."""
    times = {(point.backend, point.length): point for point in found.points}
    lengths = [length for name, length in times if name == "standard"]
    others = [
        point for point in found.points if point.backend != "standard" and point.length == max(lengths, default=0)
    ]
    if not others:
        return None
    best = min(others, key=lambda point: point.median_ms)
    return best.length, best.label, times["standard", best.length].median_ms / best.median_ms


def _verdict(found: flash_speed.Result, _: flash_speed.Params) -> None:
    answer, guess = speedup(found), guessing.settled(_GUESS)
    if found.ended == "finished" and answer is not None and guess is not None:
        length, label, factor = answer
        nearest = min(_SPEEDUPS, key=lambda one: abs(math.log(one / factor)))
        words = f"at T = {length:,} {label} is {factor:.2f} times as fast as standard attention"
        if guess == nearest:
            st.success(plain(f"Well guessed: {words}."), icon=":material/check_circle:")
        else:
            st.info(plain(f"Not × {guess:g}: {words}."), icon=":material/lightbulb:")
    elif found.ended != "running":
        st.caption(plain(found.ending))
    fig = charts.over_length(panels(found, TIME), mode=theme.mode())
    chart.figure(fig, key=f"{PREFIX}_guess_chart", sentence=found.sentence, height=_HEIGHT)
