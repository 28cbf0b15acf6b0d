"""The Collapse view: a mixture-of-experts model learns live; how its load falls apart, and what keeps it together."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import router_collapse
from engine.experiments.router_collapse import D_MODEL, IDLE, SEED_NOISE
from ui import chart, compare, export, run, theme
from ui.charts import router_training as charts
from ui.charts import training as training_charts
from ui.charts.router_training import Course
from ui.charts.training import Line
from ui.prose import plain
from ui.router.settings import LEARNED, PREFIX, RUN, Settings

PINNED_RUN = f"{PREFIX}_pinned_run"
WHY = (
    "What can feed a collapse: an expert's own weights get no gradient from a step in which no token goes to it, while "
    "those that are chosen learn, and the router learns from what they give. And as training begins the tokens at the "
    "router may come to look alike (the lowest panel shows whether they do): where that is seen in a balanced run as "
    "well, it is not enough for a collapse. A frozen router, folded away beside the learning rate, shows how the load "
    "fares without the router's own learning."
)
_ENDED = f"_{PREFIX}_ended"
_MOST_KEPT = 4
_SETTLED = 0.3  # share of the steps after which two losses are worth comparing
_MAP_ROW, _HEIGHT = 18, 500


def collapse(given: Settings) -> None:
    """The last training as it goes, beside the pinned one if there is one."""
    pinned, beside = pinned_run(given)
    if pinned is not None and beside is None:
        _train_pinned(pinned)
    if given.started is None:
        st.info(
            plain(
                "Nothing is trained yet in this session; a link brings settings, not results. Press “Train”: a small "
                "model with a router learns five sources that have little in common, with nothing to balance its "
                "experts. It takes about a minute on two CPU cores. Then choose a balancing, train again, and see both."
            ),
            icon=":material/school:",
        )
        if beside is None:
            st.caption(WHY)
        else:
            _draw_all([("A", beside, pinned)])
        return

    def draw(found: router_collapse.Result, params: router_collapse.Params) -> None:
        both = beside is not None and params != pinned
        _draw_all([("A", beside, pinned), ("B", found, params)] if both else [("", found, params)])

    run.watch("router_collapse", given.started, draw, key=RUN, height=2 * _HEIGHT)


def pinned_run(given: Settings) -> tuple[router_collapse.Params | None, router_collapse.Result | None]:
    """Run A, if one is pinned, and what came of it, if it was trained in this session; draws the button that pins."""
    for key in (RUN, PINNED_RUN):
        run.is_running(key)  # first: a run that has ended is known then
    shown, found = run.params_of(RUN), run.latest(RUN)
    if shown is not None:
        _remember(shown, found)
    is_pinned = f"{PREFIX}_pin" in st.query_params
    if shown is None and not is_pinned:
        return None, None
    pinned = compare.pin(given.params if is_pinned else shown, prefix=PREFIX)
    if pinned is not None and given.started not in (None, given.params) and given.params != pinned:
        st.caption("B is not trained with these settings yet: press “Train again”.")
    beside = _recall(pinned)
    if beside is not None:
        _remember(pinned, beside)  # among the last ones, however many are trained beside it
    return pinned, beside


def _remember(params: router_collapse.Params, found: router_collapse.Result) -> None:
    """Keep the last trainings of this session: one of them may be pinned."""
    ended = {key: value for key, value in st.session_state.get(_ENDED, {}).items() if key != params}
    st.session_state[_ENDED] = dict(list(ended.items())[-_MOST_KEPT + 1 :]) | {params: found}


def _recall(pinned: router_collapse.Params | None) -> router_collapse.Result | None:
    """The result of the pinned run, if it was trained in this session."""
    if pinned is None:
        return None
    if run.params_of(PINNED_RUN) == pinned:
        return run.latest(PINNED_RUN)
    return st.session_state.get(_ENDED, {}).get(pinned)


def _train_pinned(pinned: router_collapse.Params) -> None:
    """A link has brought a pinned run: it is trained when asked for."""
    running = run.is_running(PINNED_RUN)
    st.info(
        plain(f"The pinned run A ({name(pinned)}) has not been trained in this session."), icon=":material/push_pin:"
    )
    st.button(
        "Training A…" if running else "Train A",
        key=f"_{PREFIX}_train_pinned",
        icon=":material/play_arrow:",
        disabled=running,
        on_click=run.ask,
        args=("router_collapse", pinned),
        kwargs={"key": PINNED_RUN},
    )
    if running:
        run.watch("router_collapse", pinned, lambda *_: None, key=PINNED_RUN, height=1)


def name(params: router_collapse.Params) -> str:
    """A run by what matters most of it."""
    how = {
        "none": "no balancing",
        "auxiliary loss": f"auxiliary loss × {params.aux_weight:g}",
        "loss-free bias": f"loss-free bias, rate {params.bias_rate:g}",
    }[params.balancing]
    return f"{how}, frozen router" if params.freeze_router else how


Run = tuple[str, router_collapse.Result, router_collapse.Params]


def _draw_all(runs: list[Run]) -> None:
    _state(runs[-1][1], runs[-1][0])
    mode = theme.mode()
    steps = max(found.steps for _, found, _ in runs)
    st.markdown(
        "**Who gets how much** of the held-out text: load of each expert ÷ its fair share; crossed out are experts "
        "without a token"
    )
    for place, (side, found, params) in zip(st.columns(len(runs), gap="small"), runs, strict=True):
        with place:
            if side:
                st.markdown(f"**{side}** · {plain(name(params))}")
            key = f"{PREFIX}_load_map{side}"
            fig = charts.load_map(found.checked, found.relative, found.steps, mode=mode)
            chart.figure(fig, key=key, sentence=found.sentence, height=164 + _MAP_ROW * max(12, found.experts))
            _export(fig, key, params, found)
    left, right = st.columns(2, gap="small")
    labelled = [(f"{side}: {name(params)}" if side else name(params), found, params) for side, found, params in runs]
    with left:
        fig = charts.balance(
            [
                Course(
                    label,
                    found.checked,
                    found.entropy,
                    math.log(found.experts),
                    found.max_violation,
                    found.trained_violation,
                    found.directions,
                    number,
                )
                for number, (label, found, _) in enumerate(labelled)
            ],
            steps,
            mode=mode,
        )
        key = f"{PREFIX}_balance"
        chart.figure(fig, key=key, sentence=balance_sentence(labelled), height=_HEIGHT)
        _export(fig, key, runs[-1][2], runs[-1][1])
    with right:
        key = f"{PREFIX}_loss"
        fig = training_charts.curves(
            _losses(labelled), across="step", up="loss, nats a token", span=(0, steps), mode=mode
        )
        if len(runs) > 1:
            fig.update_yaxes(range=loss_range([found for _, found, _ in runs]))
        chart.figure(fig, key=key, sentence=loss_sentence(labelled), height=_HEIGHT)
        _export(fig, key, runs[-1][2], runs[-1][1])
    if runs[-1][1].experts > 1:
        st.markdown(plain(f"{trade(runs)} What is said about the source is seen in the view “{LEARNED}”."))
    for side, found, _ in runs:
        if found.course:
            st.markdown(plain(f"{side}: {found.course}" if side else found.course))
    st.caption(WHY)


def trade(runs: list[Run]) -> str:
    """What the load, the loss and the experts' knowledge of the source came to, as figures of the runs themselves.

    A collapse is seen in the first and what experts learned in the last; neither view alone says what it is worth.
    """
    took = [int((found.relative[-1] >= IDLE).sum()) for _, found, _ in runs]
    said = [
        f"{f'in {side} ' if side else ''}{count} of {found.experts} experts {'takes' if count == 1 else 'take'} "
        f"a tenth of a fair share or more, a held-out token costs {found.held_out_loss[-1]:.3f} nats, and which expert "
        f"it goes to says {found.information[-1]:.2f} of {math.log(len(found.sources)):.2f} nats about its source"
        for (side, found, _), count in zip(runs, took, strict=True)
    ]
    steps = {int(found.checked[-1]) for _, found, _ in runs}
    when = f"After step {steps.pop()}" if len(steps) == 1 else "After different numbers of steps"
    if len(runs) == 1:
        return f"{when}, {said[0]}."
    first, second = (1, 0) if took[1] < took[0] else (0, 1)  # the one with fewer experts at work is spoken of
    few, many, off = runs[first][1], runs[second][1], took[second] - took[first]
    loss = round(float(few.held_out_loss[-1]), 3) - round(float(many.held_out_loss[-1]), 3)
    told = round(float(few.information[-1]), 2) - round(float(many.information[-1]), 2)
    at_work = f"{off} fewer experts" if off else "as many experts"
    return (
        f"{when}, {'; '.join(said)}. So {runs[first][0]}, with {at_work} at work, pays {_difference(loss, 3)} for a "
        f"token, and its experts say {_difference(told, 2)} about the source. That is one seed; between two seeds "
        f"alone losses differ by {2**0.5 * SEED_NOISE:.2f} (standard deviation, with the page's own settings)."
    )


def _difference(nats: float, digits: int) -> str:
    """More, less or as much, of numbers that are rounded already."""
    shown = f"{abs(nats):.{digits}f}"
    return f"{shown} nats {'more' if nats > 0 else 'less'}" if float(shown) else "as much"


def _state(found: router_collapse.Result, side: str) -> None:
    """How the run stands, or how it ended."""
    which = f"{side}: " if side else ""
    if found.ended == "running":
        st.caption(plain(f"{which}{found.ending} On {found.device}."))
        return
    words = plain(
        f"{which}{found.ending} {found.seconds:.0f} s on {found.device}, torch {found.versions['torch']}. It has "
        f"{found.parameters:,} numbers, of which a token uses {found.active_parameters:,}, and is examined on "
        f"{found.held_out_tokens:,} tokens that it never learns from."
    )
    if found.ended == "diverged":
        st.warning(words, icon=":material/trending_up:")
    elif found.ended == "finished":
        st.caption(words)
    else:
        st.info(words, icon=":material/info:")


def _losses(runs: list[Run]) -> list[Line]:
    """Training and held-out loss of one run; of two runs only the held-out one, or nobody could tell them apart."""
    if len(runs) == 1:
        ((_, found, _),) = runs
        return [
            Line("training loss", found.step, found.loss, 0, raw=True),
            Line("held-out loss", found.checked, found.held_out_loss, 1),
        ]
    return [Line(label, found.checked, found.held_out_loss, number) for number, (label, found, _) in enumerate(runs)]


def loss_range(runs: list[router_collapse.Result]) -> list[float]:
    """What to show of two held-out losses: their first fall leaves the picture, so that the difference is seen."""
    first = _SETTLED * max(found.steps for found in runs)
    late = [float(loss) for found in runs for loss in found.held_out_loss[found.checked >= first]]
    late = late or [float(found.held_out_loss[-1]) for found in runs]
    room = 0.08 * (max(late) - min(late)) or 0.1
    return [min(late) - room, max(late) + room]


def balance_sentence(runs: list[Run]) -> str:
    """Entropy and MaxVio at the end of each run, beside what is fair."""
    said = []
    for label, found, _ in runs:
        fair = math.log(found.experts)
        if np.isnan(found.max_violation[-1]):
            said.append(f"{label[0].upper()}{label[1:]}: no token goes to any expert, so there is no load.")
            continue
        words = f"{found.max_violation[-1]:.2f} on held-out text"
        if len(found.checked) > 1 and not np.isnan(found.trained_violation[-1]):
            since = int(found.checked[-1] - found.checked[-2])
            words += f" and {found.trained_violation[-1]:.2f} on the tokens trained on in the last "
            words += f"{since} steps" if since > 1 else "step"
        said.append(
            f"{label[0].upper()}{label[1:]}, after step {found.checked[-1]}: entropy {found.entropy[-1]:.2f} of "
            f"{fair:.2f} nats, MaxVio {words}, {_experts(int(found.dead[-1]))} without a held-out token."
        )
    explained = (
        "MaxVio is how far the busiest expert is above the fair share, divided by it; dotted, that of the tokens "
        "trained on, which is what balancing works on. Below: over how many directions the tokens at the router "
        f"spread, from 1, all on one line, to {D_MODEL}, all directions alike: the participation ratio (Σλ)² / Σλ² of "
        "the eigenvalues of their second moments."
    )
    return f"{' '.join(said)} {explained}"


def loss_sentence(runs: list[Run]) -> str:
    """What the held-out loss came to, and between two runs which is lower."""
    if len(runs) == 1:
        ((_, found, _),) = runs
        return (
            f"A held-out token costs {found.held_out_loss[0]:.2f} nats before the first step and "
            f"{found.held_out_loss[-1]:.2f} after step {found.checked[-1]}."
        )
    (first, a, _), (second, b, _) = runs
    if a.checked[-1] != b.checked[-1]:
        then = np.interp(b.checked[-1], a.checked, a.held_out_loss)
        return (
            f"After step {b.checked[-1]} B pays {b.held_out_loss[-1]:.3f} nats a held-out token; A paid {then:.3f} "
            f"there and {a.held_out_loss[-1]:.3f} at its end."
        )
    off = float(b.held_out_loss[-1] - a.held_out_loss[-1])
    verdict = "the same" if abs(off) < 5e-4 else f"{abs(off):.3f} {'more' if off > 0 else 'less'}"
    return (
        f"After step {a.checked[-1]} a held-out token costs {a.held_out_loss[-1]:.3f} nats in {first} and "
        f"{b.held_out_loss[-1]:.3f} in {second}: {verdict}. That is one seed: "
        f"with the settings that the page opens with, seeds alone make {SEED_NOISE:g} (one standard deviation). The "
        f"first {_SETTLED:.0%} of the steps lie above the picture."
    )


def table(found: router_collapse.Result) -> pd.DataFrame:
    """Every expert at every checkup as a row, with what is known of the checkup."""
    checkups, experts = found.relative.shape
    rows, columns = np.divmod(np.arange(checkups * experts), experts)
    return pd.DataFrame(
        {
            "step": found.checked[rows],
            "expert": columns,
            "load_over_fair_share": found.relative.ravel(),
            "bias": found.bias.ravel(),
            "entropy": found.entropy[rows],
            "max_violation": found.max_violation[rows],
            "held_out_loss": found.held_out_loss[rows],
        }
    )


def _export(fig: object, key: str, params: router_collapse.Params, found: router_collapse.Result) -> None:
    export.export(
        fig,
        key=key,
        name=key.replace("_", "-"),
        experiment="router_collapse",
        params=params,
        data=lambda: table(found),
    )


def _experts(count: int) -> str:
    return "1 expert" if count == 1 else f"{count or 'no'} experts"
