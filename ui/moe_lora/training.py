"""The Training view: four tasks are learned at once, and one sees which experts their tokens go to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import moe_lora
from engine.experiments._moe_lora import ROLES, TriedRates, best_rates, read_tasks, tried_rates
from ui import chart, export, run, theme
from ui.charts import moe_lora as charts
from ui.charts.training import Line, curves
from ui.lora import spectrum
from ui.lora.settings import count
from ui.lora.spectrum import label
from ui.moe_lora.settings import PREFIX, RUN, Settings
from ui.moe_lora.verdict import TOLD, doubts, told_sentence, winner_sentence
from ui.prose import plain

_HEIGHT, _MAP_HEIGHT, _TABLE_HEIGHT = 340, 560, 480
_GROWN = 0.1
"""Nats a token: a loss that is so much above its lowest has grown."""
_MEASURE = f"{PREFIX}_measure"
LOSS, RIGHT = "Loss", "Right answers"
"""What the curves show."""
MATRIX = f"{PREFIX}_matrix"
"""Which projection is looked at, in all views."""


def training(given: Settings) -> None:
    """What is to be learned until a run is started; then the curves as they grow, and where the tokens go."""
    if given.started is None:
        _before()
        return
    run.watch("moe_lora", given.started, _draw, key=RUN, height=_HEIGHT)


def _before() -> None:
    tasks = read_tasks()
    st.info(
        plain(
            "Nothing is trained yet in this session; a link brings settings, not results. Press “Train”: one model "
            f"learns {len(tasks)} tasks at once, with several adapters on each matrix and a router that picks among "
            "them, token by token. Nobody tells it which task is which."
        ),
        icon=":material/school:",
    )
    st.markdown("**What it is to learn**")
    st.table(
        pd.DataFrame(
            {
                "Task": [task.name for task in tasks],
                "Trained on": [_quoted(task.training[0]) for task in tasks],
                "Asked, but never trained on": [_quoted(task.held_out[0]) for task in tasks],
                "What it takes": [plain(task.about) for task in tasks],
            }
        ),
        border="horizontal",
        hide_index=True,
    )
    st.caption(
        f"{len(tasks[0].training)} questions of each task are trained on, {len(tasks[0].held_out)} are only asked. An "
        "answer is right if it is exactly the expected one, full stop included."
    )


def _quoted(pair: tuple[str, str]) -> str:
    return f"{plain(pair[0])} **{plain(pair[1])}.**"


def _draw(found: moe_lora.Result, params: moe_lora.Params) -> None:
    _state(found)
    _verdict(found)
    measure = st.segmented_control(
        "Measure",
        [LOSS, RIGHT],
        default=LOSS,
        required=True,
        key=_MEASURE,
        bind="query-params",
        label_visibility="collapsed",
    )
    left, right = st.columns(2, gap="small")
    with left:
        _tasks(found, params, measure)
    with right:
        _runs(found, params, measure)
    _table(found)
    _routing(found, params)
    _answers(found)


def _state(found: moe_lora.Result) -> None:
    """How the runs stand, in one place whether they go on or not."""
    if found.ended == "running":
        st.caption(plain(f"{found.ending} {found.device}"))
        return
    words = plain(f"{found.ending} {found.seconds:.0f} s on {found.device}, torch {found.versions['torch']}.")
    if found.ended == "diverged":
        st.warning(words, icon=":material/trending_up:")
    elif found.ended in ("cancelled", "timed out"):
        st.info(words, icon=":material/info:")
    else:
        st.caption(words)


def _verdict(found: moe_lora.Result) -> None:
    """What the run answers, once it has ended, and how far that carries."""
    if found.ended == "running" or int(found.mixture.checked[-1]) == 0:
        return
    complete = found.ended == "finished"
    bold = f"{winner_sentence(found)} {told_sentence(found)}" if complete else told_sentence(found)
    st.markdown(f"**{plain(bold)}**")
    notes = [doubts(found)] if complete else []
    if found.experts > 1:
        notes.append(TOLD)
    if notes:
        st.caption(plain(" ".join(notes)))


def span(found: moe_lora.Result, one: moe_lora.Run | None = None) -> tuple[float, float]:
    """What the horizontal axis shows: every step of a run while it goes; then those that were taken."""
    taken = max(int(leg.checked[-1]) for leg in ([one] if one else found.runs))
    return 0, max(1, found.steps if found.ended == "running" else taken)


def tasks_sentence(found: moe_lora.Result, measure: str = LOSS) -> str:
    """How the tasks fared with the mixture by what the curves show, in words."""
    mixture = found.mixture
    loss, right, step = mixture.task_loss[-1], mixture.task_accuracy[-1], int(mixture.checked[-1])
    if step == 0:
        values = [f"{value:.1f}" for value in loss] if measure == LOSS else [f"{value:.0%}" for value in right]
        told = _listed(found.tasks, values)
        if measure == RIGHT:
            return f"Before the first step {told} of the questions that are never trained on are answered rightly."
        return f"Before the first step the questions that are never trained on cost {told} nats a token of the answers."
    words = f"MoE-LoRA on questions that it never trains on, after step {step}:"
    if measure == RIGHT:
        most, fewest = (
            " and ".join(
                f"{found.tasks[task]}, {share:.0%} (loss {loss[task]:.2g})" for task in np.flatnonzero(right == share)
            )
            for share in (right.max(), right.min())
        )
        return f"{words} most answers are right in {most}, fewest in {fewest}."
    easiest, hardest = int(loss.argmin()), int(loss.argmax())
    return (
        f"{words} lowest is {found.tasks[easiest]} with {loss[easiest]:.2g} nats a token of the answers "
        f"({right[easiest]:.0%} right), highest {found.tasks[hardest]} with {loss[hardest]:.2g} ({right[hardest]:.0%} "
        f"right).{_grown(found)}"
    )


def _grown(found: moe_lora.Result) -> str:
    """Tasks whose loss has been lower."""
    table, checked = found.mixture.task_loss, found.mixture.checked  # (M, J)
    lowest = table.argmin(0)
    grown = [
        f"{task} ({table[best, index]:.2g} after step {checked[best]}, now {table[-1, index]:.2g})"
        for index, (task, best) in enumerate(zip(found.tasks, lowest, strict=True))
        if table[-1, index] > table[best, index] + _GROWN
    ]
    if not grown:
        return ""
    return f" Lower before than now: {', '.join(grown)}; a loss that grows while the training goes on is overfitting."


def runs_sentence(found: moe_lora.Result, measure: str = LOSS) -> str:
    """How the mixture compares with the plain LoRAs by what the curves show, in words."""
    said = []
    for leg in found.runs:
        right, loss = f"{leg.mean_accuracy[-1]:.0%} right", f"{leg.mean_loss[-1]:.2f}"
        figures = f"a loss of {loss} ({right})" if measure == LOSS else f"{right} (loss {loss})"
        said.append(
            f"{leg.role} {figures}" + ("" if leg.checked[-1] == found.steps else f" after step {leg.checked[-1]}")
        )
    words = f"All tasks together, on questions never trained on: {'; '.join(said)}."
    return words if found.ended == "finished" else f"{words} The comparison is complete once all three runs are."


def _listed(names: list[str], values: list[str]) -> str:
    *first, last = (f"{value} ({name})" for name, value in zip(names, values, strict=True))
    return f"{', '.join(first)} and {last}" if first else last


def _tasks(found: moe_lora.Result, params: moe_lora.Params, measure: str) -> None:
    mixture = found.mixture
    values = mixture.task_loss if measure == LOSS else mixture.task_accuracy
    lines = [Line(name, mixture.checked, values[:, index], index) for index, name in enumerate(found.tasks)]
    st.markdown("**The mixture, task by task**")
    _curves("tasks", lines, tasks_sentence(found, measure), span(found, mixture), found, params, measure)


def _runs(found: moe_lora.Result, params: moe_lora.Params, measure: str) -> None:
    lines = [
        Line(leg.role, leg.checked, leg.mean_loss if measure == LOSS else leg.mean_accuracy, colour)
        for colour, leg in enumerate(found.runs)
    ]
    st.markdown("**All tasks, beside plain LoRAs**")
    _curves("runs", lines, runs_sentence(found, measure), span(found), found, params, measure)


def _curves(
    name: str,
    lines: list[Line],
    sentence: str,
    shown: tuple[float, float],
    found: moe_lora.Result,
    params: moe_lora.Params,
    measure: str,
) -> None:
    loss = measure == LOSS
    fig = curves(
        lines,
        across="step",
        up="loss, nats a token" if loss else "answers right",
        share=not loss,
        span=shown,
        mode=theme.mode(),
    )
    if loss:
        fig.update_yaxes(type="log", dtick="D2", tickformat="~g")
    key = f"{PREFIX}_{name}"
    chart.figure(fig, key=key, sentence=sentence, height=_HEIGHT)
    export.export(
        fig, key=key, name=f"moe-lora-{name}", experiment="moe_lora", params=params, data=lambda: checkups(found)
    )


def checkups(found: moe_lora.Result) -> pd.DataFrame:
    """Every task at every checkup of every run, a row each."""
    return pd.DataFrame(
        [
            {"run": leg.role, "step": step, "task": task, "loss": loss, "right": right}
            for leg in found.runs
            for step, losses, rights in zip(leg.checked, leg.task_loss, leg.task_accuracy, strict=True)
            for task, loss, right in zip(found.tasks, losses, rights, strict=True)
        ]
    )


def _table(found: moe_lora.Result) -> None:
    """The runs side by side, in numbers."""
    columns: dict[str, list[str]] = {"": [*found.tasks, "All tasks", "Numbers trained", "FLOPs a token", "Rank"]}
    for leg in found.runs:
        pairs = zip(leg.task_accuracy[-1], leg.task_loss[-1], strict=True)
        columns[leg.role] = [
            *(f"{right:.0%} · {loss:.2f}" for right, loss in pairs),
            f"**{leg.mean_accuracy[-1]:.0%} · {leg.mean_loss[-1]:.2f}**",
            f"{leg.trainable:,}",
            count(leg.flops),
            f"{found.experts} × {leg.rank}" if leg.role == "MoE-LoRA" else f"{leg.rank}",
        ]
    st.table(pd.DataFrame(columns), border="horizontal", hide_index=True)
    st.caption(
        plain(
            "Right answers · loss in nats a token, on questions never trained on. FLOPs are what the adapters add to "
            f"one token's forward pass, counted for its {found.top_k} "
            f"expert{'s' if found.top_k > 1 else ''} and the router; for thin experts all are computed at once all "
            "the same, as that is faster."
        )
    )
    _rates(found)


def _rates(found: moe_lora.Result) -> None:
    """Which learning rate each run had, and how it came to it."""
    tried = tried_rates()
    with st.expander(plain(rates_sentence(found)), icon=":material/tune:"):
        if tried is None:
            st.markdown("The tries behind each run's own rate are not there: engine/recorded is missing.")
            return
        st.markdown(plain(rule_sentence(tried)))
        st.table(tries_table(tried), border="horizontal", hide_index=True)
        st.caption(
            "Right answers · loss in nats a token, the mean over the seeds; in bold the rate that the rule takes."
        )


def rates_sentence(found: moe_lora.Result) -> str:
    """The learning rate of each run."""
    rates = {leg.learning_rate for leg in found.runs}
    if len(rates) == 1 and len(found.runs) > 1:
        return f"Learning rate of all runs: {rates.pop():g}"
    return "Learning rates: " + ", ".join(f"{leg.role} {leg.learning_rate:g}" for leg in found.runs)


def rule_sentence(tried: TriedRates) -> str:
    """How each run's own rate was chosen."""
    seeds = sorted({one.seed for one in tried.tries})
    return (
        "Unless the controls give one rate to all, each run has its own, chosen for all three by the same rule: of the "
        f"rates below the one with most right answers over seeds {_and(seeds)}, on the storyteller with the settings "
        f"that the page opens with ({tried.steps} steps; on {tried.device}, {tried.date}). The questions are those "
        "that the page asks, so that the figures are a little too good, for all three alike."
    )


