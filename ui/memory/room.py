"""The What fits view: the largest batch on the card, for texts of every length."""

from __future__ import annotations

import pandas as pd

from engine.experiments import memory
from ui import chart, export, theme
from ui.charts import memory as charts
from ui.charts.memory import Line
from ui.memory.settings import PREFIX, titled

_HEIGHT = 520
_COLOURS = {"full fine-tuning": 1, "LoRA": 0}
_QUANTIZED = 2


def room(params: memory.Params) -> None:
    """A line for each way to train, with and without checkpointing."""
    found = memory.compute(params)
    lines = [
        Line(
            f"{titled(way.name)}{', checkpointing' if way.checkpointing else ''}",
            way.batches,
            _COLOURS.get(way.name, _QUANTIZED),
            way.checkpointing,
        )
        for way in found.rooms
        if any(way.batches)
    ]
    fig = charts.rooms(lines, memory.LENGTHS, (params.length, params.batch), found.context, mode=theme.mode())
    key = f"{PREFIX}_rooms"
    chart.figure(fig, key=key, sentence=sentence(params, found), height=_HEIGHT)
    export.export(fig, key=key, name="memory-fits", experiment="memory", params=params, data=lambda: _table(found))


def sentence(params: memory.Params, found: memory.Result) -> str:
    """Which ways fit at all, and what checkpointing buys the chosen one."""
    none = [way.name for way in found.rooms if not any(way.batches) and way.checkpointing]
    words = f"The largest batch that a card of {params.card} GB has room for, by the length of the texts."
    if none:
        words += (
            f" Not one text of {memory.LENGTHS[0]} tokens fits with {' or '.join(none)}: "
            "no line is drawn for what never fits."
        )
    name = found.ways[found.chosen].name
    plain, again = (
        next(way.batches for way in found.rooms if way.name == name and way.checkpointing is on) for on in (False, True)
    )
    fitting = [(length, one, other) for length, one, other in zip(memory.LENGTHS, plain, again, strict=True) if other]
    if fitting:
        length, one, other = fitting[0]
        words += (
            f" With {name}, at {length:,} tokens, {f'it is {one:,}' if one else 'not one fits'}, and {other:,} with "
            "checkpointing, which computes the forward pass twice in exchange."
        )
    if len(fitting) > 1:
        length, one, other = fitting[1]
        words += (
            f" At {length:,} tokens {f'it is {one:,}' if one else 'not one fits'}, and {other:,} with it: attention "
            "is fused and keeps no weights, so that what a text takes grows about in proportion to its length."
        )
    return f"{words} {_beyond(params, found)}"


def _beyond(params: memory.Params, found: memory.Result) -> str:
    """What there is beyond the longest texts that the model reads."""
    words = f"{params.shape} reads {found.context:,} tokens at most, the dotted line"
    longer = [length for length in memory.LENGTHS if length > found.context]
    if any(way.batches[memory.LENGTHS.index(longer[0])] for way in found.rooms):
        return f"{words}: right of it there is room, and no use."
    if any(any(way.batches) for way in found.rooms):
        return f"{words}: of {longer[0]:,} tokens or more not one text would fit."
    return f"{words}."


def _table(found: memory.Result) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"way": way.name, "checkpointing": way.checkpointing, "length": length, "largest_batch": batch}
            for way in found.rooms
            for length, batch in zip(memory.LENGTHS, way.batches, strict=True)
        ]
    )
