"""The targets page: one button, the table that fills as it is measured, and the report to take home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from engine.errors import InputError
from engine.experiments import _targets_report
from engine.experiments._targets_recorded import recorded_figures
from engine.experiments.targets import GROUPS, Params, RecordedFigure, Result, Row, describe_recorded, unmeasured
from ui import evidence, run, theme
from ui.measure_button import measure_button
from ui.prose import plain
from ui.targets.table import table

QUESTION = "Does the software meet its own targets?"

_RUN = "targets"


def page() -> None:
    """All of it."""
    st.title(QUESTION, anchor=False)
    try:
        rows = unmeasured()
    except InputError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    recorded = recorded_figures()
    st.markdown(
        "Every figure that the software promises, with its bound. One button measures them on this machine, one after "
        "the other, so that none disturbs another; LoRA takes by far the longest, since its fine-tuning is real. "
        "The same without a browser: `python -m engine targets`."
    )
    _body(recorded)
    with st.expander("What each target measures", icon=":material/help:"):
        st.markdown("\n".join(_explanations(rows)))


@st.fragment
def _body(recorded: Mapping[str, RecordedFigure]) -> None:
    info = Params.model_fields["groups"]
    chosen = st.pills(
        info.title,
        list(GROUPS),
        format_func=GROUPS.get,
        selection_mode="multi",
        default=list(info.default),
        key="targets_groups",
        bind="query-params",
    )
    if not chosen:
        st.warning("Choose at least one group of targets.", icon=":material/checklist:")
        return
    params = Params(groups=tuple(group for group in GROUPS if group in chosen))
    rows = unmeasured(params.groups)

    def before() -> None:
        st.markdown(f"**{plain(describe_recorded(rows, recorded))}**")
        st.html(table(rows, recorded, mode=theme.mode()))

    started = measure_button("targets", params, key=_RUN)
    if started is None:
        before()
    else:
        run.watch("targets", started, lambda found, _: _show(found, recorded), key=_RUN, before=before)


def _show(found: Result, recorded: Mapping[str, RecordedFigure]) -> None:
    """The rows so far, or all of them with the report."""
    st.markdown(f"**{plain(found.sentence)}**")
    st.html(table(found.rows, recorded, mode=theme.mode()))
    if found.ended == "running":
        return
    st.caption(plain(f"{found.ending} {found.seconds:.0f} s, {found.date}."))
    evidence.provenance(found)
    name = f"targets-{found.date}"
    with st.container(horizontal=True):
        st.download_button(
            "Report",
            lambda: _targets_report.report(found, recorded),
            f"{name}.md",
            "text/markdown",
            key=f"_{_RUN}_report",
            icon=":material/download:",
            on_click="ignore",
        )
        st.download_button(
            "Figures as CSV",
            lambda: frame(found.rows, recorded).to_csv(index=False),
            f"{name}.csv",
            "text/csv",
            key=f"_{_RUN}_csv",
            icon=":material/download:",
            on_click="ignore",
        )


def frame(rows: Sequence[Row], recorded: Mapping[str, RecordedFigure]) -> pd.DataFrame:
    """The table in numbers, a row a target."""
    return pd.DataFrame([_numbers(row, recorded.get(row.target.key)) for row in rows])


def _numbers(row: Row, on_a_gpu: RecordedFigure | None) -> dict[str, str | float | None]:
    figure, bound = row.figure, row.target.bound
    there = on_a_gpu.figure if on_a_gpu else None
    return {
        "key": row.target.key,
        "target": row.target.name,
        "direction": bound.direction,
        "bound": bound.value,
        "unit": bound.unit,
        "measured": figure and figure.value,
        "low": figure and figure.low,
        "high": figure and figure.high,
        "runs": figure and figure.runs,
        "verdict": row.verdict,
        "note": row.note,
        "recorded": there and there.value,
        "recorded_on": on_a_gpu.device if on_a_gpu else None,
        "recorded_date": on_a_gpu.date if on_a_gpu else None,
    }


def _explanations(rows: Sequence[Row]) -> list[str]:
    """A line for each kind of measurement, under the name of its group."""
    said: dict[tuple[str, str], None] = {(row.target.group, row.target.how): None for row in rows}
    return [f"- **{GROUPS[group]}** {plain(how)}" for group, how in said]
