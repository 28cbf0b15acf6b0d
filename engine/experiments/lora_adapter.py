"""What an adapter that was trained elsewhere has learned: its layers and how many directions each really uses.

Legend: N layers, R rank.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engine import local_models
from engine.errors import InputError
from engine.experiments import ExperimentParams, _lora

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


class Params(ExperimentParams):
    """Where the adapter is."""

    path: str = Field(
        "",
        max_length=1000,
        title="Adapter",
        description="A folder with adapter_config.json and adapter_model.safetensors, or the latter file in it.",
    )

    def cache_token(self) -> str:
        """Another upload may lie at the same place."""
        return str(local_models.modified(self.path))


@dataclass(frozen=True)
class Result:
    """An adapter, without the model that it is for.

    Args:
        layers: N names, as the file calls them, in the order of the model.
        rank: R.
        alpha: α.
        scaling: s, by which A·B counts.
        dora: whether magnitudes are learned apart, which the spectra leave out.
        spectra: (N, R), singular values of s·A·B, largest first.
        effective_rank: (N,), exp of the entropy of a layer's singular values.
        base_model: the model it is for, as the file says; None if it does not.
        sentence: what it is, in words.
    """

    layers: list[str]
    rank: int
    alpha: float
    scaling: float
    dora: bool
    spectra: np.ndarray
    effective_rank: np.ndarray
    base_model: str | None
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Read the adapter; no model is needed.

    Raises:
        InputError: there is none, or it cannot be read; the message says why.
    """
    import torch

    from engine.lora.adapter_files import read_adapter
    from engine.lora.spectrum import effective_rank, singular_values

    adapter = read_adapter(_folder(params.path))
    names = sorted(adapter.layers, key=_place)
    layers = [adapter.layers[name] for name in names]
    spectra = [singular_values(factors.A, factors.B, adapter.scaling) for factors in layers]
    ranks = np.array([effective_rank(sigma) for sigma in spectra])
    return Result(
        layers=names,
        rank=adapter.rank,
        alpha=adapter.alpha,
        scaling=adapter.scaling,
        dora=adapter.dora,
        spectra=torch.nn.utils.rnn.pad_sequence(spectra, batch_first=True).numpy(),
        effective_rank=ranks,
        base_model=adapter.base_model,
        sentence=f"An adapter of rank {adapter.rank} for {len(ranks)} matrices of "
        f"{adapter.base_model or 'an unnamed model'}: its updates use {ranks.min():.1f} to {ranks.max():.1f} "
        f"directions, {np.median(ranks):.1f} in the median.",
    )


def _place(name: str) -> tuple[list[int], int, str]:
    """Where a layer stands in a model: a file has its layers in the order of the alphabet, 10 before 2."""
    order = _lora.TARGETS["all"]
    last = name.rpartition(".")[2]
    return [int(number) for number in re.findall(r"\d{1,9}", name)], order.index(last) if last in order else -1, name


def _folder(path: str) -> Path:
    """The folder of the adapter at `path`, which may be its weights' file."""
    from engine.lora.adapter_config import CONFIG_FILE
    from engine.lora.adapter_files import WEIGHTS_FILE

    if not path.strip():
        raise InputError(f"No adapter is named: give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    found = local_models.local_path(path)
    if os.path.isdir(found):  # unlike Path.is_dir, says no to a name that no file system takes
        return found
    if not os.path.isfile(found):
        raise InputError(f"There is no folder and no file {path.strip()!r} on this machine: check the path.")
    if found.name != WEIGHTS_FILE:
        raise InputError(
            f"The file is called {found.name}: an adapter's weights are in {WEIGHTS_FILE}, with {CONFIG_FILE} beside "
            "it; other formats can run code and are not opened."
        )
    return found.parent
