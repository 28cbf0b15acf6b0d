"""The Layer map view: the error of every linear layer of a model, each a way to its weights."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import quantization_map
from ui import chart, clicks, export, run, theme
from ui.charts import quantization_layers as charts
from ui.prose import plain
from ui.quantization.sentences import decibels, kind_labels, layer_label
from ui.quantization.settings import PREFIX, VIEW, WEIGHTS, Settings, choose_layer, chosen_layer

_RUN, _FIGURE = f"{PREFIX}_map_run", f"{PREFIX}_map"
_ROW, _HEIGHT, _TALLEST = 36, 260, 720


def layer_map(given: Settings) -> None:
    """The map, as its layers come."""
    run.watch("quantization_map", given.params, _draw, key=_RUN, height=_HEIGHT)
    clicks.on_cell_click(_FIGURE, _open)  # out here, for a click changes more than what `_draw` draws


def height(rows: int) -> int:
    """Of a map with so many rows, in pixels."""
    return min(_TALLEST, _HEIGHT + _ROW * rows)


def _draw(found: quantization_map.Result, params: quantization_map.Params) -> None:
    places = {name: (y, x) for y, row in enumerate(found.names) for x, name in enumerate(row) if name}
    fig = charts.layer_map(
        found.relative_error,
        found.blocks,
        kind_labels(found.kinds),
        title="rms error / rms weight",
        tickformat=".2~p",
        hover=[[_hover(found, y, x) for x in range(len(found.kinds))] for y in range(len(found.blocks))],
        chosen=places.get(chosen_layer()),
        mode=theme.mode(),
    )
    if found.ended != "running" and found.ended != "finished":
        st.caption(plain(found.ending))
    chart.figure(
        fig,
        key=_FIGURE,
        sentence=f"{found.sentence} Choose a layer to see its weights.",
        height=height(len(found.blocks)),
    )
    export.export(
        fig,
        key=_FIGURE,
        name="quantization-map",
        experiment="quantization_map",
        params=params,
        data=lambda: _table(found),
    )
    if found.left:
        kept = (
            "1 matrix keeps its precision"
            if len(found.left) == 1
            else f"{len(found.left)} matrices keep their precision"
        )
        with st.expander(kept, icon=":material/shield:"):
            for left in found.left:
                shape = " × ".join(f"{side:,}" for side in left.shape)
                st.markdown(f"**{plain(left.name)}**, {shape}: {plain(left.reason)}")


def _hover(found: quantization_map.Result, y: int, x: int) -> str:
    name = found.names[y][x]
    if not name:
        return ""
    outputs, inputs = found.shapes[name]
    label = layer_label(found.blocks[y], kind_labels(found.kinds)[x])
    return (
        f"{label}, {outputs:,} × {inputs:,}<br>"
        f"rms error {found.relative_error[y, x]:.2%} of the rms weight<br>"
        f"signal to noise {decibels(float(found.sqnr_db[y, x]))}"
    )


def _open(x: int, y: int) -> None:
    """Take a layer of the finished map as the source of weights and go to them."""
    found = run.latest(_RUN)
    if found and y < len(found.names) and x < len(found.names[y]) and (name := found.names[y][x]):
        choose_layer(name, run.params_of(_RUN).model)
        st.session_state[VIEW] = WEIGHTS


def _table(found: quantization_map.Result) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "layer": name,
                "outputs": found.shapes[name][0],
                "inputs": found.shapes[name][1],
                "relative_error": found.relative_error[y, x],
                "sqnr_db": found.sqnr_db[y, x],
            }
            for y, row in enumerate(found.names)
            for x, name in enumerate(row)
            if name
        ]
    )