def tries_table(tried: TriedRates) -> pd.DataFrame:
    """A row for each rate, a column for each run."""
    rates, best = sorted({one.learning_rate for one in tried.tries}), best_rates(tried.tries)
    columns: dict[str, list[str]] = {"Learning rate": [f"{rate:g}" for rate in rates]}
    for role in ROLES:
        columns[role] = []
        for rate in rates:
            own = [one for one in tried.tries if (one.role, one.learning_rate) == (role, rate)]
            told = f"{np.mean([one.right for one in own]):.0%} · {np.mean([one.loss for one in own]):.2f}"
            columns[role].append(f"**{told}**" if rate == best[role] else told)
    return pd.DataFrame(columns)


def _and(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def routing_sentence(found: moe_lora.Result, chosen: int) -> str:
    """Where the tasks' tokens go in one projection, in words."""
    if found.experts == 1:
        return "There is one expert: it gets every token."
    shares = found.routing[-1, :, chosen]  # (J, E)
    step, where = int(found.mixture.checked[-1]), label(found.projections[chosen])
    most = [
        f"{task} mostly expert {row.argmax()} ({row.max():.0%})" for task, row in zip(found.tasks, shares, strict=True)
    ]
    now, first = found.information[-1, chosen], found.information[0, chosen]
    words = f"{where.capitalize()}, {f'after step {step}' if step else 'before the first step'}: {', '.join(most)}."
    told = f" Here a token's expert tells {now:.0%} of its task"
    before = f" ({first:.0%} before the first step)" if step else ""
    mean, above = found.information[-1].mean(), int((found.information[-1] > now).sum())
    words += f"{told}{before}, the mean over all {len(found.projections)} projections is {mean:.0%}"
    if chosen != first_choice(found):
        return f"{words}."
    return (
        f"{words}: this projection comes first because its untrained router tells most, and {above or 'none'} of the "
        f"others now tell{'s' if above == 1 else ''} more."
    )


def first_choice(found: moe_lora.Result) -> int:
    """The projection whose untrained router tells most of the task: the same while it learns, so that nothing jumps."""
    return int(found.information[0].argmax())


def _routing(found: moe_lora.Result, params: moe_lora.Params) -> None:
    st.subheader("Which expert gets whose tokens", anchor=False)
    chosen = spectrum.choose(found.projections, first_choice(found), key=MATRIX)
    fig = charts.routing(
        found.mixture.checked,
        found.routing[:, :, chosen],
        found.tasks,
        span(found, found.mixture),
        mode=theme.mode(),
    )
    key = f"{PREFIX}_routing"
    chart.figure(fig, key=key, sentence=routing_sentence(found, chosen), height=_MAP_HEIGHT)
    export.export(
        fig, key=key, name="moe-lora-routing", experiment="moe_lora", params=params, data=lambda: shares_table(found)
    )


def shares_table(found: moe_lora.Result) -> pd.DataFrame:
    """Every share of every checkup, a row each."""
    M, J, N, E = found.routing.shape
    step, task, projection, expert = (places.ravel() for places in np.indices((M, J, N, E)))
    return pd.DataFrame(
        {
            "step": found.mixture.checked[step],
            "task": np.array(found.tasks)[task],
            "projection": np.array(found.projections)[projection],
            "expert": expert,
            "share": found.routing.ravel(),
        }
    )


def _answers(found: moe_lora.Result) -> None:
    if not found.answers:
        return
    st.subheader("What the mixture answers", anchor=False)
    right = sum(answer.right for answer in found.answers)
    st.caption(f"A few of the questions that were never trained on: {right} of these {len(found.answers)} are right.")
    with st.container(height=_TABLE_HEIGHT, border=False, key=f"{PREFIX}_answer_table"):
        st.table(
            pd.DataFrame(
                {
                    "Task": [answer.task for answer in found.answers],
                    "Question": [plain(answer.question) for answer in found.answers],
                    "Expected": [plain(answer.expected) for answer in found.answers],
                    "Said": [_marked(answer) for answer in found.answers],
                }
            ),
            border="horizontal",
            hide_index=True,
        )


def _marked(answer: moe_lora.Answer) -> str:
    mark = ":green-badge[:material/check: right]" if answer.right else ":red-badge[:material/close: wrong]"
    return f"{mark} {plain(answer.said) or '(nothing)'}"
