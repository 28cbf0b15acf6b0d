"""The Experts view: what each expert has become, and which task breaks without it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import moe_lora
from ui import chart, clicks, export, run, theme
from ui.charts import moe_lora as charts
from ui.lora import spectrum
from ui.lora.inside import grid
from ui.lora.spectrum import label, place
from ui.moe_lora.settings import PREFIX, RUN, Settings
from ui.moe_lora.training import MATRIX, first_choice
from ui.moe_lora.verdict import TOLD, told_sentence
from ui.prose import plain

_HEIGHT, _MAP_HEIGHT = 400, 400
_ALIKE = 0.1
"""A cosine below which two updates are hardly more alike than by chance."""
_BREAKS = 0.25
"""Of a task's questions: so many more wrong ones break it."""


def experts(given: Settings) -> None:
    """What was learned, once the mixture is trained."""
    if given.started is None:
        st.info(
            "There are no trained experts yet. Press **Train**: then you see how strong each one is, how alike they "
            "are, and which task breaks when one is switched off.",
            icon=":material/search:",
        )
        return
    run.watch("moe_lora", given.started, _draw, key=RUN, height=_HEIGHT)


def _draw(found: moe_lora.Result, params: moe_lora.Params) -> None:
    if found.anatomy is None and found.ended != "running":
        st.info(plain(f"{found.ending} Its experts were not looked into."), icon=":material/info:")
        return
    if found.anatomy is None:
        st.caption("The experts are looked into as soon as the mixture is trained, before the two LoRAs are.")
        return
    if found.ended in ("cancelled", "timed out", "diverged"):
        st.info(plain(found.ending), icon=":material/info:")
    st.markdown(f"**{plain(told_sentence(found))}**")
    if found.experts > 1:
        st.caption(plain(TOLD))
    _off(found, params)
    st.subheader("One projection's experts", anchor=False)
    chosen = spectrum.choose(found.projections, first_choice(found), key=MATRIX)
    left, right = st.columns(2, gap="small")
    with left:
        _spectra(found, params, chosen)
    with right:
        _similarity(found, params, chosen)
    st.subheader("Where routers tell tasks apart", anchor=False)
    _information(found, params, chosen)


def _off(found: moe_lora.Result, params: moe_lora.Params) -> None:
    """Both ways to switch experts off, side by side and on one scale."""
    anatomy = found.anatomy
    by_expert = (anatomy.off_loss - anatomy.loss).T  # (J, E)
    by_task = (anatomy.favourite_off_loss - anatomy.loss).T  # (J, J)
    limit = float(max(np.abs(by_expert).max(), np.abs(by_task).max()))
    st.subheader("What breaks when an expert is switched off", anchor=False)
    sides = (
        (
            "off",
            by_expert,
            anatomy.off_accuracy.T,
            [str(expert) for expert in range(found.experts)],
            "expert that is off",
            off_sentence(found),
        ),
        (
            "favourites",
            by_task,
            anatomy.favourite_off_accuracy.T,
            found.tasks,
            "task whose favourites are off",
            favourites_sentence(found),
        ),
    )
    for column, (name, change, right, columns, across, sentence) in zip(st.columns(2, gap="small"), sides, strict=True):
        with column:
            fig = charts.without(change, right, found.tasks, columns, across, limit, mode=theme.mode())
            key = f"{PREFIX}_{name}"
            chart.figure(fig, key=key, sentence=sentence, height=_MAP_HEIGHT)
            export.export(
                fig,
                key=key,
                name=f"moe-lora-{name}",
                experiment="moe_lora",
                params=params,
                data=lambda change=change, right=right, columns=columns: off_table(found.tasks, columns, change, right),
            )


