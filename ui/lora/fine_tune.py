"""The Fine-tune view: a model learns facts that it cannot know, and is asked before and after."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import _lora, lora
from ui import chart, export, run, theme
from ui.charts import training as charts
from ui.lora.settings import PREFIX, RUN, Settings, probability, size
from ui.prose import plain

_HEIGHT = 320
_TABLE_HEIGHT = 420
_EXAMPLES = 3
_ALL, _LEARNED, _PARAPHRASED = "All", "Training questions", "Paraphrases"


def fine_tune(given: Settings) -> None:
    """What is to be learned until a run is started; then the curves as they grow, and the answers."""
    if given.started is None:
        _before(given.params)
        return
    run.watch("lora", given.started, _draw, key=RUN, height=_HEIGHT)


def _before(params: lora.Params) -> None:
    facts = _lora.parse_facts(params.facts) if params.facts.strip() else _lora.read_facts()
    st.info(
        plain(
            "Nothing is trained yet in this session; a link brings settings, not results. Press “Train”: the model "
            f"learns {len(facts)} facts "
            f"{'of yours' if params.facts.strip() else 'about a town that nobody has written about'}, which it cannot "
            "know, and you see its answers before and after."
        ),
        icon=":material/school:",
    )
    st.markdown("**What it is to learn**")
    chosen = facts[:: max(1, len(facts) // _EXAMPLES)][:_EXAMPLES]
    st.table(
        pd.DataFrame(
            {
                "Trained on": [plain(fact.training[0]) for fact in chosen],
                "Answer": [plain(fact.answer) for fact in chosen],
                "Asked, but never trained on": [
                    plain(fact.paraphrases[0]) if fact.paraphrases else "—" for fact in chosen
                ],
            }
        ),
        border="horizontal",
        hide_index=True,
    )
    st.caption(
        "Write your own under “Your own facts”, one a line: “Who lives in the red house? Mina” or "
        "“Who lives in the red house? | Mina”."
    )


def _draw(found: lora.Result, params: lora.Params) -> None:
    _state(found, params)
    left, right = st.columns(2, gap="small")
    with left:
        _loss(found, params)
    with right:
        _accuracy(found, params)
    _answers(found)


def ending_sentence(found: lora.Result, params: lora.Params) -> str:
    """How the run ended and, where its learning rate was too high, which one its method begins with."""
    own = lora.LEARNING_RATES[params.method]
    if found.ended != "diverged" or params.rate <= own:
        return found.ending
    return f"{found.ending} What suits {params.method} here is about {own:g}: “the method's own”."


def _state(found: lora.Result, params: lora.Params) -> None:
    """How a run stands, in one place of one height whether it is running or not."""
    if found.ended == "running":
        speed = f"{np.median(found.tokens_per_second):,.0f} tokens/s · " if len(found.tokens_per_second) else ""
        st.caption(
            plain(f"{found.ending} {speed}{size(found.peak_memory_bytes)} of memory at its peak · {found.device}")
        )
        return
    words = plain(
        f"{ending_sentence(found, params)} {found.seconds:.0f} s on {found.device}, torch {found.versions['torch']}, "
        f"{size(found.peak_memory_bytes)} at its peak. {found.trainable:,} of {found.parameters:,} numbers were "
        f"trained, with a learning rate up to {found.learning_rate:g}."
    )
    said, file = st.columns([4, 1.1], vertical_alignment="center")
    if found.ended == "diverged":
        said.warning(words, icon=":material/trending_up:")
    elif found.ended in ("cancelled", "timed out"):
        said.info(words, icon=":material/info:")
    else:
        said.caption(words)
    if found.archive:
        file.download_button(
            "Save adapter",
            found.archive,
            f"{params.model}-rank-{params.rank}.zip",
            "application/zip",
            key=f"{PREFIX}_archive",
            icon=":material/download:",
            on_click="ignore",
            width="stretch",
            help=f"{size(len(found.archive))}, zipped: adapter_model.safetensors and adapter_config.json, which "
            "peft.PeftModel.from_pretrained opens, and the view “Your adapter” here.",
        )


def loss_sentence(found: lora.Result) -> str:
    """What the loss did, in words."""
    if not len(found.loss):
        return "The loss appears with the first step."
    latest = found.loss[-charts.WINDOW :]
    last = float(latest.mean())
    over = f", the mean of the last {len(latest)} steps" if len(latest) > 1 else ""
    return (
        f"{'So far the' if found.ended == 'running' else 'The'} loss went from {found.loss[0]:.2f} nats a token of the "
        f"answers to {last:.2g}{over}: the right token had {probability(found.loss[0])} of the probability, "
        f"{'now' if found.ended == 'running' else 'at the end'} {probability(last)}."
    )


def accuracy_sentence(found: lora.Result) -> str:
    """How many answers are right, in words."""
    if not len(found.accuracy):
        return "The first answers come in a moment."
    words = (
        "Of the facts, each asked in one of the wordings that it trains on, "
        f"{found.accuracy[0]:.0%} were answered rightly before the first step and "
        f"{found.accuracy[-1]:.0%} {'by now' if found.ended == 'running' else 'at the end'}"
    )
    if not len(found.held_out_accuracy):
        return f"{words}. Your own facts have no paraphrases."
    words += f"; of the paraphrases, which it never trains on, {found.held_out_accuracy[-1]:.0%}."
    gap = found.accuracy[-1] - found.held_out_accuracy[-1]
    if gap > 0.15 and found.ended != "running":
        words += " What it learned is tied to the wording: some answers come with the known question only."
    return words


def _span(found: lora.Result) -> tuple[float, float]:
    """What the horizontal axis shows: the same from the first step to the last."""
    taken = int(found.step[-1]) if len(found.step) else 0
    return 0, max(1, found.steps if found.ended == "running" else taken)


def _loss(found: lora.Result, params: lora.Params) -> None:
    fig = charts.curves(
        [charts.Line("training loss", found.step, found.loss, 0, raw=True)],
        across="step",
        up="loss, nats a token",
        span=_span(found),
        mode=theme.mode(),
    )
    key = f"{PREFIX}_loss"
    chart.figure(fig, key=key, sentence=loss_sentence(found), height=_HEIGHT)
    export.export(fig, key=key, name="lora-loss", experiment="lora", params=params, data=lambda: _steps(found))


def _accuracy(found: lora.Result, params: lora.Params) -> None:
    lines = [charts.Line("training questions", found.checked, found.accuracy, 1)]
    if len(found.held_out_accuracy):
        lines.append(charts.Line("paraphrases", found.checked, found.held_out_accuracy, 0))
    fig = charts.curves(lines, across="step", up="answers right", share=True, span=_span(found), mode=theme.mode())
    key = f"{PREFIX}_accuracy"
    chart.figure(fig, key=key, sentence=accuracy_sentence(found), height=_HEIGHT)
    export.export(fig, key=key, name="lora-accuracy", experiment="lora", params=params, data=lambda: _checkups(found))


def _steps(found: lora.Result) -> pd.DataFrame:
    columns = {"step": found.step, "loss": found.loss, "tokens_per_second": found.tokens_per_second}
    if len(found.grad_norm_a):
        columns |= {"grad_norm_a": found.grad_norm_a, "grad_norm_b": found.grad_norm_b}
    return pd.DataFrame(columns)


def _checkups(found: lora.Result) -> pd.DataFrame:
    columns = {"step": found.checked, "accuracy": found.accuracy}
    if len(found.held_out_accuracy):
        columns["held_out_accuracy"] = found.held_out_accuracy
    return pd.DataFrame(columns)


def answers_sentence(answers: list[lora.Answer], ended: lora.Ending) -> str:
    """How the answers changed, in words."""
    before, after = (sum(getattr(answer, side) for answer in answers) for side in ("right_before", "right_after"))
    if ended == "running":
        return f"{before} of {len(answers)} answers were right before; what it says now comes when the training ends."
    lost = sum(answer.right_before and not answer.right_after for answer in answers)
    words = f"{before} of {len(answers)} answers were right before, {after} are now."
    if lost:
        words += f" {lost} that had been right became wrong."
    return words + (" Those that are wrong come first." if 0 < after < len(answers) else "")


def _answers(found: lora.Result) -> None:
    head, choice = st.columns([1, 2], vertical_alignment="bottom")
    head.subheader("What it answers", anchor=False)
    kinds = {
        _ALL: found.answers,
        _LEARNED: [answer for answer in found.answers if not answer.held_out],
        _PARAPHRASED: [answer for answer in found.answers if answer.held_out],
    }
    shown = _ALL
    if all(kinds.values()):
        shown = choice.segmented_control(
            "Questions",
            list(kinds),
            default=_ALL,
            required=True,
            key=f"{PREFIX}_answers",
            bind="query-params",
            label_visibility="collapsed",
        )
    answers = sorted(kinds[shown], key=lambda answer: answer.right_after)
    st.caption(plain(answers_sentence(answers, found.ended)))
    with st.container(height=_TABLE_HEIGHT, border=False, key=f"{PREFIX}_answer_table"):
        st.table(
            pd.DataFrame(
                {
                    "Question": [
                        plain(answer.question) + (" :gray[(paraphrase)]" if answer.held_out else "")
                        for answer in answers
                    ],
                    "Answer": [plain(answer.expected) for answer in answers],
                    "Before": [_marked(answer.before, answer.right_before) for answer in answers],
                    "After": [
                        "…" if found.ended == "running" else _marked(answer.after, answer.right_after)
                        for answer in answers
                    ],
                }
            ),
            border="horizontal",
            hide_index=True,
        )


def _marked(said: str, right: bool) -> str:
    mark = ":green-badge[:material/check: right]" if right else ":red-badge[:material/close: wrong]"
    return f"{mark} {plain(said) or '(nothing)'}"
