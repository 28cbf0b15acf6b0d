"""How large an update is: W, A and B to scale, and the same arithmetic for models of every size."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.errors import InputError
from engine.experiments import _lora, lora
from ui import chart, export, theme
from ui.charts import lora as charts
from ui.lora import settings
from ui.lora.settings import FULL, PREFIX, Settings, count, share
from ui.prose import plain

_HEIGHT = 400
_SHAPE, _MATRIX, _DTYPE = f"{PREFIX}_shape", f"{PREFIX}_matrix", f"{PREFIX}_dtype"
_LAST_MODEL = f"_{PREFIX}_shape_of"
_DRAWN = (900, 350)  # pixels that W has at most, across and down
_ADAM = 4 + 4 + 4  # bytes a trained number needs beside itself: a gradient and AdamW's two means, in float32


def size(given: Settings) -> None:
    """The Size view: arithmetic alone, drawn at every move of the rank."""
    params = given.params
    shapes = {shape.name: shape for shape in _lora.SHAPES}
    _follow_model(params.model)
    one, two, three = st.columns([2, 2, 1.6])
    shape = shapes[
        one.selectbox(
            "Shape of the model",
            list(shapes),
            key=_SHAPE,
            bind="query-params",
            help="Dimensions as published; nothing of this size is loaded.",
        )
    ]
    modules = shape.config.projections
    matrix = two.selectbox("Matrix that is drawn", list(modules), index=0, key=_MATRIX, bind="query-params")
    dtype = three.segmented_control(
        "Numbers are", ["float32", "bfloat16"], default="float32", required=True, key=_DTYPE, bind="query-params"
    )
    try:
        adapter = _lora.adapter_parameters(shape, params.rank, params.targets)
    except InputError as error:
        st.error(plain(str(error)), icon=":material/edit:")
        return
    _totals(shape, adapter, dtype)
    _drawing(shape, matrix, params)
    left, right = st.columns(2, gap="medium")
    with left:
        _modules(shape, adapter, dtype)
    with right:
        _models(params, dtype)


def _follow_model(model: str) -> None:
    """Show the shape of the model that was chosen, until the learner asks for another one."""
    before = st.session_state.get(_LAST_MODEL)
    st.session_state[_LAST_MODEL] = model
    if before not in (None, model) or (before is None and _SHAPE not in st.query_params):
        st.session_state[_SHAPE] = _lora.shape_of(model).name


def _totals(shape: _lora.Shape, adapter: _lora.AdapterSize, dtype: str) -> None:
    width = _lora.BYTES[dtype]
    whole = shape.config.num_parameters
    with st.container(horizontal=True, key=f"{PREFIX}_totals"):
        st.metric("Trained", count(adapter.total), help=f"{adapter.total:,} numbers: all As and Bs.")
        st.metric("Share of the model", share(adapter.share), help=f"Of {whole:,} parameters.")
        st.metric(
            "File of the adapter",
            settings.size(adapter.nbytes(dtype)),
            help=f"Its numbers alone, unpacked; the whole model's take {settings.size(width * whole)}.",
        )
        st.metric(
            "Gradients and AdamW",
            settings.size(_ADAM * adapter.total),
            help=f"A gradient and two running means for each trained number, 12 bytes in float32. Full fine-tuning "
            f"needs {settings.size(_ADAM * whole)}.",
        )


def scale_sentence(inputs: int, outputs: int, rank: int) -> str:
    """What the drawing shows, in words."""
    frozen, trained = inputs * outputs, rank * (inputs + outputs)
    words = (
        f"At rank {rank}, A and B hold {trained:,} numbers beside the {frozen:,} of W: "
        f"{share(trained / frozen)} of it. Their product ΔW = A·B has W's shape, inputs down and outputs across, but "
        f"only {rank} independent direction{'s' if rank > 1 else ''}. (PyTorch and PEFT keep every matrix transposed, "
        "so that PEFT writes ΔW = B·A.)"
    )
    if trained >= frozen:
        words += " Here the update has no fewer numbers than the matrix that it changes."
    if rank * min(_DRAWN[0] / outputs, _DRAWN[1] / inputs) < 1:
        words += " The strips are thinner than a pixel: what you see of them is their edge."
    return words


def _drawing(shape: _lora.Shape, matrix: str, params: lora.Params) -> None:
    inputs, outputs = shape.config.projections[matrix]
    fig = charts.to_scale(inputs, outputs, params.rank, mode=theme.mode())
    key = f"{PREFIX}_scale"
    sentence = scale_sentence(inputs, outputs, params.rank)
    if matrix not in _lora.TARGETS[params.targets]:
        sentence += f" With “{params.targets}” this matrix gets no update; it is drawn as if it did."
    if params.method == FULL:
        sentence += " Full fine-tuning has no A and B: it changes all of W."
    chart.figure(fig, key=key, sentence=sentence, height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="lora-size",
        experiment="lora",
        params=params,
        data=lambda: _by_rank(shape, params.targets),
    )


def _by_rank(shape: _lora.Shape, targets: _lora.Targets) -> pd.DataFrame:
    rows = []
    for rank in range(1, charts.LARGEST_RANK + 1):
        adapter = _lora.adapter_parameters(shape, rank, targets)
        rows.append(
            {"rank": rank, **adapter.per_module, "all layers": adapter.total, "share of the model": adapter.share}
        )
    return pd.DataFrame(rows)


def _modules(shape: _lora.Shape, adapter: _lora.AdapterSize, dtype: str) -> None:
    modules = shape.config.projections
    st.markdown(f"**One layer of {plain(shape.name)}**, of {shape.num_layers}")
    rows = {}
    for name, (inputs, outputs) in modules.items():
        numbers = adapter.per_module.get(name)
        rows[name] = {
            "W": f"{inputs:,} × {outputs:,}".replace(" ", "\u00a0"),
            "A and B": "—" if numbers is None else f"{numbers:,}",
            "of W": "—" if numbers is None else share(numbers / (inputs * outputs)),
            "size": "—" if numbers is None else f"{settings.size(numbers * _lora.BYTES[dtype])}",
        }
    st.table(pd.DataFrame(rows).T, border="horizontal")


def _models(params: lora.Params, dtype: str) -> None:
    st.markdown(f"**Rank {params.rank} on models of every size**")
    rows = {}
    for shape in _lora.SHAPES:
        adapter = _lora.adapter_parameters(shape, params.rank, params.targets)
        rows[shape.name] = {
            "parameters": count(shape.config.num_parameters),
            "trained": count(adapter.total),
            "share": share(adapter.share),
            "file": settings.size(adapter.nbytes(dtype)),
        }
    st.table(pd.DataFrame(rows).T, border="horizontal")
    st.caption("The larger the model, the smaller the share: W grows with the square of the width, A and B with it.")
