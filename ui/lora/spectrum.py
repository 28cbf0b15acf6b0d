"""How many directions an update really uses: its matrices to choose from, their singular values, what these hold."""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import ExperimentParams
from ui import chart, export, theme
from ui.charts import lora as charts

_HEIGHT = 340
_NUMBER = re.compile(r"\.(\d+)\.")
_ENERGY = 0.9  # so much of an update is nearly all of it

Place = tuple[int, str]
"""Layer, −1 for none, and projection."""


class Spectra(Protocol):
    """What is drawn: a result of `engine.experiments.lora` or of `lora_adapter`.

    Attributes:
        layers: N names.
        spectra: (N, K), singular values, largest first.
        effective_rank: (N,).
    """

    layers: list[str]
    spectra: np.ndarray
    effective_rank: np.ndarray


def place(name: str) -> Place:
    """Layer and projection of an adapted matrix, by its name: ``"layers.3.self_attn.q_proj"`` → (3, "q_proj")."""
    number = _NUMBER.search(name)
    return int(number[1]) if number else -1, name.rpartition(".")[2]


def label(name: str) -> str:
    """A matrix in a few words, e.g. ``"layer 3, q_proj"``; one that belongs to no layer keeps its name."""
    layer, projection = place(name)
    return name if layer < 0 else f"layer {layer}, {projection}"


def labels(names: list[str]) -> list[str]:
    """A label of each matrix, no two alike: all keep their names where short ones would be, as with two encoders."""
    short = [label(name) for name in names]
    return short if len(set(short)) == len(names) else list(names)


def choose(names: list[str], first: int, *, key: str) -> int:
    """Which matrix the learner looks at: its place in `names`; `first` until another one is chosen."""
    if st.session_state.get(key) not in (None, *names):
        del st.session_state[key]
    options = sorted(names, key=lambda name: place(name)[0])
    shown = dict(zip(names, labels(names), strict=True))
    chosen = st.selectbox(
        "Matrix",
        options,
        index=options.index(names[first]),
        format_func=shown.__getitem__,
        key=key,
        bind="query-params",
    )
    return names.index(chosen)


def draw(found: Spectra, chosen: int, *, key: str, experiment: str, params: ExperimentParams, note: str = "") -> None:
    """The singular values of all matrices beside what those of the chosen one hold.

    Args:
        found: what is drawn.
        chosen: row of the matrix.
        key: of the two figures, which get endings of their own.
        experiment, params: the run that they show.
        note: a sentence more.
    """
    left, right = st.columns(2, gap="small")
    names = labels(found.layers)
    with left:
        fig = charts.spectrum(found.spectra, names, chosen, mode=theme.mode())
        chart.figure(fig, key=f"{key}_spectrum", sentence=spectrum_sentence(found, chosen), height=_HEIGHT)
        export.export(
            fig,
            key=f"{key}_spectrum",
            name="lora-spectrum",
            experiment=experiment,
            params=params,
            data=lambda: table(found.layers, found.spectra),
        )
    with right:
        sigma = found.spectra[chosen]
        fig = charts.energy(sigma, float(found.effective_rank[chosen]), mode=theme.mode())
        said = f"{energy_sentence(found, chosen)} {note}".rstrip()
        chart.figure(fig, key=f"{key}_energy", sentence=said, height=_HEIGHT)
        export.export(
            fig,
            key=f"{key}_energy",
            name="lora-energy",
            experiment=experiment,
            params=params,
            data=lambda: pd.DataFrame(
                {"k": np.arange(1, len(sigma) + 1), "sigma": sigma, "captured_energy": charts.captured_energy(sigma)}
            ),
        )


def spectrum_sentence(found: Spectra, chosen: int) -> str:
    """How steeply the singular values of the chosen update fall, in words."""
    sigma = found.spectra[chosen][found.spectra[chosen] > 0]
    name, others = labels(found.layers)[chosen], len(found.layers) - 1
    name = name[0].upper() + name[1:]
    if not len(sigma):
        return f"{name} did not change: all its singular values are 0."
    words = f"{name}: the largest singular value is {sigma[0]:.3g}"
    if len(sigma) > 1:
        words += f", the second {sigma[1]:.3g}" if len(sigma) > 2 else ""
        words += f", the last of {len(sigma)} is {sigma[-1]:.2g}"
    lines = {0: "", 1: " The thin line is the other matrix."}
    return f"{words}.{lines.get(others, f' The thin lines are the other {others} matrices.')}"


def energy_sentence(found: Spectra, chosen: int) -> str:
    """How many directions the chosen update really uses, in words."""
    sigma = found.spectra[chosen]
    if not sigma.any():
        return "There is no change whose directions could be counted."
    captured = charts.captured_energy(sigma)
    enough = int(np.argmax(captured >= _ENERGY)) + 1
    held = "the strongest alone holds" if enough == 1 else f"the {enough} strongest hold"
    words = (
        f"Of {np.count_nonzero(sigma)} directions {held} {captured[enough - 1]:.0%} of ‖ΔW‖², where each counts by the "
        "square of its singular value. The effective rank counts by the singular values themselves, so that weak ones "
        f"weigh more: it is {found.effective_rank[chosen]:.1f}"
    )
    if len(found.layers) == 1:
        return f"{words}."
    return f"{words}, and {np.median(found.effective_rank):.1f} in the median of all matrices."


def table(layers: list[str], spectra: np.ndarray) -> pd.DataFrame:
    """Singular values, a row for each matrix."""
    columns = pd.DataFrame(spectra, columns=[f"sigma_{k}" for k in range(1, spectra.shape[1] + 1)])
    columns.insert(0, "matrix", layers)
    return columns
