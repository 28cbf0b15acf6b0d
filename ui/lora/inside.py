"""Inside the update: where it changed the weights, along how many directions, and how its gradients began."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import _lora, lora
from ui import chart, clicks, export, run, theme
from ui.charts import lora as charts
from ui.lora import spectrum
from ui.lora.settings import FULL, PREFIX, RUN, Settings, count
from ui.lora.spectrum import label, place
from ui.prose import plain

_HEIGHT = 380
_MATRIX = f"{PREFIX}_layer"
_FIRST_STEPS = 30
_NOTES = {
    "PiSSA": "PiSSA starts inside the weight, so that the change from it has up to twice the rank.",
    "DoRA": "DoRA also rescales every output, so that the change may have more directions than its rank.",
    FULL: "Nothing held the change to a rank.",
}


def inside(given: Settings) -> None:
    """What was learned, once a run has ended; its gradients while it goes."""
    if given.started is None:
        st.info(
            "There is no update to look into yet. Press **Train**: then you see where it changed the weights, how many "
            "of its directions it really uses, and why A waits for B in the first step.",
            icon=":material/search:",
        )
        return
    run.watch("lora", given.started, _draw, key=RUN, height=_HEIGHT)


def _draw(found: lora.Result, params: lora.Params) -> None:
    if not found.layers:
        if found.ended == "running":
            st.caption("The maps and the singular values come when the training has ended; its gradients are here now.")
        _gradients(found, params)
        return
    chosen = spectrum.choose(found.layers, int(found.relative_norm.argmax()), key=_MATRIX)
    left, right = st.columns(2, gap="small")
    with left:
        _layers(found, params, chosen)
    with right:
        _map(found, params, chosen)
    spectrum.draw(
        found, chosen, key=f"{PREFIX}_inside", experiment="lora", params=params, note=_NOTES.get(params.method, "")
    )
    left, right = st.columns(2, gap="small")
    with left:
        _gradients(found, params)
    with right:
        _merged(found)


def grid(names: list[str], values: np.ndarray) -> tuple[np.ndarray, list[int], list[str]]:
    """`values` by layer and projection, NaN where there is none, with the layers and the projections in their order."""
    places = [place(name) for name in names]
    layers = sorted({layer for layer, _ in places})
    projections = list(dict.fromkeys(projection for _, projection in places))
    table = np.full((len(layers), len(projections)), np.nan)
    for (layer, projection), value in zip(places, values, strict=True):
        table[layers.index(layer), projections.index(projection)] = value
    return table, layers, projections


def layers_sentence(found: lora.Result) -> str:
    """Where the weights changed most and least, in words."""
    most, least = int(found.relative_norm.argmax()), int(found.relative_norm.argmin())
    return (
        f"The weights moved by {found.relative_norm.mean():.1%} of their norm on average: most in "
        f"{label(found.layers[most])} ({found.relative_norm[most]:.1%}), least in {label(found.layers[least])} "
        f"({found.relative_norm[least]:.1%}). Choose a cell to open its matrix."
    )


def _layers(found: lora.Result, params: lora.Params, chosen: int) -> None:
    table, layers, projections = grid(found.layers, found.relative_norm)
    layer, projection = place(found.layers[chosen])
    key = f"{PREFIX}_norms"
    fig = charts.layer_map(
        table,
        layers,
        projections,
        chosen=(layers.index(layer), projections.index(projection)),
    )
    chart.figure(fig, key=key, sentence=layers_sentence(found), height=_HEIGHT)
    clicks.on_cell_click(key, lambda x, y: _open(found.layers, layers, projections, x, y))
    export.export(fig, key=key, name="lora-layers", experiment="lora", params=params, data=lambda: _matrices(found))


def _open(names: list[str], layers: list[int], projections: list[str], x: int, y: int) -> None:
    if y < len(layers) and x < len(projections):
        wanted = (layers[y], projections[x])
        if (name := next((name for name in names if place(name) == wanted), None)) is not None:
            st.session_state[_MATRIX] = name


def map_sentence(name: str, pooled: np.ndarray, method: _lora.Method) -> str:
    """How evenly one matrix was changed, in words."""
    rows, columns = pooled.shape
    middle = float(np.median(pooled))
    words = (
        f"|ΔW| of {label(name)}, inputs down and outputs across, as {columns} × {rows} cells: each shows the largest "
        f"of its numbers, the strongest {pooled.max():.2g}"
    )
    if middle > 0:
        words += f", {pooled.max() / middle:.1f} times the median one"
    if method == FULL:
        return f"{words}. Nothing held it to a low rank: where it still has stripes, few directions were enough."
    return f"{words}. Stripes are what a low rank looks like: a few inputs and outputs share every direction."


def _map(found: lora.Result, params: lora.Params, chosen: int) -> None:
    name = found.layers[chosen]
    pooled = found.delta_maps[name]
    inputs, outputs = _lora.shape_of(params.model).config.projections[place(name)[1]]
    key = f"{PREFIX}_delta"
    fig = charts.delta_map(pooled.T, inputs, outputs)
    chart.figure(fig, key=key, sentence=map_sentence(name, pooled, params.method), height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="lora-delta",
        experiment="lora",
        params=params,
        data=lambda: pd.DataFrame(pooled.T).rename_axis("input block").reset_index(),
    )


def gradients_sentence(found: lora.Result, params: lora.Params) -> str:
    """How the gradients of A and B began, and why, in words."""
    of_a, of_b = found.grad_norm_a, found.grad_norm_b
    if of_a[0] == 0:
        words = (
            f"In the first step A's gradient is exactly 0 and B's is {of_b[0]:.3g}: ∂L/∂A = s·xᵀ·(∂L/∂y)·Bᵀ, and B "
            "starts at 0. That step moves B alone; from the second on, A learns as well"
        )
        return words + (f" ({of_a[1]:.3g})." if len(of_a) > 1 else ".")
    return (
        f"In the first step A's gradient is {of_a[0]:.3g}, not 0: {params.method} starts from the weight's own "
        f"directions, so that B is not 0 ({of_b[0]:.3g} for B)."
    )


def _gradients(found: lora.Result, params: lora.Params) -> None:
    if not len(found.grad_norm_a):
        if params.method == FULL:
            st.caption("Full fine-tuning has no A and B, and so no gradients of theirs to compare.")
        return
    key = f"{PREFIX}_gradients"
    span = (0, max(2, min(_FIRST_STEPS, found.steps)))
    fig = charts.gradients(found.step, found.grad_norm_a, found.grad_norm_b, span, mode=theme.mode())
    chart.figure(fig, key=key, sentence=gradients_sentence(found, params), height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="lora-gradients",
        experiment="lora",
        params=params,
        data=lambda: pd.DataFrame(
            {"step": found.step, "grad_norm_a": found.grad_norm_a, "grad_norm_b": found.grad_norm_b}
        ),
    )


def merged_sentence(found: lora.Result) -> str:
    """How far merging the update into the weights is from adding it beside them, in words."""
    words = (
        "Merged, W + ΔW is one matrix again and the model answers as fast as before. Its logits then differ from those "
        f"with A and B beside W by at most {found.merged_difference:.2g}, on a scale of {found.logit_scale:.3g}"
    )
    if not found.merged_difference:
        return f"{words}: they are the same."
    return f"{words}: one part in {count(found.logit_scale / found.merged_difference)}, the rounding of the sums."


def _merged(found: lora.Result) -> None:
    if not len(found.grad_norm_a):
        return
    st.markdown("**Merged or beside the weights?**")
    st.markdown(plain(merged_sentence(found)))
    difference, scale = st.columns(2)
    difference.metric("Largest difference", f"{found.merged_difference:.2g}", help="Of any logit, on the questions.")
    scale.metric("Largest logit", f"{found.logit_scale:.3g}")


def _matrices(found: lora.Result) -> pd.DataFrame:
    layers, projections = zip(*map(place, found.layers), strict=True)
    return pd.DataFrame(
        {
            "matrix": found.layers,
            "layer": layers,
            "projection": projections,
            "relative_norm": found.relative_norm,
            "effective_rank": found.effective_rank,
        }
    )
