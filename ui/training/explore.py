"""The Explore, Code and Tests tabs of the training lab."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import training, training_tests
from engine.experiments._training import Recorded, recorded_run
from ui import chart, checks, export, run, source, theme
from ui.charts import training as charts
from ui.page import NOTHING_TO_SHOW
from ui.prose import plain
from ui.training import sentences
from ui.training.settings import PREFIX, RUN, Settings, amount

STEPS, TOKENS = "Steps", "Tokens read"
_HEIGHT = 340


def explore(given: Settings) -> None:
    """The Explore tab: the curves of the last run as they grow, what it said on the way, and what it cost."""
    if given.started is None and given.params is None:
        st.caption(NOTHING_TO_SHOW)
        return
    if given.started is None:
        st.info(
            "Nothing is trained yet. Choose a size and press **Train**: the curves, what the model says after 0, 50, "
            "200 steps, and how its heads learn to look back grow here while it learns.",
            icon=":material/school:",
        )
        return
    run.watch("training", given.started, _draw, key=RUN, height=_HEIGHT)


def _draw(found: training.Result, params: training.Params) -> None:
    if found.ended != "running":
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
    left, right = st.columns(2, gap="small")
    with left:
        _loss(found, params, along)
    with right:
        _induction(found, params, along)
    _samples(found)
    _cost(found)
    course = st.expander(
        "Learning rate, gradient and speed", icon=":material/speed:", key=f"{PREFIX}_course", on_change="rerun"
    )
    if course.open and len(found.step):
        with course:
            _course(found, along)


def _ending(found: training.Result) -> None:
    words = plain(
        f"{found.ending} {found.seconds:.0f} s on {found.device}, torch {found.versions['torch']}. It learned from "
        f"{found.training_tokens:,} tokens; the last tenth of the text, {found.held_out_tokens:,} tokens, was held out."
    )
    said, model = st.columns([5, 1], vertical_alignment="center")
    if found.ended == "diverged":
        said.warning(words, icon=":material/trending_up:")
    elif found.ended in ("cancelled", "timed out"):
        said.info(words, icon=":material/info:")
    else:
        said.caption(words)
    model.download_button(
        "Save model",
        found.archive,
        f"{training.ARCHIVE_FOLDER}.zip",
        "application/zip",
        key=f"{PREFIX}_model",
        icon=":material/download:",
        on_click="ignore",
        width="stretch",
        help=f"What it has learned, {amount(len(found.archive))}B: weights, config and tokenizer in a folder. "
        "Unpacked, it opens in the attention lab by its path, and in transformers.",
    )


def _loss(found: training.Result, params: training.Params, along: str) -> None:
    recorded = None if params.text.strip() else _recorded(along)  # of another text it says nothing
    lines = [
        _line("training loss", found, found.step, found.loss, along, 0, raw=True),
        _line("held-out loss", found, found.checked, found.held_out_loss, along, 1),
    ]
    if recorded is not None:
        # A nat a character is the same for every tokenizer; this run's tokens hold fewer characters.
        rescaled = recorded.held_out_loss * found.characters_per_token / recorded.characters_per_token
        lines.append(_line("shipped, held-out", recorded, recorded.checked, rescaled, along, None))
    fig = charts.curves(
        lines,
        across=_across(along),
        up="loss, nats a token",
        logarithmic=along == TOKENS,
        marks=[(float(np.log(training.VOCAB_SIZE)), "guessing")],
        span=span(found, along),
        note=_provenance(recorded),
        mode=theme.mode(),
    )
    key = f"{PREFIX}_loss"
    sentence = sentences.loss(found)
    if params.random_share and len(found.loss):
        sentence += f" {sentences.random_samples(found)}"
    if recorded is not None:
        sentence += (
            f" The shipped model read blocks of {recorded.block_size} tokens; its loss is converted to tokens of "
            "this length."
        )
    chart.figure(fig, key=key, sentence=sentence, height=_HEIGHT)
    export.export(fig, key=key, name="training-loss", experiment="training", params=params, data=lambda: _table(found))


def _induction(found: training.Result, params: training.Params, along: str) -> None:
    recorded = _recorded(along)
    lines = [
        _line("induction", found, found.checked, found.induction, along, 2),
        _line("previous token", found, found.checked, found.previous_token, along, 3),
        _line("copied right", found, found.checked, found.copied, along, 4),
    ]
    sentence = sentences.induction(found)
    if recorded is not None:
        lines.append(_line("shipped, induction", recorded, recorded.checked, recorded.induction, along, None))
        sentence += (
            f" The shipped model was scored on {recorded.probe}, and read blocks of {recorded.block_size} tokens."
        )
    fig = charts.curves(
        lines,
        across=_across(along),
        up="score, or share copied",
        logarithmic=along == TOKENS,
        share=True,
        marks=[(sentences.FORMED, "a head of this kind")],
        span=span(found, along),
        note=_provenance(recorded),
        mode=theme.mode(),
    )
    key = f"{PREFIX}_heads"
    chart.figure(fig, key=key, sentence=sentence, height=_HEIGHT)
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
                "copied": found.copied,
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
                span=span(found, along),
                mode=theme.mode(),
            )
            chart.figure(fig, key=f"{PREFIX}_course_{name.split()[0]}", sentence=f"{name}: {sentence}", height=240)


def _samples(found: training.Result) -> None:
    st.header("What it says", anchor=False)
    st.caption("The same prompt and the same dice at every step.")
    for sample in found.samples:
        with st.container(border=True, gap="xsmall"):
            st.markdown(f"**Step {sample.step}**")
            st.text(sample.text)


def _cost(found: training.Result) -> None:
    st.header("Predicted and measured", anchor=False)
    predicted, measured = found.predicted, found.measured
    taken = len(found.step)
    weighed = f"{amount(measured.memory_bytes)}B, measured" if measured.memory_bytes else "not weighed"
    st.table(
        pd.DataFrame(
            {
                "predicted": [
                    f"{predicted.parameters:,}",
                    f"{amount(predicted.flops)}FLOP",
                    f"{amount(predicted.memory_bytes)}B",
                ],
                "in this run": [f"{measured.parameters:,}", f"{amount(measured.flops)}FLOP, counted", weighed],
            },
            index=pd.Index(
                ["parameters", f"arithmetic of {taken} steps", "memory of a step, at its peak"], name="what"
            ),
        ),
        border="horizontal",
    )
    counted = "PyTorch's counter also counts the pairs that the causal mask forbids; the prediction does not."
    st.caption(plain(f"{sentences.speed(found)} {counted}" if taken else counted))


def _line(
    name: str,
    whose: training.Result | Recorded,
    step: np.ndarray,
    values: np.ndarray,
    along: str,
    colour: int | None,
    *,
    raw: bool = False,
) -> charts.Line:
    """A curve of a run on the axis that was chosen; a logarithmic one has no place for step 0."""
    kept = (step > 0) | (along == STEPS)
    scale = whose.tokens_per_step if along == TOKENS else 1
    return charts.Line(name, step[kept] * scale, values[kept], colour, raw)


def _provenance(recorded: Recorded | None) -> str:
    return "" if recorded is None else f"shipped: our model on an {recorded.provenance}"


def _recorded(along: str) -> Recorded | None:
    """The shipped model's run where it can be compared: its steps hold other numbers of tokens than this run's."""
    return recorded_run() if along == TOKENS else None


def _end(found: training.Result) -> int:
    """The step at which the run ended or, while it is running, is to end."""
    return found.steps if found.ended == "running" else int(found.checked[-1])


def span(found: training.Result, along: str) -> tuple[float, float]:
    """What the horizontal axis shows: the same from the first step to the last."""
    end, recorded = max(1, _end(found)), _recorded(along)
    if along == STEPS:
        return 0, end
    ends = [end * found.tokens_per_step] + ([recorded.step[-1] * recorded.tokens_per_step] if recorded else [])
    return found.tokens_per_step, max(*ends, 2 * found.tokens_per_step)


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
    if given.params is None:
        st.caption(NOTHING_TO_SHOW)
        return
    shape = {"num_layers", "d_model", "num_heads", "seed"}
    found = run.run(
        "training_tests", training_tests.Params(**given.params.model_dump(include=shape)), key=f"{PREFIX}_tests"
    )
    if found:
        checks.checks(found.checks)
