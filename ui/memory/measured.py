"""The Measured view: a plan carried out on this device, what was predicted beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import streamlit as st

from engine.experiments import _memory, memory, memory_measure
from engine.experiments._memory import Plan, budget
from ui import chart, export, run, theme
from ui.charts import memory as charts
from ui.charts.memory import Pair, amount
from ui.memory.settings import PREFIX
from ui.prose import plain

_HEIGHT = 520
_RUN = f"{PREFIX}_measure"
_SHAPE = f"{PREFIX}_build"
_STARTED = f"_{PREFIX}_measured"
_NEAREST = 3  # rows of the recording beside the worst and the best
_WEIGHTIEST = ("what is trained", "format of the weights", "checkpointing", "optimizer")
"""Settings that have to be equal before sizes are looked at; the first ones count more than all after them."""


def measured(params: memory.Params) -> None:
    """A button that builds and weighs; below it what was recorded on a GPU."""
    left, right = st.columns([2, 1], vertical_alignment="bottom")
    shape = left.selectbox(
        "Shape to build here",
        list(_memory.SHAPES),
        key=_SHAPE,
        bind="query-params",
        help="Built with random weights and trained for a few steps; all other settings are those beside this.",
    )
    asked = memory_measure.Params(**(params.model_dump(exclude={"card"}) | {"shape": shape}))
    running = run.is_running(_RUN)
    right.button(
        "Measuring…" if running else "Build and measure",
        key=f"_{PREFIX}_measure_button",
        type="primary",
        icon=":material/scale:",
        width="stretch",
        disabled=running,
        on_click=_start,
        args=(asked,),
    )
    predicted = budget(asked.plan())
    st.caption(
        plain(
            f"{_memory.describe(asked.plan())}: {amount(predicted.peak.total)} are predicted for a GPU. Four steps are "
            "taken; what does not fit this device is refused."
        )
    )
    started = st.session_state.get(_STARTED)
    if started is not None:
        found = run.run("memory_measure", started, key=_RUN)
        if found is not None:
            _show(found, run.params_of(_RUN) or started)
    st.divider()
    _recorded(params)


def _start(params: memory_measure.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask_again(_RUN)


def _show(found: memory_measure.Result, params: memory_measure.Params) -> None:
    rows = [row for row in found.rows if row.predicted or row.measured]
    fig = charts.pairs([Pair(row.name, row.predicted, row.measured) for row in rows], mode=theme.mode())
    key = f"{PREFIX}_pairs"
    st.markdown(f"**{plain(found.plan)}**")
    chart.figure(fig, key=key, sentence=found.sentence, height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="memory-measured",
        experiment="memory_measure",
        params=params,
        data=lambda: pd.DataFrame(
            [{"part": row.name, "predicted": row.predicted, "measured": row.measured} for row in found.rows]
        ),
    )
    st.table(_errors(rows), border="horizontal")
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    st.caption(
        plain(
            f"Measured on {found.device}: {found.how}. The peak was predicted for {found.when}. "
            f"{found.seconds:.0f} s in all, loss {found.loss:.2f}; {versions}."
        )
    )


def _errors(rows: list[memory_measure.Compared]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            row.name: {
                "predicted": amount(row.predicted),
                "measured": "—" if row.measured is None else amount(row.measured),
                "error": "—" if row.error is None else _percent(row.error),
            }
            for row in rows
        }
    ).T


def _recorded(params: memory.Params) -> None:
    """The same on a GPU, as it was recorded: the model of 1.1 billion parameters."""
    st.markdown("**On an H200, recorded**")
    found = _memory.recorded()
    if found is None or not found.rows:
        st.info("The recording is not there: engine/recorded is missing from this installation.")
        return
    rows = list(found.rows)
    shown = _telling(rows, params)
    st.dataframe(_table(shown), hide_index=True, width="stretch")
    with st.expander(f"All {len(rows)} plans", icon=":material/table_rows:"):
        st.dataframe(_table(dict.fromkeys(rows, "")).drop(columns="why"), hide_index=True, width="stretch")
    worst = next(iter(shown))
    st.caption(
        plain(
            "A Llama-shaped model of 1.1 billion parameters in bfloat16, or with frozen weights in 4 or 8 bits where "
            f"the plan says so. The prediction lies {100 * abs(worst.error):.2f} % off at worst, for {worst.row} at "
            f"{worst.plan.batch} × {worst.plan.length:,}. {found.provenance[0].upper()}{found.provenance[1:]}. On a "
            "GPU of your own, python -m tests.benchmarks.memory_prediction measures it again."
        )
    )


def _telling(rows: list[_memory.RecordedRow], params: memory.Params) -> dict[_memory.RecordedRow, str]:
    """The rows to look at first, and why: the worst, the best, and those nearest to the chosen plan."""
    ranked = sorted(rows, key=lambda row: abs(row.error), reverse=True)
    telling = {ranked[0]: "most off", ranked[-1]: "least off"}
    plan = params.plan()
    for row in sorted(rows, key=lambda row: _apart(row.plan, plan))[:_NEAREST]:
        others = _memory.differences(row.plan, plan)
        near = "nearest to your plan, but for " + ", ".join(others) if others else "your plan"
        telling[row] = f"{telling[row]}; {near}" if row in telling else near
    return telling


def _apart(plan: Plan, chosen: Plan) -> tuple[int, float, int]:
    """How far a recorded plan is from the chosen one: in kind first, then in batch and length, then in all else."""
    differ = _memory.differences(plan, chosen)
    kind = sum(2**place for place, name in enumerate(reversed(_WEIGHTIEST)) if name in differ)
    sizes = math.log(chosen.batch / plan.batch), math.log(chosen.length / plan.length)
    return kind, math.hypot(*sizes), len(differ)


def _table(rows: Mapping[_memory.RecordedRow, str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "plan": row.row,
                "batch × tokens": f"{row.plan.batch} × {row.plan.length:,}",
                "error": _percent(row.error),
                "predicted": amount(row.predicted),
                "measured": amount(row.measured),
                "why": why,
            }
            for row, why in rows.items()
        ]
    )


def _percent(share: float) -> str:
    return f"{100 * share:+.2f}\u00a0%".replace("-", "−")
