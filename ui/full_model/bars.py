"""The Bars view: one memory bar and one speed bar that every switch moves."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import full_model
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments.full_model import OFF, PARTS, Prediction
from engine.experiments.full_model_step import Step
from ui import chart, compare, evidence, export, run, theme
from ui.charts import full_model as charts
from ui.charts.full_model import Memory, Speed, digits
from ui.charts.memory import amount
from ui.flash.settings import has_gpu
from ui.full_model import measuring
from ui.full_model.sentences import memory_sentence, named, speed_sentence, spread, unmeasured_sentence
from ui.full_model.settings import PREFIX, Settings
from ui.prose import plain

Row = tuple[Prediction, Step | None]
"""What is predicted of a combination of switches, and what was measured of it, if anything was."""


def bars(given: Settings) -> None:
    """Both bars, what each switch moves, and the numbers behind them."""
    params = given.params
    on_cuda = has_gpu()
    found = full_model.compute(params, on_cuda=on_cuda)
    measuring.follow()  # first, for it may bring the step
    step = measuring.measured(params)
    if step is None and run.problem(measuring.ONE) is not None:
        st.caption(plain(unmeasured_sentence(params, found.chosen)))
    pictures, below = st.container(), st.container()
    with below:
        _buttons(params, step)
        pinned = compare.pin(full_model.Params(**params.model_dump()), prefix=PREFIX)
    rows = _rows(params, found, step)
    if pinned is not None:
        rows["A, pinned"] = full_model.predict(pinned, on_cuda=on_cuda), measuring.known(pinned)
    with pictures:
        _draw(params, found, rows)
    st.dataframe(_table(rows), hide_index=True, width="stretch")
    if step is not None:
        evidence.evidence(step.evidence)
        st.caption(plain(_how(step)))
    with st.expander("What each part is, and how much of it", icon=":material/help:"):
        st.table(_parts(found.chosen), border="horizontal")
        st.table(_numbers(found.chosen), border="horizontal")


def _draw(params: SwitchParams, found: full_model.Result, rows: dict[str, Row]) -> None:
    """Both figures, side by side where there is room."""
    left, right = st.columns(2)
    (_, step), *_ = rows.values()
    flipped = {name: measuring.known(params, **flip) for name, flip in measuring.flips(params).items()}
    off = measuring.known(params, **dict.fromkeys(SWITCHES, False)) if OFF in rows else None
    asked = full_model.Params(**params.model_dump())
    memories = charts.memory(
        [Memory(label, made.memory.peak.parts, took and took.peak_bytes) for label, (made, took) in rows.items()],
        mode=theme.mode(),
    )
    speeds = charts.speed([_speed(label, took) for label, (_, took) in rows.items()], mode=theme.mode())
    pictures = {
        "memory": (left, memories, memory_sentence(found, step)),
        "speed": (right, speeds, speed_sentence(step, flipped, off)),
    }
    for name, (place, fig, sentence) in pictures.items():
        key = f"{PREFIX}_{name}"
        with place:
            chart.figure(fig, key=key, sentence=sentence)
            export.export(
                fig,
                key=key,
                name=f"whole-model-{name}",
                experiment="full_model",
                params=asked,
                data=lambda: _data(rows),
            )


def _rows(params: SwitchParams, found: full_model.Result, step: Step | None) -> dict[str, Row]:
    """The settings, each switch flipped, and nothing on: what is predicted, and what was measured if anything was."""
    rows = {f"As set: {named(found.chosen.on)}": (found.chosen, step)}
    for name, flip in measuring.flips(params).items():
        word = "with" if flip[name] else "without"
        rows[f"{word} {SWITCHES[name]}"] = found.flipped[name], measuring.known(params, **flip)
    if len(found.chosen.on) > 1:  # else one of the others is the same
        rows[OFF] = found.off, measuring.known(params, **dict.fromkeys(SWITCHES, False))
    return rows


def _speed(label: str, step: Step | None) -> Speed:
    if step is None:
        return Speed(label)
    return Speed(label, step.evidence.median_ms, *spread(step))


def _buttons(params: SwitchParams, step: Step | None) -> None:
    busy = run.is_running(measuring.ALL)
    with st.container(horizontal=True):
        st.button(
            "Measuring…" if busy else "Measure every switch",
            key=f"_{PREFIX}_measure_all",
            icon=":material/hourglass_top:" if busy else ":material/speed:",
            help="A step with each switch flipped alone, one after the other, for the thin bars on the right.",
            disabled=busy,
            on_click=measuring.measure_switches,
            args=(params,),
        )
        st.button(
            "Measure again",
            key=f"_{PREFIX}_measure_again",
            icon=":material/refresh:",
            disabled=step is None,
            on_click=measuring.measure_again,
            args=(params,),
        )


def _table(rows: dict[str, Row]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "combination": label.partition(":")[0],
                "numbers": f"{made.total.total:,}",
                "learn": f"{made.total.learning:,}",
                "model": amount(sum(made.model_bytes.values())),
                "training FLOPs/token": f"{made.flops.step:,.0f}",
                "step": amount(made.memory.peak.total),
                "measured": "—" if took is None else amount(took.peak_bytes),
                "ms": "—" if took is None else digits(took.evidence.median_ms),
                "tokens/s": "—" if took is None else f"{took.tokens_per_second:,.0f}",
            }
            for label, (made, took) in rows.items()
        ]
    )


def _data(rows: dict[str, Row]) -> pd.DataFrame:
    """Every number behind the figures."""
    return pd.DataFrame(
        [
            {
                "combination": label,
                **{f"numbers, {part}": count.total for part, count in made.parameters.items()},
                "learning": made.total.learning,
                **{f"model bytes, {part}": size for part, size in made.model_bytes.items()},
                "flops_forward": made.flops.forward,
                "flops_step": made.flops.step,
                **{f"step bytes, {part}": made.memory.peak.parts.get(part, 0) for part in PARTS},
                "predicted_bytes": made.memory.peak.total,
                "measured_bytes": None if took is None else took.peak_bytes,
                "median_ms": None if took is None else took.evidence.median_ms,
            }
            for label, (made, took) in rows.items()
        ]
    )


def _parts(made: Prediction) -> pd.DataFrame:
    """What is held at the fullest moment."""
    held = made.memory.peak.parts
    return pd.DataFrame(
        {part: {"what it is": what, "bytes": f"{held[part]:,}"} for part, what in PARTS.items() if part in held}
    ).T


def _numbers(made: Prediction) -> pd.DataFrame:
    return pd.DataFrame(
        {
            part: {"numbers": f"{count.total:,}", "learn": f"{count.learning:,}"}
            for part, count in made.parameters.items()
            if count.total
        }
    ).T


def _how(step: Step) -> str:
    return (
        f"Attention is computed by {step.attention}. A training has FlashAttention compare its kernels once, after 32 "
        "calls of a kind; never within a measurement, so that what is timed here is the kernel that serves until then, "
        f"or the fastest if it is known already. The loss of the first step, on random tokens, is {step.loss:.2f} nats "
        f"a token; building, all steps and weighing took {step.seconds:.1f} s."
    )
