"""The Speed view: what a training step costs on a GPU, as it was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from engine.experiments import _lora
from engine.experiments._lora import RecordedSteps, StepCost
from ui import chart, export, theme
from ui.charts import lora as charts
from ui.lora.settings import PREFIX, Settings, count
from ui.prose import plain

_HEIGHT = 760
_BENCHMARK = "tests.benchmarks.lora_training_step"

_TELLING = 7  # steps in which repeated runs stay together; there are eight batches

Ways = dict[str, tuple[int, str, int | None]]

WAYS: Ways = {
    "frozen": (1, "frozen, transformers' code, no adapters", None),
    "ours, Decoder": (2, "ours, our Decoder", 0),
    "ours": (2, "ours, transformers' code", 0),
    "ours bf16, Decoder": (2, "ours, our Decoder, bfloat16 adapters", 0),
    "ours bf16": (2, "ours, transformers' code, bfloat16 adapters", 0),
    "ours, Decoder compiled": (2, "ours, our Decoder, compiled", 0),
    "ours compiled": (2, "ours, transformers' code, compiled", 0),
    "PEFT, Decoder": (3, "PEFT, our Decoder", 1),
    "PEFT": (3, "PEFT, transformers' code", 1),
    "PEFT bf16, Decoder": (3, "PEFT, our Decoder, bfloat16 adapters", 1),
    "PEFT bf16": (3, "PEFT, transformers' code, bfloat16 adapters", 1),
    "PEFT compiled": (3, "PEFT, transformers' code, compiled", 1),
    "full, Decoder": (4, "full fine-tuning, our Decoder", 2),
    "full": (4, "full fine-tuning, transformers' code", 2),
}
"""Group, label and colour of each way of training that is drawn, in that order."""


def speed(given: Settings) -> None:
    """Times and memory of a step, and what they say."""
    found = _lora.recorded_steps()
    if found is None:
        st.info("The recording is not there: engine/recorded is missing from this installation.")
        return
    st.caption(
        plain(
            f"Nothing is measured here, and the controls change nothing here: {found.provenance}, transformers "
            f"{found.versions['transformers'].rpartition('.')[0]}. A Llama-shaped model of {count(found.parameters)} "
            f"parameters, {found.dtype}, {found.workload}, AdamW."
        )
    )
    key = f"{PREFIX}_speed"
    fig = charts.steps(bars(found), found.provenance, mode=theme.mode())
    chart.figure(fig, key=key, sentence=speed_sentence(found), height=_HEIGHT)
    export.export(fig, key=key, name="lora-speed", experiment="lora", params=given.params, data=lambda: table(found))
    _told(("Why.", precision_sentence(found)), ("What LoRA saves.", saving_sentence(found)))
    with st.expander("Where the rest goes, and how sure this is", icon=":material/query_stats:"):
        _told(
            ("Where the rest goes.", rest_sentence(found)),
            ("Same losses?", loss_sentence(found)),
            ("The runs.", runs_sentence(found)),
        )
        st.markdown(f"On a GPU of your own, `python -m {_BENCHMARK}` measures all of it again.")


def _told(*paragraphs: tuple[str, str]) -> None:
    for heading, text in paragraphs:
        st.markdown(f"**{heading}** {plain(text)}")


def bars(found: RecordedSteps, ways: Ways = WAYS) -> list[charts.StepBar]:
    """The floor and every one of `ways` that was recorded, as they are drawn."""
    latest = found.latest
    floor = charts.StepBar("floor, by arithmetic", 0, found.floor_ms, None, None, None)
    return [floor] + [
        charts.StepBar(
            label=label,
            group=group,
            median_ms=latest[way].median_ms,
            spread_ms=(latest[way].low_ms, latest[way].high_ms),
            peak_gb=_gigabytes(latest[way]),
            colour=colour,
        )
        for way, (group, label, colour) in ways.items()
        if way in latest
    ]


def speed_sentence(found: RecordedSteps) -> str:
    """Ours beside PEFT, on different and on equal code of the model, in words."""
    cost = found.latest
    return (
        "A step with ours beside one with PEFT, on equal code of the model: in transformers' "
        f"{_pair(cost['ours'], cost['PEFT'])}; in our Decoder {_pair(cost['ours, Decoder'], cost['PEFT, Decoder'])}; "
        f"in transformers' and compiled {_pair(cost['ours compiled'], cost['PEFT compiled'])}. Ours in our Decoder "
        f"beside PEFT in transformers' code: {_pair(cost['ours, Decoder'], cost['PEFT'])}. Bars are medians, whiskers "
        "go from the 10th to the 90th percentile."
    )


def precision_sentence(found: RecordedSteps) -> str:
    """What ours leaves out that PEFT does, and what PEFT takes without it."""
    cost = found.latest
    words = (
        "PEFT keeps the adapters of a bfloat16 model in float32 and multiplies in float32, for which it casts what "
        "goes in and out; ours keeps them in float32 too, but multiplies in the model's bfloat16, adds inside the "
        "products, and shares one product between projections that read the same input."
    )
    pairs = [
        ("transformers' code", "ours bf16", "PEFT bf16"),
        ("our Decoder", "ours bf16, Decoder", "PEFT bf16, Decoder"),
    ]
    told = [f"in {code} {_pair(cost[ours], cost[peft])}" for code, ours, peft in pairs if {ours, peft} <= cost.keys()]
    if not told:
        return words
    return (
        f"{words} With both in bfloat16 throughout that gain is gone: {'; '.join(told)}; where whiskers are long, the "
        "step waits for the processor."
    )


def saving_sentence(found: RecordedSteps) -> str:
    """What adapters save against full fine-tuning, and what they do not."""
    cost = found.latest
    full, ours = cost["full, Decoder"], cost["ours, Decoder"]
    words = (
        "The gradients of the weights and the optimizer's state, but not the forward pass nor the gradients of the "
        f"activations. In our Decoder full fine-tuning takes {full.median_ms:.1f} ms and {_gigabytes(full):.1f} GB, "
        f"LoRA {ours.median_ms:.1f} ms and {_gigabytes(ours):.1f} GB."
    )
    full, adapted = cost["full"], {"ours": cost["ours"], "PEFT": cost["PEFT"]}
    times = f"{full.median_ms:.1f} ms full, " + ", ".join(
        f"{step.median_ms:.1f} with {name}" for name, step in adapted.items()
    )
    slower = [
        f"{name}'s" if name == "PEFT" else name for name, step in adapted.items() if step.median_ms > full.median_ms
    ]
    if slower:
        return f"{words} In transformers' code, eager, {' and '.join(slower)} cost more time than they save: {times}."
    return f"{words} In transformers' code it is {times}."


def rest_sentence(found: RecordedSteps) -> str:
    """What lies between the floor and the fastest eager step of ours, in words."""
    ours = found.latest["ours, Decoder"]
    words = (
        f"The floor, {found.floor_ms:.0f} ms, is the model's two passes, forward and the gradient of the activations, "
        "at the speed of a bfloat16 product of 8192³ measured in the same run; full fine-tuning needs a third. From "
        f"there to {ours.median_ms:.0f} ms: norms, rotary embedding, attention, the loss over {found.vocab_size:,} "
        "logits and the adapters' thin products calculate little for the bytes that they move, so that memory "
        "traffic bounds them. And an eager step waits wherever the processor launches small kernels more slowly than "
        "the GPU finishes them."
    )
    ours, peft = ([cost.median_ms for cost in found.measured if cost.way == way] for way in ("ours, Decoder", "PEFT"))
    if len(ours) > 1:
        words += (
            f" On {len(ours)} machines with this GPU the same step took from {min(ours):.0f} to {max(ours):.0f} ms, "
            f"PEFT's from {min(peft):.0f} to {max(peft):.0f}: the less the GPU has to do, the more it is the "
            "processor that counts."
        )
    if found.profiled is not None:
        kernels = found.kernels
        words += (
            f" A profile of our Decoder has {kernels['mm']:.0%} of the kernels' time in plain products (mm), "
            f"{kernels['addmm']:.0%} in products that add to a result (addmm), as the adapters' do, "
            f"{kernels['attention']:.0%} in attention and {1 - sum(kernels.values()):.0%} in everything else."
        )
    return words


def loss_sentence(found: RecordedSteps) -> str:
    """Whether ours learns what PEFT learns, beside repeated runs and one from another start."""
    if not found.losses:
        return "They were not compared."
    pairs = (("ours", "PEFT"), ("PEFT", "PEFT again"), ("ours", "ours again"), ("PEFT", "PEFT, other A"))
    early, next_step, all_steps = (
        [found.loss_difference(*pair, steps) for pair in pairs] for steps in (_TELLING, _TELLING + 1, None)
    )
    ours, *repeated, other = early
    if other > 2 * max(ours, *repeated):
        verdict = "there another start would be seen"
    else:
        verdict = "even there the comparison cannot tell another start from the same"
    return (
        f"Over the first {_TELLING} steps from the same start, in transformers' code, the losses of ours and of PEFT "
        f"differ by {ours:.3f} nats a token at most, those of PEFT run twice by {repeated[0]:.3f}, of ours run twice "
        f"by {repeated[1]:.3f}, of PEFT from another A by {other:.3f}: {verdict}. The comparison is weak after that, "
        f"as runs drift apart by themselves: with one step more these are {_listed(next_step, 3)}, over all "
        f"{len(found.losses['ours'])} steps {_listed(all_steps, 2)}, and for ours with adapters in bfloat16 "
        f"{found.loss_difference('ours bf16', 'PEFT'):.2f} from PEFT."
    )


def runs_sentence(found: RecordedSteps) -> str:
    """What is to be known about each run; of a way that several runs measured the last is drawn."""
    notes = " ".join(f"“{note}”" for note in found.notes)
    return notes if len(found.notes) == 1 else f"{notes} Of a way that several runs measured, the last is drawn."


def table(found: RecordedSteps) -> pd.DataFrame:
    """Every way in every run, with the floor: the numbers behind the figure and those that a later run replaced."""
    rows = [
        {
            "way": cost.way,
            "median_ms": cost.median_ms,
            "low_ms": cost.low_ms,
            "high_ms": cost.high_ms,
            "peak_gb": _gigabytes(cost),
            "timed_steps": cost.timed,
            "drawn": found.latest[cost.way] is cost,
            "note": found.notes[cost.run],
        }
        for cost in found.measured
    ]
    floor = {"way": "floor", "median_ms": found.floor_ms, "drawn": True, "note": found.notes[-1]}
    return pd.DataFrame([*rows, floor]).assign(provenance=found.provenance)


def _listed(numbers: Sequence[float], digits: int) -> str:
    *first, last = (f"{number:.{digits}f}" for number in numbers)
    return f"{', '.join(first)} and {last}"


def _times(ours: StepCost, theirs: StepCost) -> str:
    return f"{theirs.median_ms / ours.median_ms:.1f}×"


def _pair(ours: StepCost, theirs: StepCost) -> str:
    return (
        f"{ours.median_ms:.1f} against {theirs.median_ms:.1f} ms, {_times(ours, theirs)}, and "
        f"{_gigabytes(ours):.1f} against {_gigabytes(theirs):.1f} GB"
    )


def _gigabytes(cost: StepCost) -> float:
    return cost.peak_bytes / 1e9
