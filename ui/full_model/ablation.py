"""The Ablation view: each technique on and off, a memory bar and a speed bar for each, every row a real run."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import full_model_ablation
from engine.experiments._full_model import SWITCHES
from engine.experiments._full_model_recorded import recorded_ablation
from ui import chart, controls, export, run, theme
from ui.charts import full_model_runs as charts
from ui.charts.memory import amount
from ui.controls import Look
from ui.evidence import provenance, written
from ui.flash.recorded import heading
from ui.full_model.recorded import size_in_words
from ui.full_model.settings import KEPT, PREFIX, Settings
from ui.lora.settings import count
from ui.measure_button import measure_button
from ui.prose import plain

RUN = f"{PREFIX}_ablation_run"
OWN = f"{PREFIX}_ablation"
_HEIGHT = charts.height(10)
_NONE = "—"


def ablation(given: Settings) -> None:
    """What will be run, the button, and the rows as they come."""
    left, right = st.columns(2, gap="medium")
    with left:
        values = KEPT.controls(
            full_model_ablation.Params,
            prefix=OWN,
            fields=["steps"],
            steps=Look(maximum=200),
        )
    with right:
        values |= KEPT.controls(full_model_ablation.Params, prefix=OWN, fields=["seeds"])
    params = controls.validated(full_model_ablation.Params, given.params.model_dump() | values)
    if params is None:
        if run.latest(RUN) is None:
            return
        params = run.params_of(RUN)
    st.markdown(plain(plan_sentence(params)))
    started = measure_button("full_model_ablation", params, key=RUN)
    if started is None:
        st.info(
            "Before you run it: which of the switches saves most memory in a training step, and which costs most time?",
            icon=":material/lightbulb:",
        )
    else:
        run.watch("full_model_ablation", started, _draw, key=RUN, height=_HEIGHT)
    if (recorded := recorded_ablation(params)) is not None:
        heading(recorded, size_in_words(recorded.params), dashed=False)
        _picture(recorded.found, recorded.params, f"{OWN}_recorded")


def plan_sentence(params: full_model_ablation.Params) -> str:
    """What will be run."""
    on = [SWITCHES[name] for name in params.switched_on()]
    kinds = ["nothing", "each alone", "all together", "all but one"][: 2 if len(on) == 1 else 3 if len(on) == 2 else 4]
    each = f" with {params.seeds} seeds" if params.seeds > 1 else ""
    return (
        f"{len(params.rows())} rows, made of what is switched on in the settings ({', '.join(on)}): "
        f"{', '.join(kinds)}. Each row is a training of {params.steps} steps{each} on the same text; the other "
        "settings hold for all rows."
    )


def bars(found: full_model_ablation.Result) -> list[charts.Row]:
    """The rows as they are drawn."""
    return [
        charts.Row(
            row.name,
            row.model_bytes,
            row.peak_bytes,
            row.tokens_per_second,
            row.tokens_per_second * row.median_ms / row.high_ms,
            row.tokens_per_second * row.median_ms / row.low_ms,
        )
        for row in found.rows
    ]


def numbers(found: full_model_ablation.Result) -> pd.DataFrame:
    """The rows in words, for the page."""
    rows = found.rows
    return pd.DataFrame(
        {
            "On": [_on_one_line(row.name) for row in rows],
            "Loss, start": [f"{sum(row.first_loss) / len(row.first_loss):.2f}" for row in rows],
            "Loss, end": [_losses(row) for row in rows],
            "ms a step": [_times(row) for row in rows],
            "Tokens/s": [f"{row.tokens_per_second:,.0f}" if row.timed else _NONE for row in rows],
            "Step's peak": [amount(row.peak_bytes) if row.peak_bytes else _NONE for row in rows],
            "Model": [amount(row.model_bytes) for row in rows],
            "Learning": [count(row.learning) for row in rows],
            "Rate": [f"{row.learning_rate:g}" for row in rows],
        }
    )


def learning_sentence(found: full_model_ablation.Result) -> str:
    """What learns in which rows."""
    rows: dict[str, list[str]] = {}
    for row in found.rows:
        rows.setdefault(", ".join(row.learns), []).append(row.name)
    told = "; ".join(f"{parts} in the rows {', '.join(names)}" for parts, names in rows.items())
    return f"What learns differs from row to row, and with it what a loss can come to: {told}."


def _losses(row: full_model_ablation.Row) -> str:
    if row.diverged:
        return "diverged"
    if len(row.last_loss) == 1:
        return f"{row.mean_loss:.2f}"
    return _on_one_line(f"{row.mean_loss:.2f} ({min(row.last_loss):.2f} to {max(row.last_loss):.2f})")


def _times(row: full_model_ablation.Row) -> str:
    if not row.timed:
        return _NONE
    median, low, high = (written(number) for number in (row.median_ms, row.low_ms, row.high_ms))
    return _on_one_line(f"{median} ({low} to {high})")


def _on_one_line(words: str) -> str:
    """On a narrow screen the table is then wider, not many lines high."""
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def table(found: full_model_ablation.Result) -> pd.DataFrame:
    """The rows as they were measured, one loss a column for each seed."""
    return pd.DataFrame(
        [
            {
                "row": row.name,
                **{name: name in row.switches for name in SWITCHES},
                **{f"first loss, seed {index}": loss for index, loss in enumerate(row.first_loss)},
                **{f"last loss, seed {index}": loss for index, loss in enumerate(row.last_loss)},
                "median ms": row.median_ms,
                "low ms": row.low_ms,
                "high ms": row.high_ms,
                "timed steps": row.timed,
                "tokens a second": row.tokens_per_second,
                "peak bytes of a step": row.peak_bytes,
                "model bytes": row.model_bytes,
                "learning parameters": row.learning,
                "what learns": ", ".join(row.learns),
                "learning rate": row.learning_rate,
            }
            for row in found.rows
        ]
    )


def _draw(found: full_model_ablation.Result, params: full_model_ablation.Params) -> None:
    if found.ended == "running":
        st.caption(f"{len(found.rows)} of {found.total} rows are done.")
    elif found.ended != "finished":
        st.info(plain(found.ending), icon=":material/info:")
    if found.rows:
        _picture(found, params, f"{OWN}_bars")


def _picture(found: full_model_ablation.Result, params: full_model_ablation.Params, key: str) -> None:
    fig = charts.ablation(bars(found), found.total, mode=theme.mode())
    chart.figure(fig, key=key, sentence=found.sentence, height=charts.height(found.total))
    export.export(
        fig,
        key=key,
        name="whole-model-ablation",
        experiment="full_model_ablation",
        params=params,
        data=lambda: table(found),
    )
    st.table(numbers(found), border="horizontal", hide_index=True)
    st.caption(
        "Losses in nats a token of text that is never learned. Milliseconds: median, and 10th to 90th percentile of "
        "the steps that were timed, of fewer than ten the fastest to the slowest. The learning rate of a row follows "
        "from what learns in it, not from the model's size."
    )
    st.caption(plain(learning_sentence(found)))
    if found.ended != "running":
        provenance(found)
