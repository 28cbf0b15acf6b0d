"""The Sweep view: what each rank buys, every point a run of its own."""

from __future__ import annotations

import math

import pandas as pd
import streamlit as st

from engine.experiments import lora, lora_sweep
from ui import chart, export, run, theme
from ui.charts import lora as charts
from ui.lora.settings import FULL, PREFIX, Settings, count
from ui.prose import plain

_RUN = f"{PREFIX}_sweep_run"
_STARTED = f"_{PREFIX}_sweep_started"
_HEIGHT = 560
_NEARLY = 0.95  # of the best accuracy


def sweep(given: Settings) -> None:
    """The button that starts the sweep, and its points as they come."""
    wanted = _wanted(given.params)
    started, running = st.session_state.get(_STARTED), run.is_running(_RUN)
    said, button = st.columns([3, 1], vertical_alignment="center")
    ranks = ", ".join(str(rank) for rank in wanted.ranks)
    scale = "s = α / √rank" if wanted.method == "rank-stabilized LoRA" else "s = α / rank"
    said.markdown(
        f"The same training with rank {ranks} and with full fine-tuning: {_count(wanted)} runs of {wanted.steps} "
        f"steps, one after the other, each drawn as soon as it is done. α stays {wanted.alpha:g}, so that the update's "
        f"scale {scale} falls as the rank grows, and the adapters' learning rate stays {wanted.rate:g}."
    )
    button.button(
        "Running…" if running else "Run the sweep",
        key=f"_{PREFIX}_sweep",
        type="primary",
        icon=f":material/{'hourglass_top' if running else 'stacked_line_chart'}:",
        width="stretch",
        disabled=running,
        on_click=_start,
        args=(wanted,),
    )
    if given.params.facts.strip():
        st.caption("The sweep learns the invented town: your own facts have no paraphrases to be tested on.")
    if started is None:
        st.info(
            "Before you run it: what does each rank buy? Full fine-tuning trains "
            f"{_times(wanted)} times as many numbers as rank {min(wanted.ranks)}.",
            icon=":material/lightbulb:",
        )
        return
    if started != wanted:
        st.caption("What you see is a sweep with other settings.")

    def draw(found: lora_sweep.Result, params: lora_sweep.Params) -> None:
        _draw(found, params, None if given.params.method == FULL else given.params.rank)

    run.watch("lora_sweep", started, draw, key=_RUN, height=_HEIGHT)


def _wanted(params: lora.Params) -> lora_sweep.Params:
    """The sweep with the settings of the page; full fine-tuning has no rank, so that the sweep is LoRA's."""
    shared = params.model_dump(include=set(lora.TuningParams.model_fields))
    if params.method == FULL:
        shared["method"] = "LoRA"
    return lora_sweep.Params(**shared)


def _count(params: lora_sweep.Params) -> int:
    return len(params.ranks) + params.with_full


def _cost(params: lora_sweep.Params, rank: int | None) -> lora.Cost:
    shared = params.model_dump(include=set(lora.TuningParams.model_fields))
    if rank is None:
        return lora.Params(**shared | {"method": FULL}).predict()
    return lora.Params(**shared, rank=rank).predict()


def _times(params: lora_sweep.Params) -> str:
    return f"{_cost(params, None).trainable / _cost(params, min(params.ranks)).trainable:,.0f}"


def _start(params: lora_sweep.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask("lora_sweep", params, key=_RUN)


def span(params: lora_sweep.Params) -> tuple[float, float]:
    """What the horizontal axis shows: from the smallest rank to the largest or, where that is trained too, all."""
    ranks = [min(params.ranks), max(params.ranks)] + ([None] if params.with_full else [])
    numbers = [_cost(params, rank).trainable for rank in ranks]
    return min(numbers), max(*numbers, 2 * min(numbers))


def points(found: lora_sweep.Result) -> list[charts.SweepPoint]:
    """The runs as they are drawn; one that diverged has no loss."""
    return [
        charts.SweepPoint(
            label=("full" if point.rank is None else str(point.rank)) + (", diverged" if point.diverged else ""),
            trainable=point.trainable,
            loss=math.nan if point.diverged else point.final_loss,
            held_out_accuracy=point.held_out_accuracy,
            accuracy=point.accuracy,
            rank=point.rank,
            settings=("" if point.scaling is None else f"s = {point.scaling:.3g}, ")
            + f"learning rate {point.learning_rate:g}",
        )
        for point in found.points
    ]


def sweep_sentence(found: lora_sweep.Result) -> str:
    """What the ranks bought, in words."""
    done = [point for point in found.points if not point.diverged]
    lost = [_name(point) for point in found.points if point.diverged]
    told = f" {', '.join(lost).capitalize()} diverged." if lost else ""
    if not done:
        return f"The first run is not done yet.{told}"
    best = max(done, key=lambda point: point.held_out_accuracy)
    enough = min(
        (point for point in done if point.held_out_accuracy >= _NEARLY * best.held_out_accuracy),
        key=lambda point: point.trainable,
    )
    words = (
        f"{'Best so far' if found.ended == 'running' else 'Best'} on paraphrases: {_name(best)} with "
        f"{best.held_out_accuracy:.0%} and {count(best.trainable)} numbers trained."
    )
    if enough is not best:
        words += (
            f" {_name(enough).capitalize()} gets {enough.held_out_accuracy:.0%} with "
            f"{best.trainable / enough.trainable:,.0f} times fewer."
        )
    return f"{words}{told} {_caveat(done)} The labels in the picture are ranks."


def _caveat(done: list[lora_sweep.Point]) -> str:
    """What changes beside the rank, and what does not."""
    adapters = [point for point in done if point.rank is not None]
    if not adapters:
        return "It is one seed."
    scales, rates = [point.scaling for point in adapters], {f"{point.learning_rate:g}" for point in done}
    rate = f"{adapters[0].learning_rate:g}"
    full = "".join(f" (full fine-tuning: {other})" for other in rates - {rate})
    changes = f"with the rank changes s from {max(scales):.3g} to {min(scales):.3g}, " if len(set(scales)) > 1 else ""
    return f"It is one seed, and {changes}at one learning rate, {rate}{full}."


def _name(point: lora_sweep.Point) -> str:
    return "full fine-tuning" if point.rank is None else f"rank {point.rank}"


def _draw(found: lora_sweep.Result, params: lora_sweep.Params, rank: int | None) -> None:
    if found.ended == "running":
        st.caption(f"{len(found.points)} of {found.total} runs are done.")
    else:
        st.caption(
            plain(
                f"{found.ending} {sum(point.seconds for point in found.points):.0f} s on {found.device}, torch "
                f"{found.versions['torch']}."
            )
        )
    key = f"{PREFIX}_sweep"
    fig = charts.sweep(points(found), rank, span(params), mode=theme.mode())
    chart.figure(fig, key=key, sentence=sweep_sentence(found), height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="lora-sweep",
        experiment="lora_sweep",
        params=params,
        data=lambda: pd.DataFrame([vars(point) for point in found.points]).assign(alpha=params.alpha, seed=params.seed),
    )
