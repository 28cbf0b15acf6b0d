"""The Explore, Code and Tests tabs of the training lab."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import training, training_tests
from engine.experiments._training import Recorded, recorded_run
from ui import chart, checks, export, run, source, theme
from ui.charts import training as charts
from ui.prose import plain
from ui.training.settings import PREFIX, RUN, Settings, amount

STEPS, TOKENS = "Steps", "Tokens read"
FORMED = 0.5


def explore(given: Settings) -> None:
    """The Explore tab: the curves of the last run, what it said on the way, and what it cost."""
    found = trained(given)
    if found is None:
        return
    params = run.params_of(RUN)
    _ending(found)
    along = st.segmented_control(
        "Along",
        (STEPS, TOKENS),
        default=STEPS,
        required=True,
        key=f"{PREFIX}_along",
        bind="query-params",
        help="Steps of different runs hold different numbers of tokens; along the tokens read they can be compared.",
    )
    if len(found.step):
        _loss(found, params, along)
    _induction(found, params, along)
    _samples(found)
    _cost(found)
    if len(found.step):
        with st.expander("Learning rate, gradient and speed", icon=":material/speed:"):
            _course(found, along)


def trained(given: Settings) -> training.Result | None:
    """The last run; while there is none, draws what stands in its place."""
    if given.started is None:
        st.info(
            "Nothing is trained yet. Choose a size and press **Train**: the curves, what the model says after 0, 50, "
            "200 steps, and how its heads learn to look back appear here.",
            icon=":material/school:",
        )
        return None
    found = run.run("training", given.started, key=RUN)
    if found is None and run.is_running(RUN):
        st.skeleton(height=360)
    return found


def _ending(found: training.Result) -> None:
    share = found.training_tokens / (found.training_tokens + found.held_out_tokens)
    facts = (
        f"{found.seconds:.0f} s on {found.device}, torch {found.versions['torch']}. It learned from "
        f"{found.training_tokens:,} tokens ({share:.0%} of the text); the last {1 - share:.0%} was held out."
    )
    if found.ended == "diverged":
        st.warning(plain(f"{found.ending} {facts}"), icon=":material/trending_up:")
    elif found.ended == "cancelled":
        st.info(plain(f"{found.ending} {facts}"), icon=":material/info:")
    else:
        st.caption(plain(f"{found.ending} {facts}"))


def loss_sentence(found: training.Result) -> str:
    """What the loss did, in words."""
    first, last, best = found.held_out_loss[0], found.held_out_loss[-1], found.held_out_loss.argmin()
    words = (
        f"The held-out loss went from {first:.2f} nats a token (guessing costs {np.log(training.VOCAB_SIZE):.2f}) to "
        f"{last:.2f}: {np.exp(last):,.0f} equally likely next tokens instead of {np.exp(first):,.0f}."
    )
    if last > found.held_out_loss[best] + 0.05:
        words += (
            f" It was lowest after step {found.checked[best]} ({found.held_out_loss[best]:.2f}): after that "
            "the model learned its text by heart."
        )
    return words


def induction_sentence(found: training.Result) -> str:
    """Whether and when a head learned to look back, in words."""
    formed = np.flatnonzero(found.induction >= FORMED)
    if len(formed):
        first = formed[0]
        return (
            f"An induction head formed by step {found.checked[first]}: its score is {found.induction[first]:.0%} "
            f"there and {found.induction[-1]:.0%} at the end. The best previous-token head scores "
            f"{found.previous_token[-1]:.0%}."
        )
    words = (
        f"No induction head formed in {found.checked[-1]} steps: the best score is {found.induction.max():.0%}, the "
        f"best previous-token head reaches {found.previous_token.max():.0%}."
    )
    recorded = recorded_run()
    if recorded is not None and (recorded.induction >= FORMED).any():
        read = recorded.checked[(recorded.induction >= FORMED).argmax()] * recorded.tokens_per_step
        words += (
            f" The shipped model's had formed when it had read {read:,} tokens; this run read "
            f"{found.checked[-1] * found.tokens_per_step:,}."
        )
    return words


def _loss(found: training.Result, params: training.Params, along: str) -> None:
    recorded = recorded_run()
    lines = [
        _line("training loss", found, found.step, found.loss, along, 0, raw=True),
        _line("held-out loss", found, found.checked, found.held_out_loss, along, 1),
    ]
    if recorded is not None:
        whose = f"shipped model ({recorded.device}, recorded)"
        last = _last(found, along)
        lines += [
            _line(f"{whose}, held-out", recorded, recorded.checked, recorded.held_out_loss, along, None, last=last),
            _line(f"{whose}, training", recorded, recorded.step, recorded.loss, along, None, raw=True, last=last),
        ]
    fig = charts.curves(
        lines,
        across=_across(along),
        up="loss, nats a token",
        logarithmic=along == TOKENS,
        marks=[(float(np.log(training.VOCAB_SIZE)), "guessing")],
        mode=theme.mode(),
    )
    key = f"{PREFIX}_loss"
    note = "" if params.random_share == 0 else " The training loss includes the random samples, which cost more."
    chart.figure(fig, key=key, sentence=loss_sentence(found) + note, height=380)
    export.export(fig, key=key, name="training-loss", experiment="training", params=params, data=lambda: _table(found))


def _induction(found: training.Result, params: training.Params, along: str) -> None:
    recorded = recorded_run()
    lines = [
        _line("induction", found, found.checked, found.induction, along, 2),
        _line("previous token", found, found.checked, found.previous_token, along, 3),
    ]
    if recorded is not None:
        name = f"induction of the shipped model ({recorded.device}, recorded)"
        last = _last(found, along)
        lines.append(_line(name, recorded, recorded.checked, recorded.induction, along, None, last=last))
    fig = charts.curves(
        lines,
        across=_across(along),
        up="score of the best head",
        logarithmic=along == TOKENS,
        share=True,
        marks=[(FORMED, "a head of this kind")],
        mode=theme.mode(),
    )
    key = f"{PREFIX}_heads"
    chart.figure(fig, key=key, sentence=induction_sentence(found), height=320)
    export.export(
        fig,
        key=key,
        name="training-heads",
        experiment="training",
        params=params,
        data=lambda: pd.DataFrame(
            {
                "step": found.checked,
                "held_out_loss": found.held_out_loss,
                "induction": found.induction,
                "previous_token": found.previous_token,
            }
        ),
    )


def _course(found: training.Result, along: str) -> None:
    rows = (
        ("learning rate", found.learning_rate, "learning rate", False, f"highest {found.learning_rate.max():.3g}"),
        (
            "gradient norm",
            found.grad_norm,
            "gradient norm, before clipping",
            True,
            f"median {np.median(found.grad_norm):.3g}",
        ),
        (
            "speed",
            found.tokens_per_second,
            "tokens a second",
            True,
            f"median {np.median(found.tokens_per_second):,.0f} tokens/s on {found.device}",
        ),
    )
    for (name, values, title, raw, sentence), place in zip(rows, st.columns(len(rows)), strict=True):
        with place:
            fig = charts.curves(
                [_line(name, found, found.step, values, along, 0, raw=raw)],
                across=_across(along),
                up=title,
                logarithmic=along == TOKENS,
                mode=theme.mode(),
            )
            chart.figure(fig, key=f"{PREFIX}_course_{name.split()[0]}", sentence=f"{name}: {sentence}", height=240)


def _samples(found: training.Result) -> None:
    st.subheader("What it says", anchor=False)
    st.caption("The same prompt and the same dice at every step.")
    for sample in found.samples:
        with st.container(border=True, gap="xsmall"):
            st.markdown(f"**Step {sample.step}**")
            st.text(sample.text)


def _cost(found: training.Result) -> None:
    st.subheader("Predicted and measured", anchor=False)
    predicted, measured = found.predicted, found.measured
    taken = f"{len(found.step)} steps"
    st.table(
        pd.DataFrame(
            {
                "predicted": [
                    f"{predicted.parameters:,}",
                    f"{amount(predicted.flops)}FLOP",
                    f"{amount(predicted.memory_bytes)}B",
                ],
                "measured": [
                    f"{measured.parameters:,}",
                    f"{amount(measured.flops)}FLOP",
                    f"{amount(measured.memory_bytes)}B",
                ],
            },
            index=["parameters", f"arithmetic of {taken}", "memory at its peak"],
        ),
        border="horizontal",
    )
    st.caption(
        plain(
            f"With the checkups that makes {amount(measured.flops / found.seconds)}FLOP/s over {found.seconds:.0f} s "
            f"on {found.device}. PyTorch's counter also counts the pairs that the causal mask forbids; the prediction "
            "does not."
        )
    )


def _line(
    name: str,
    whose: training.Result | Recorded,
    step: np.ndarray,
    values: np.ndarray,
    along: str,
    colour: int | None,
    *,
    raw: bool = False,
    last: float = np.inf,
) -> charts.Line:
    """A curve of a run up to step `last`, on the axis that was chosen; a logarithmic one has no place for step 0."""
    kept = (step <= last) & ((step > 0) | (along == STEPS))
    scale = whose.tokens_per_step if along == TOKENS else 1
    return charts.Line(name, step[kept] * scale, values[kept], colour, raw)


def _last(found: training.Result, along: str) -> float:
    """Up to which step the recorded run is drawn: along the steps, up to where this one ended."""
    return found.checked[-1] if along == STEPS else np.inf


def _across(along: str) -> str:
    return "tokens read" if along == TOKENS else "step"


def _table(found: training.Result) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "step": found.step,
            "loss": found.loss,
            "learning_rate": found.learning_rate,
            "grad_norm": found.grad_norm,
            "tokens_per_second": found.tokens_per_second,
        }
    )


def code() -> None:
    """The Code tab: a step of training, and what it trains."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.trainer:Trainer._take_step",
            "engine.trainer:summed_loss",
            "engine.trainer:Trainer.learning_rate",
            "engine.model:Block",
            "engine.model:Decoder",
            "engine.pretraining.mixture:RepetitionMixture.batch",
            "engine.head_statistics:induction_score",
            "engine.architecture:ModelConfig.forward_flops",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, of the shape on this page."""
    shape = {"num_layers", "d_model", "num_heads", "seed"}
    found = run.run(
        "training_tests", training_tests.Params(**given.params.model_dump(include=shape)), key=f"{PREFIX}_tests"
    )
    if found:
        checks.checks(found.checks)
