"""The Speed view: what a training step on 4-bit weights costs on a GPU, as it was recorded, and whether it learns."""

from __future__ import annotations

import numpy as np
import streamlit as st

from engine.experiments import _lora, memory
from engine.experiments._lora import RecordedSteps, StepCost
from ui import chart, export, theme
from ui.charts import lora as charts
from ui.charts import training
from ui.lora.speed import bars, table
from ui.memory.settings import PREFIX
from ui.prose import plain

_HEIGHT, _LOSS_HEIGHT = 420, 380
_BENCHMARK = "tests.benchmarks.qlora_training_step"
_TARGET = 2.5
"""How many times as fast as PEFT's step ours is to be, eager against eager."""

_EARLY = 8  # steps before batches come again, of which there are eight

WAYS = {
    "ours, Decoder": (1, "ours, our Decoder", 0),
    "ours, Decoder, captured": (1, "ours, our Decoder, as CUDA graphs", 0),
    "ours": (1, "ours, transformers' code", 0),
    "PEFT": (2, "PEFT on bitsandbytes' layers, transformers' code", 1),
}
"""Group, label and colour of each way of training that is drawn, in that order."""

LOSSES = {
    "PEFT": ("PEFT", 1, False),
    "PEFT again": ("PEFT, run again", 1, True),
    "ours": ("ours, transformers' code", 2, False),
    "ours, Decoder": ("ours, our Decoder", 0, False),
    "ours, Decoder, captured": ("ours, our Decoder, as CUDA graphs", 0, True),
}
"""Label and colour of each run whose losses are drawn, and whether it is dotted, in that order."""


def qlora_step(params: memory.Params) -> None:
    """Times and memory of a step, the target that they were to reach, and the losses."""
    found = _lora.recorded_steps("qlora")
    if found is None:
        st.info("The recording is not there: engine/recorded is missing from this installation.")
        return
    st.caption(
        plain(
            f"Nothing is measured here, and the controls change nothing here: {found.provenance}. The Llama-shaped "
            "model of 1.1 B parameters, its projections in NF4 with double quantization and the rest in "
            f"{found.dtype}, {found.workload}, bitsandbytes' paged 8-bit AdamW."
        )
    )
    key = f"{PREFIX}_qlora_step"
    fig = charts.steps(bars(found, WAYS), found.provenance, mode=theme.mode())
    chart.figure(fig, key=key, sentence=sentence(found), height=_HEIGHT)
    export.export(fig, key=key, name="qlora-step", experiment="memory", params=params, data=lambda: table(found))
    st.markdown(f"**The target.** {plain(target(found))}")
    st.markdown(f"**Why.** {plain(reason(found))}")
    _losses(found, params)
    st.markdown(f"On a GPU of your own, `python -m {_BENCHMARK}` measures it again; it needs PEFT and transformers.")


def sentence(found: RecordedSteps) -> str:
    """Ours beside PEFT in the last run that has both, in words."""
    cost = found.latest
    return (
        f"A step takes {_pair(cost['ours, Decoder'], cost['PEFT'])} with ours in our Decoder against PEFT in "
        f"transformers' code; on equal code, transformers', {_pair(cost['ours'], cost['PEFT'])}. Bars are medians, "
        "whiskers go from the 10th to the 90th percentile."
    )


def target(found: RecordedSteps) -> str:
    """What was aimed at, and how far every recorded machine is from it."""
    pairs = _beside_peft(found, "ours, Decoder")
    machines = [
        f"{_times(ours, peft):.2f} times as long ({peft.median_ms:.0f} against {ours.median_ms:.0f} ms)"
        for ours, peft in pairs
    ]
    equal = [f"{_times(ours, peft):.2f}" for ours, peft in _beside_peft(found, "ours")]
    fast = all(_times(ours, peft) >= _TARGET for ours, peft in pairs)
    light = all(ours.peak_bytes <= peft.peak_bytes for ours, peft in pairs)
    words = (
        f"A step at least {_TARGET:g} times as fast as PEFT's, eager against eager, with no more memory and the same "
        f"losses. In time it is {'reached' if fast else 'missed'}: PEFT in transformers' code takes "
        f"{' and, on another machine with this GPU, '.join(machines)} as ours in our Decoder; on equal code, "
        f"transformers', {' and '.join(equal)} times as long. In memory it is {'reached' if light else 'missed'}."
    )
    captured = _beside_peft(found, "ours, Decoder, captured")
    if captured:
        words += (
            " As CUDA graphs, which need no compiler but are not eager either, ours takes "
            f"{' and '.join(f'{ours.median_ms:.0f}' for ours, _ in captured)} ms, so that PEFT's eager step takes "
            f"{' and '.join(f'{_times(*pair):.2f}' for pair in captured)} times as long, with "
            f"{' and '.join(f'{ours.peak_bytes / 1e9:.1f}' for ours, _ in captured)} GB."
        )
    return words


