"""The Explore, Code and Tests tabs of the training lab."""

from __future__ import annotations

import io
import zipfile
from pathlib import PurePath

import numpy as np
import pandas as pd
import streamlit as st

from engine import local_models
from engine.experiments import training, training_tests
from engine.experiments._training import SAID_TWICE, recorded_run
from ui import chart, checks, run, source, theme
from ui.charts import training as charts
from ui.labs import ATTENTION
from ui.page import NOTHING_TO_SHOW
from ui.prose import plain
from ui.training import curves, sentences
from ui.training.curves import HEIGHT, STEPS, TOKENS
from ui.training.settings import PREFIX, RUN, Settings, amount

_LOOK_HELP = (
    "Opens the attention lab with this model, on letters and digits without sense, said twice. Scores are measured on "
    "random tokens: there it has learned to look back, and on a sentence said twice the same head may look elsewhere. "
    "The attention lab draws random tokens of its own, so that its figure differs by a few per cent."
)


def explore(given: Settings) -> None:
    """The Explore tab: the curves of the last run as they grow, what it said on the way, and what it cost."""
    if given.started is None and given.params is None:
        st.caption(NOTHING_TO_SHOW)
        return
    if given.started is None:
        _invite()
        return
    run.watch("training", given.started, _draw, key=RUN, height=HEIGHT)


def _invite() -> None:
    """What stands here before the first run."""
    words = (
        "Nothing is trained yet in this session; a link brings settings, not results. Press **Train** and watch a "
        "small model learn here"
    )
    recorded = recorded_run()
    if recorded is None:
        st.info(f"{words}.", icon=":material/school:")
        return
    st.info(
        f"{words}; below is how the storyteller, the model that comes with the workbench, learned.",
        icon=":material/school:",
    )
    curves.storyteller(recorded)


def _draw(found: training.Result, params: training.Params) -> None:
    if found.ended != "running":
        _ending(found)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        along = st.segmented_control(
            "Along",
            (STEPS, TOKENS),
            default=STEPS,
            required=True,
            key=f"{PREFIX}_along",
            bind="query-params",
            help="Steps of different runs hold different numbers of tokens; along the tokens they can be compared.",
        )
        if found.ended != "running":
            _buttons(found)
    left, right = st.columns(2, gap="small")
    with left:
        curves.loss(found, params, along)
    with right:
        curves.heads(found, params, along)
    curves.look_back(found)
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
        f"{found.ending} {found.seconds:.0f} s on {found.device}, torch {found.versions['torch']}. The "
        f"text has {found.training_tokens:,} tokens to learn from; its last tenth, {found.held_out_tokens:,} tokens, "
        "was held out."
    )
    if found.ended == "diverged":
        st.warning(words, icon=":material/trending_up:")
    elif found.ended in ("cancelled", "timed out"):
        st.info(words, icon=":material/info:")
    else:
        st.caption(words)


def _buttons(found: training.Result) -> None:
    """What can be done with the model, in the row of a control that is there before: the charts stay where they are."""
    st.space("stretch")
    if st.button("Look at its heads", key=f"_{PREFIX}_look", icon=ATTENTION.icon, help=_LOOK_HELP):
        _look(found)
    st.download_button(
        "Save model",
        found.archive,
        f"{training.ARCHIVE_FOLDER}.zip",
        "application/zip",
        key=f"{PREFIX}_model",
        icon=":material/download:",
        on_click="ignore",
        help=f"What it has learned, {amount(len(found.archive))}B: weights, config and tokenizer in a folder. "
        "Unpacked, it opens in the attention lab by its path, and in transformers.",
    )


def _look(found: training.Result) -> None:
    """Open the attention lab with the model and its best induction head, on a text on which it looks back."""
    with zipfile.ZipFile(io.BytesIO(found.archive)) as archive:
        files = {PurePath(name).name: archive.read(name) for name in archive.namelist()}
    try:
        folder = local_models.keep_upload(files)
    except OSError:
        st.error(
            "The model could not be kept on the server's disk: save it, and open its folder in the attention lab.",
            icon=":material/folder_off:",
        )
        return
    layer, head = found.heads[-1]
    shown = {"model": folder, "text": SAID_TWICE, "layer": layer, "head": head}
    st.switch_page(
        ATTENTION.script, query_params={f"{ATTENTION.url_path}_{name}": str(value) for name, value in shown.items()}
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
                [curves.line(name, found, found.step, values, along, 0, raw=raw)],
                across="tokens read" if along == TOKENS else "step",
                up=title,
                logarithmic=along == TOKENS,
                span=curves.span(found, along),
                mode=theme.mode(),
            )
            chart.figure(fig, key=f"{PREFIX}_course_{name.split()[0]}", sentence=f"{name}: {sentence}", height=240)


def _samples(found: training.Result) -> None:
    st.header("What it says", anchor=False)
    st.caption(plain(f"The same prompt, “{found.prompt}”, and the same dice at every step."))
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
