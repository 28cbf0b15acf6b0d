"""The Through a step view: what is held at every moment of one training step."""

from __future__ import annotations

import pandas as pd

from engine.experiments import memory
from engine.experiments._memory import PARTS
from ui import chart, export, theme
from ui.charts import memory as charts
from ui.charts.memory import Stack, amount
from ui.memory.settings import PREFIX, titled

_HEIGHT = 640


def step(params: memory.Params) -> None:
    """The moments from top to bottom; the largest of them is the peak."""
    found = memory.compute(params)
    peak = max(moment.total for moment in found.moments)
    bars = [Stack(titled(moment.name), moment.parts, moment.total == peak) for moment in found.moments]
    fig = charts.stacks(bars, card=found.card_bytes, mode=theme.mode())
    key = f"{PREFIX}_moments"
    chart.figure(fig, key=key, sentence=sentence(found), height=_HEIGHT)
    export.export(fig, key=key, name="memory-step", experiment="memory", params=params, data=lambda: _table(found))


def sentence(found: memory.Result) -> str:
    """When the peak is, and why the others are lower."""
    peak = max(found.moments, key=lambda moment: moment.total)
    last = found.moments[-1]
    way = found.ways[found.chosen].name
    words = (
        f"{titled(way)}, from top to bottom through one step: most is held at {peak.name}, {amount(peak.total)}. "
        f"Activations grow through the forward pass and are given back, block by block, on the way back, while the "
        f"gradients of what is trained come in; the update needs {amount(last.total)}."
    )
    loss = peak.parts.get("logits and loss", 0)
    if peak.name == "the gradient of the loss":
        words += (
            f" The logits' part, {amount(loss)}, is three numbers in float32 for every token and every word of the "
            "vocabulary: the log-probabilities, and their gradient twice."
        )
    return words


def _table(found: memory.Result) -> pd.DataFrame:
    rows = [{"moment": moment.name, **moment.parts, "total": moment.total} for moment in found.moments]
    return pd.DataFrame(rows).reindex(columns=["moment", *(part for part in PARTS), "total"]).fillna(0)
