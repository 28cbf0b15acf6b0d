"""The Speed view: what a training step on 4-bit weights costs on a GPU, as it was recorded."""

from __future__ import annotations

import streamlit as st

from engine.experiments import _lora, memory
from engine.experiments._lora import RecordedSteps, StepCost
from ui import chart, export, theme
from ui.charts import lora as charts
from ui.lora.speed import bars, table
from ui.memory.settings import PREFIX
from ui.prose import plain

_HEIGHT = 420
_BENCHMARK = "tests.benchmarks.qlora_training_step"
WAYS = {
    "ours, Decoder": (1, "ours, our Decoder", 0),
    "ours": (1, "ours, transformers' code", 0),
    "PEFT": (2, "PEFT on bitsandbytes' layers, transformers' code", 1),
}
"""Group, label and colour of each way of training that is drawn, in that order."""


def qlora_step(params: memory.Params) -> None:
    """Times and memory of a step, and what they say."""
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
    st.markdown(plain(reason(found)))
    st.markdown(f"On a GPU of your own, `python -m {_BENCHMARK}` measures it again.")


def sentence(found: RecordedSteps) -> str:
    """Ours beside PEFT in the last run that has both, in words."""
    cost = found.latest
    return (
        f"A step takes {_pair(cost['ours, Decoder'], cost['PEFT'])} with ours in our Decoder against PEFT in "
        f"transformers' code; on equal code, transformers', {_pair(cost['ours'], cost['PEFT'])}. Bars are medians, "
        "whiskers go from the 10th to the 90th percentile."
    )


def reason(found: RecordedSteps) -> str:
    """What the memory goes to, and what the time, in words."""
    runs = [
        f"{ours.median_ms:.0f} against {peft.median_ms:.0f} ms"
        for ours in found.measured
        for peft in found.measured
        if (ours.way, peft.way) == ("ours, Decoder", "PEFT") and ours.run == peft.run
    ]
    told = f" On {len(runs)} machines with this GPU it was {' and '.join(runs)}." if len(runs) > 1 else ""
    return (
        "Both keep the same 4-bit weights. Ours dequantizes one matrix at a time, in the forward and again in the "
        "backward pass, and saves only x and x·A for the latter; PEFT's adapters cast their input to float32 and save "
        "it too, which is most of the difference in memory. In time the GPU is not the limit: an eager step starts "
        f"thousands of small kernels, and the processor is slower at that than the GPU at finishing them.{told}"
    )


def _pair(ours: StepCost, theirs: StepCost) -> str:
    return (
        f"{ours.median_ms:.0f} against {theirs.median_ms:.0f} ms and "
        f"{ours.peak_bytes / 1e9:.1f} against {theirs.peak_bytes / 1e9:.1f} GB"
    )
