"""The Explore, Code and Tests tabs of the quantization lab."""

from __future__ import annotations

import streamlit as st

from engine.experiments import quantization_tests
from ui import checks, run, source
from ui.prose import plain
from ui.quantization.layer_map import layer_map
from ui.quantization.model import model
from ui.quantization.rates import rates
from ui.quantization.sensitivity import sensitivity
from ui.quantization.settings import (
    KEPT,
    MAP,
    MODEL,
    PREFIX,
    RATES,
    RUN,
    SENSITIVITY,
    SIDE,
    SPEED,
    VIEW,
    WEIGHTS,
    Settings,
    shared,
)
from ui.quantization.side_by_side import side_by_side
from ui.quantization.speed import speed
from ui.quantization.weights import weights

VIEWS = {
    WEIGHTS: weights,
    RATES: rates,
    MAP: layer_map,
    MODEL: model,
    SENSITIVITY: sensitivity,
    SIDE: side_by_side,
    SPEED: speed,
}
"""What the Explore tab shows, by name."""


def explore(given: Settings) -> None:
    """The Explore tab: one view at a time."""
    view = st.segmented_control(
        "Show",
        list(VIEWS),
        default=WEIGHTS,
        required=True,
        key=VIEW,
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    KEPT.keep(VIEW, view, None if view == WEIGHTS else view)
    if view in (WEIGHTS, RATES) and given.found is None:
        _waiting()
    else:
        VIEWS[view](given)


def _waiting() -> None:
    """What stands here until the weights come, or where they cannot come."""
    if run.is_running(RUN):
        st.skeleton(height=460)
    else:
        if reason := run.problem(RUN):
            st.warning(plain(reason), icon=":material/info:")
        st.caption("There are no weights to show: the controls beside this are the way out.")


def code() -> None:
    """The Code tab: levels, scales, error, the ways to do better than rounding, and LLM.int8's outliers."""
    st.markdown("What is drawn is computed by these lines: the engine's own source, as it runs.")
    source.show(
        [
            "engine.quantization.data_types:normal_float",
            "engine.quantization.data_types:integer",
            "engine.quantization.data_types:floating_point",
            "engine.quantization.data_types:DataType.encode",
            "engine.quantization.grouping:Grouping",
            "engine.quantization.tensor:quantize",
            "engine.quantization.tensor:QuantizedTensor",
            "engine.quantization.tensor:QuantizedScales",
            "engine.quantization.distortion:measure_distortion",
            "engine.quantization.distortion:gaussian_bound_db",
            "engine.quantization.gptq:quantize_gptq",
            "engine.quantization.awq:quantize_awq",
            "engine.quantization.outliers:split_outliers",
            "engine.quantization.outliers:OutlierSplit",
            "engine.quantization.outliers:int8_product",
            "engine.quantization.perplexity:measure_perplexity",
        ]
    )


def tests(given: Settings) -> None:
    """The Tests tab: what must hold, on the weights and the settings of this page."""
    wanted = quantization_tests.Params(**shared(quantization_tests.Params, given.params))
    found = run.run("quantization_tests", wanted, key=f"{PREFIX}_tests")
    if found:
        checks.checks(found.checks)
