"""The Accuracy view: the error of every backend against float64, and what each number format costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import flash_accuracy
from engine.experiments._flash import number_in_words
from engine.experiments._flash_recorded import recorded_precisions
from ui import chart, export, run, theme
from ui.charts import flash_accuracy as charts
from ui.charts.flash_accuracy import Errors
from ui.flash.missing import missing
from ui.flash.settings import PREFIX, Settings
from ui.prose import plain

RUN = f"{PREFIX}_accuracy_run"
_HEIGHT = 560


def accuracy(given: Settings) -> None:
    """The histograms, and the figures behind them."""
    found: flash_accuracy.Result | None = run.run("flash_accuracy", given.params, key=RUN)
    if found is None:
        if run.is_running(RUN):
            st.skeleton(height=_HEIGHT)
        return
    params: flash_accuracy.Params = run.params_of(RUN)
    fig = charts.errors(
        found.edges,
        [Errors(one.backend, one.label, one.histogram, one.rms) for one in found.errors],
        found.bound or None,
        mode=theme.mode(),
    )
    key = f"{PREFIX}_errors"
    chart.figure(
        fig, key=key, sentence=f"{found.sentence} Markers on top stand at each backend's rms error.", height=_HEIGHT
    )
    export.export(
        fig, key=key, name="flash-accuracy", experiment="flash_accuracy", params=params, data=lambda: table(found)
    )
    st.table(_backends(found), border="horizontal")
    if found.precisions:
        layer = " and by the FlashAttention layer: fast (float16 with float32 sums) and exact" if found.on_gpu else ""
        st.markdown(
            "**Number format by number format**: attention to float32 numbers, whose rounding to the format counts, by "
            f"standard attention{layer}"
        )
        st.table(_formats(found), border="horizontal")
    if (recorded := recorded_precisions()) is not None:
        errors, where = recorded
        st.markdown(f"**On a GPU**, {plain(where)}: 2 × 8 heads × 2,048 tokens × 64, float32 numbers")
        rows = {name: {"rms error": _error(error)} for name, error in errors.items()}
        st.table(pd.DataFrame(rows).T, border="horizontal")
        st.caption(
            "TF32 is what tensor cores make of float32: 11 significant bits, as float16 has, and float32's range. "
            "FlashAttention's fast precision is float16 with sums in float32; exact keeps float32."
        )
    for label, said in found.failed.items():
        st.warning(plain(f"{label} is left out: {said}"), icon=":material/warning:")
    missing(found.absent)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    st.caption(
        plain(
            "Errors are divided by the outputs' root mean square (rms), and “within twice” compares rms errors with "
            "standard attention's in the same format. That is a part of the rule by which FlashAttention counts a "
            "backend as correct, which the Tests tab checks: it holds largest errors and those of gradients to twice "
            "as well, and lets one rounding to the format come on top. Computed on "
            f"{found.device}; {versions}."
        )
    )


def table(found: flash_accuracy.Result) -> pd.DataFrame:
    """Every bin of every backend as a row."""
    return pd.DataFrame(
        [
            {"backend": one.backend, "log10_from": low, "log10_to": high, "share": share}
            for one in found.errors
            for low, high, share in zip(found.edges[:-1], found.edges[1:], np.asarray(one.histogram), strict=True)
        ]
    )


def _backends(found: flash_accuracy.Result) -> pd.DataFrame:
    return pd.DataFrame(
        {
            one.label: {
                "rms error": _error(one.rms),
                "largest": _error(one.maximum),
                "against standard": "—" if one.ratio is None else f"× {one.ratio:.2f}",
                "within twice": "—" if one.within_bound is None else "yes" if one.within_bound else "no",
            }
            for one in found.errors
        }
    ).T


def _formats(found: flash_accuracy.Result) -> pd.DataFrame:
    return pd.DataFrame(
        {
            one.name: {"rms error": _error(one.rms), "step from 1 to the next number": number_in_words(one.epsilon)}
            for one in found.precisions
        }
    ).T


def _error(value: float) -> str:
    return "none" if value == 0 else number_in_words(value)