def reason(found: RecordedSteps) -> str:
    """What the memory goes to, and what the time, in words."""
    return (
        "In time the GPU is not the limit: an eager step starts thousands of small kernels, and the processor is "
        f"slower at that than the GPU at finishing them; the model's arithmetic alone would take {found.floor_ms:.0f} "
        "ms. Where the processor decides, other machines with the same GPU give other times and the whiskers are long; "
        "as CUDA graphs the same kernels start without it. Ours updates all adapters at once, PEFT each by itself; "
        "else the two differ on equal code in their adapters alone. In memory, both keep the same 4-bit weights. Ours "
        "dequantizes one matrix at a time, in the forward and again in the backward pass, and saves only x and x·A for "
        "the latter; PEFT's adapters cast their input to float32 and save it too, which is most of the difference."
    )


def losses(found: RecordedSteps) -> str:
    """How far ours is from PEFT, beside how far runs are from themselves when they are repeated."""
    far = {
        (one, span): found.loss_difference(one, other, span)
        for one, other in (
            ("ours", "PEFT"),
            ("ours, Decoder", "PEFT"),
            ("PEFT again", "PEFT"),
            ("ours again", "ours"),
            ("PEFT, other A", "PEFT"),
        )
        for span in (_EARLY, None)
    }
    repeated = max(far["PEFT again", None], far["ours again", None])
    nearer = [far[one, None] <= repeated for one in ("ours", "ours, Decoder")]
    verdict = {
        (True, True): "neither of ours is further from PEFT than a run is from its own repetition",
        (True, False): "ours on equal code is no further from PEFT than a run is from its own repetition, ours in our "
        "Decoder is",
        (False, True): "ours in our Decoder is no further from PEFT than a run is from its own repetition, ours on "
        "equal code is",
        (False, False): "both of ours are further from PEFT than a run is from its own repetition",
    }[nearer[0], nearer[1]]

    def listed(span: int | None, digits: int) -> str:
        return (
            f"ours in transformers' code is at most {far['ours', span]:.{digits}f} nats a token from PEFT, ours in our "
            f"Decoder {far['ours, Decoder', span]:.{digits}f}, PEFT run again {far['PEFT again', span]:.{digits}f} and "
            f"PEFT from another A {far['PEFT, other A', span]:.{digits}f} from PEFT, ours run again "
            f"{far['ours again', span]:.{digits}f} from ours"
        )

    return (
        f"From one start and on the same data, over the first {_EARLY} steps, {listed(_EARLY, 3)}. Then runs drift "
        f"apart by themselves, and over all {len(found.losses['PEFT'])} steps {listed(None, 2)}: {verdict}."
    )


def _losses(found: RecordedSteps, params: memory.Params) -> None:
    if not found.losses:
        st.markdown("**Same losses?** They were not compared.")
        return
    st.markdown("**Same losses?**")
    lines = [
        training.Line(
            label, np.arange(1, len(found.losses[run]) + 1), np.array(found.losses[run]), colour, dotted=dotted
        )
        for run, (label, colour, dotted) in LOSSES.items()
        if run in found.losses
    ]
    fig = training.curves(lines, across="step", up="loss, nats a token", note=found.provenance, mode=theme.mode())
    key = f"{PREFIX}_qlora_losses"
    chart.figure(fig, key=key, sentence=losses(found), height=_LOSS_HEIGHT)
    export.export(
        fig,
        key=key,
        name="qlora-losses",
        experiment="memory",
        params=params,
        data=lambda: training.table(lines, "step"),
    )


def _beside_peft(found: RecordedSteps, way: str) -> list[tuple[StepCost, StepCost]]:
    """One way and PEFT in every run that has both."""
    return [
        (ours, peft)
        for ours in found.measured
        for peft in found.measured
        if (ours.way, peft.way) == (way, "PEFT") and ours.run == peft.run
    ]


def _times(ours: StepCost, theirs: StepCost) -> float:
    return theirs.median_ms / ours.median_ms


def _pair(ours: StepCost, theirs: StepCost) -> str:
    return (
        f"{ours.median_ms:.0f} against {theirs.median_ms:.0f} ms and "
        f"{ours.peak_bytes / 1e9:.1f} against {theirs.peak_bytes / 1e9:.1f} GB"
    )