def off_table(tasks: list[str], columns: list[str], change: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """What becomes of each task, a row each: the change of its loss, and its right answers."""
    return pd.DataFrame(
        [
            {"switched_off": column, "task": task, "loss_change": change[row, place], "right": right[row, place]}
            for row, task in enumerate(tasks)
            for place, column in enumerate(columns)
        ]
    )


def off_sentence(found: moe_lora.Result) -> str:
    """Which tasks break without which expert, in words."""
    anatomy = found.anatomy
    if found.experts == 1:
        return "There is one expert: without it the model is the one that nobody has taught anything."
    change, lost = anatomy.off_loss - anatomy.loss, anatomy.accuracy - anatomy.off_accuracy  # (E, J) both
    words = _extremes(found, change, anatomy.off_accuracy, lambda expert, _: f"expert {expert}")
    broken = [int((row >= _BREAKS).sum()) for row in lost]
    alone, several = sum(count == 1 for count in broken), sum(count > 1 for count in broken)
    words += (
        f" By answers {alone or 'none'} of the {found.experts} experts break{'s' if alone == 1 else ''} one task alone "
        f"(a quarter of its questions or more), {several or 'none'} break{'s' if several == 1 else ''} several"
    )
    return (
        f"{words}. The same number in two projections is no more than that: each has a router of its own, so that "
        "expert 0 here and there may serve different tasks."
    )


def favourites_sentence(found: moe_lora.Result) -> str:
    """Whether a task's own favourites matter to it more than those of others, in words."""
    anatomy = found.anatomy
    if found.experts == 1:
        return "With one expert it is every task's favourite."
    change = anatomy.favourite_off_loss - anatomy.loss  # (whose, J)
    tasks = len(change)
    own, others = np.diagonal(change), np.where(np.eye(tasks, dtype=bool), 0, change).sum(0) / (tasks - 1)  # (J,) both
    matter = [task for task, mine, theirs in zip(found.tasks, own, others, strict=True) if mine > max(0.0, theirs)]
    shared = [
        (anatomy.favourite[one] == anatomy.favourite[other]).mean() for one in range(tasks) for other in range(one)
    ]
    worst = _extremes(
        found,
        change,
        anatomy.favourite_off_accuracy,
        lambda whose, hit: "its own favourites" if whose == hit else f"those of {found.tasks[whose]}",
    )
    which = f" ({', '.join(matter)})" if 0 < len(matter) < tasks else ""
    return (
        f"In each projection the expert that gets most of one task's tokens is switched off. {worst} A task's own "
        f"favourites matter more to its loss than another task's do on average in {len(matter)} of {tasks} "
        f"tasks{which}, in one seed. Two tasks have the same favourite in {np.mean(shared):.0%} of the projections."
    )


def _extremes(found: moe_lora.Result, change: np.ndarray, right: np.ndarray, name: Callable[[int, int], str]) -> str:
    """Which task's loss grows most without what, and which one's falls.

    Args:
        found: what is told of.
        change: (what, J) of the loss, as the map colours it.
        right: (what, J), share of the answers that are right then.
        name: of what is off, by its row and the task's place.
    """

    def told(cell: int) -> str:
        off, task = (int(index) for index in np.unravel_index(cell, change.shape))
        return (
            f"{found.tasks[task]} without {name(off, task)}, {change[off, task]:+.2f} nats a token "
            f"({found.anatomy.accuracy[task]:.0%} → {right[off, task]:.0%} right)"
        )

    words = "No task's loss grows."
    if change.max() > 0:
        words = f"Hardest hit by loss, which the colour shows: {told(int(change.argmax()))}."
    fallen = int((change < 0).sum())
    if fallen:
        words += f" It falls in {fallen} of {change.size} cells, most {told(int(change.argmin()))}."
    return words


def spectra_sentence(found: moe_lora.Result, chosen: int) -> str:
    """How strong the experts of one projection are, in words."""
    sigma = found.anatomy.spectra[chosen]  # (E, R)
    norms = np.sqrt(np.square(sigma, dtype=np.float64).sum(1))
    where = label(found.projections[chosen])
    if len(norms) == 1:
        return f"{where.capitalize()}: its one expert's update has a norm of {norms[0]:.2f}."
    idle = [str(index) for index in np.flatnonzero(norms == 0)]
    if len(idle) == len(norms):
        return f"{where.capitalize()}: no expert has learned anything."
    strongest, weakest = int(norms.argmax()), int(norms.argmin())
    words = f"{where.capitalize()}: the strongest update is expert {strongest}'s, ‖ΔW‖ = {norms[strongest]:.2f}"
    if idle:
        return (
            f"{words}; {'experts' if len(idle) > 1 else 'expert'} {', '.join(idle)} got no token and learned nothing."
        )
    return f"{words}, the weakest expert {weakest}'s with {norms[weakest]:.2f}."


def similarity_sentence(found: moe_lora.Result, chosen: int) -> str:
    """How alike the experts are, in words."""
    cosines = found.anatomy.similarity[chosen]
    if len(cosines) == 1:
        return "There is one expert, and nothing to compare it with."
    pairs = [(cosines[one, other], other, one) for one in range(len(cosines)) for other in range(one)]
    most = max(pairs, key=lambda pair: abs(pair[0]))
    every = found.anatomy.similarity[:, *np.triu_indices(len(cosines), 1)]
    words = (
        f"Most alike, or opposed, are experts {most[1]} and {most[2]} with a cosine of {most[0]:.2f}; over all "
        f"projections the mean of two experts is {every.mean():.2f}. 0 is what updates have that share nothing"
    )
    if abs(every.mean()) < _ALIKE:
        return f"{words}, and nearly so it is here."
    return f"{words}: what the experts have learned is partly the same."


def information_sentence(found: moe_lora.Result) -> str:
    """Where routers tell tasks apart, in words."""
    if found.experts == 1:
        return "With one expert there is nothing to tell by."
    last, first = found.information[-1], found.information[0]
    most, least = int(last.argmax()), int(last.argmin())
    return (
        f"Which expert a token goes to tells {last.mean():.1%} of its task on average over {len(last)} projections, "
        f"{first.mean():.1%} before the first step: most in {label(found.projections[most])} ({last[most]:.0%}), least "
        f"in {label(found.projections[least])} ({last[least]:.0%}). Untrained routers tell something too, "
        "as each task has words of its own. Choose a cell to open it above."
    )


def _spectra(found: moe_lora.Result, params: moe_lora.Params, chosen: int) -> None:
    sigma = found.anatomy.spectra[chosen]
    fig = charts.spectra(sigma, mode=theme.mode())
    key = f"{PREFIX}_spectra"
    chart.figure(fig, key=key, sentence=spectra_sentence(found, chosen), height=_HEIGHT)
    export.export(
        fig, key=key, name="moe-lora-spectra", experiment="moe_lora", params=params, data=lambda: spectra_table(found)
    )


def spectra_table(found: moe_lora.Result) -> pd.DataFrame:
    """Every singular value of every expert, a row each."""
    N, E, R = found.anatomy.spectra.shape
    projection, expert, direction = (places.ravel() for places in np.indices((N, E, R)))
    return pd.DataFrame(
        {
            "projection": np.array(found.projections)[projection],
            "expert": expert,
            "direction": direction + 1,
            "singular_value": found.anatomy.spectra.ravel(),
        }
    )


def _similarity(found: moe_lora.Result, params: moe_lora.Params, chosen: int) -> None:
    fig = charts.similarity(found.anatomy.similarity[chosen], mode=theme.mode())
    key = f"{PREFIX}_similarity"
    chart.figure(fig, key=key, sentence=similarity_sentence(found, chosen), height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="moe-lora-similarity",
        experiment="moe_lora",
        params=params,
        data=lambda: pd.DataFrame(found.anatomy.similarity[chosen]).rename_axis("expert").reset_index(),
    )


def _information(found: moe_lora.Result, params: moe_lora.Params, chosen: int) -> None:
    values, layers, projections = grid(found.projections, found.information[-1])
    layer, projection = place(found.projections[chosen])
    fig = charts.information(values, layers, projections, (layers.index(layer), projections.index(projection)))
    key = f"{PREFIX}_information"
    chart.figure(fig, key=key, sentence=information_sentence(found), height=_HEIGHT)
    clicks.on_cell_click(key, lambda x, y: _open(found.projections, layers, projections, x, y))
    export.export(
        fig,
        key=key,
        name="moe-lora-information",
        experiment="moe_lora",
        params=params,
        data=lambda: pd.DataFrame(
            {"projection": found.projections, "before": found.information[0], "after": found.information[-1]}
        ),
    )


def _open(names: list[str], layers: list[int], projections: list[str], x: int, y: int) -> None:
    if y < len(layers) and x < len(projections):
        wanted = (layers[y], projections[x])
        if (name := next((name for name in names if place(name) == wanted), None)) is not None:
            st.session_state[MATRIX] = name
