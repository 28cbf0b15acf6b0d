"""The Predict tab of the quantization lab: say what a bit is worth and at which width the model breaks, then see."""

from __future__ import annotations

import math

import streamlit as st

from engine.experiments import _quantization, quantization, quantization_model
from ui import chart, run, theme
from ui import guess as guessing
from ui.charts import quantization_rates as charts
from ui.prose import plain
from ui.quantization.model import points
from ui.quantization.sentences import decibels
from ui.quantization.settings import PREFIX, Settings, shared

_RUN = f"{PREFIX}_guess_run"
_STARTED = f"_{PREFIX}_guess_started"
_GUESS = f"{PREFIX}_break_guess"
_FEWER = f"{PREFIX}_fewer_run"
_CLOSE = 1.5  # dB
_WIDTHS = (8, 4, 3, 2)
_NEVER = "none of them"
_BROKEN = 1.5  # times the original's perplexity
_HEIGHT = 420


def predict(given: Settings) -> None:
    """Two guesses: what one bit is worth for the weights, and at how many bits the model breaks."""
    _guess_bit(given)
    st.divider()
    _guess_break(given)


def fewer(params: quantization.Params) -> quantization.Params | None:
    """The same weights with one bit less; None where the format has no choice of bits, or no fewer of them."""
    if _quantization.FORMATS[params.data_type][1] is not None or params.bits <= _quantization.MIN_BITS:
        return None
    return params.model_copy(update={"bits": params.bits - 1, "block": -1})


def _guess_bit(given: Settings) -> None:
    st.markdown("**What is a bit worth?**")
    params = given.params
    less = fewer(params)
    if less is None:
        st.caption(
            plain(
                f"{params.in_words} has no width with one bit less to guess about: choose NormalFloat or Integer with "
                f"more than {_quantization.MIN_BITS} bits."
            )
        )
        return
    found = given.found
    if found is None or given.found_params != params:
        st.caption("The weights are being quantized…")
        return
    now = found.distortion.sqnr_db
    st.markdown(
        plain(f"With {params.bits} bits these weights have a signal to noise of {decibels(now)}. With {less.bits}?")
    )
    guess = st.slider(
        "Your guess of the signal to noise",
        0.0,
        50.0,
        20.0,
        0.5,
        format="%.1f dB",
        key=f"{PREFIX}_sqnr_guess",
        bind="query-params",
    )
    if not st.toggle("Show the answer", key=f"{PREFIX}_sqnr_answer", bind="query-params"):
        return
    answer = run.run("quantization", less, key=_FEWER)
    if answer is None or run.params_of(_FEWER) != less:
        return
    measured = answer.distortion.sqnr_db
    words = f"You said {guess:.1f} dB, it is {decibels(measured)}: {worth(now, measured)}."
    if abs(guess - measured) <= _CLOSE:
        st.success(plain(f"Well guessed. {words}"), icon=":material/check_circle:")
    else:
        st.info(plain(words), icon=":material/lightbulb:")


def worth(now: float, fewer: float) -> str:
    """What a bit is worth that takes the signal to noise from `fewer` to `now`, in dB, in words."""
    if math.isinf(fewer):
        return "these weights are held exactly without that bit" + (" as well as with it" if math.isinf(now) else "")
    if math.isinf(now):
        return "with that bit they are held exactly"
    return (
        f"the bit was worth {decibels(now - fewer)}. At the bound for Gaussian weights each bit is worth "
        f"{20 * math.log10(2):.1f} dB"
    )


def breaks_at(found: quantization_model.Result) -> int | None:
    """The most bits at which the perplexity is 1.5 times the original's or more; None if at none."""
    broken = [point.bits for point in found.points if not point.perplexity < _BROKEN * found.original.perplexity]
    return max(broken, default=None)


def _guess_break(given: Settings) -> None:
    params = given.params
    data_type = params.data_type if params.data_type in ("Integer", "NormalFloat") else "NormalFloat"
    st.markdown(
        f"**When does it break?** All linear layers of {plain(params.model)} are rounded to {data_type}, "
        f"{plain(_grouping(params))}. At which width does its perplexity first reach {_BROKEN:g} times what it was?"
    )
    guess = st.segmented_control(
        "Your guess of the width",
        [*map(str, _WIDTHS), _NEVER],
        format_func=lambda width: width if width == _NEVER else f"{width} bits",
        key=_GUESS,
        bind="query-params",
        label_visibility="collapsed",
        on_change=guessing.keep,
        args=(_GUESS,),
    )
    wanted = quantization_model.Params(
        **shared(quantization_model.Params, params), methods=("rounding",), data_types=(data_type,), widths=_WIDTHS
    )
    started = st.session_state.get(_STARTED)
    st.button(
        "Measure it" if started is None else "Measure again",
        key=f"_{PREFIX}_guess_start",
        icon=":material/play_arrow:",
        disabled=guess is None or run.is_running(_RUN),
        help="Guess first." if guess is None else None,
        on_click=_start,
        args=(wanted,),
    )
    if started is None:
        return
    if started != wanted:
        st.caption("The settings have changed since this was measured: guess again, then measure again.")

    def draw(found: quantization_model.Result, measured: quantization_model.Params) -> None:
        _verdict(found, measured, guessing.settled(_GUESS))

    run.watch("quantization_model", started, draw, key=_RUN, height=_HEIGHT)


def _start(params: quantization_model.Params) -> None:
    guessing.settle(_GUESS)
    st.session_state[_STARTED] = params
    run.ask("quantization_model", params, key=_RUN)


def _grouping(params: quantization.Params) -> str:
    return f"one scale per block of {params.block_size}" if params.scale == "per block" else f"one scale {params.scale}"


def _verdict(found: quantization_model.Result, params: quantization_model.Params, guess: str | None) -> None:
    if found.original is not None and not math.isfinite(found.original.perplexity):
        st.caption("The model has no finite perplexity as it is, so that there is nothing to break.")
    elif found.ended == "finished" and guess is not None and found.original is not None:
        width = breaks_at(found)
        answer = _NEVER if width is None else str(width)
        where = "at none of these widths" if width is None else f"at {width} bits"
        if guess == answer:
            st.success(plain(f"Right: it breaks {where}."), icon=":material/check_circle:")
        else:
            said = "none of them" if guess == _NEVER else f"{guess} bits"
            st.info(plain(f"You said {said}; it breaks {where}."), icon=":material/lightbulb:")
    elif found.ended != "running" and found.ended != "finished":
        st.caption(plain(found.ending))
    fig = charts.perplexities(
        points(found),
        found.original.perplexity if found.original else None,
        (min(params.widths), max(params.widths) + 1),
        mode=theme.mode(),
    )
    chart.figure(fig, key=f"{PREFIX}_guess_chart", sentence=found.sentence, height=_HEIGHT)
