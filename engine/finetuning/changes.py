"""What fine-tuning did to the weights: how far each matrix moved, in how many directions, and where.

Legend: N layers, K singular values, R rank, I inputs, O outputs, B batch, T tokens.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.lora.adapter_files import save_adapter
from engine.lora.injection import adapted_layers, merge, unmerge
from engine.lora.linear import DoRALinear
from engine.lora.spectrum import effective_rank, singular_values
from engine.model import Decoder, evaluating

MAP_SIZE = 64
"""Rows and columns of a map at most: more squares nobody can see."""

ARCHIVE_FOLDER = "adapter"


@dataclass(frozen=True)
class Changes:
    """How the weights changed, as `engine.experiments.lora.Result` says it.

    Args:
        layers: N names.
        spectra: (N, K).
        effective_rank: (N,).
        relative_norm: (N,).
        delta_maps: by layer.
    """

    layers: list[str]
    spectra: np.ndarray
    effective_rank: np.ndarray
    relative_norm: np.ndarray
    delta_maps: dict[str, np.ndarray]


NO_CHANGES = Changes([], np.zeros((0, 0)), np.zeros(0), np.zeros(0), {})


@torch.no_grad()
def examine(model: Decoder, original: nn.Module, targets: Collection[str]) -> Changes:
    """How the adapted layers changed or, of a model without adapters, those that an adapter would have had.

    Args:
        model: fine-tuned.
        original: the same without fine-tuning, its layers under the same names.
        targets: last parts of the layers' names.
    """
    adapted = adapted_layers(model)
    names = list(adapted) or [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    spectra, ranks, norms, maps = [], [], [], {}
    for name in names:
        before = original.get_submodule(name).weight  # (O, I)
        layer = adapted.get(name)
        delta = model.get_submodule(name).weight - before if layer is None else layer.delta_weight()  # (O, I)
        if layer is None or isinstance(layer, DoRALinear):
            sigma = torch.linalg.svdvals(delta)
        else:
            sigma = singular_values(*layer.factors(), layer.adapter.scaling)
        spectra.append(sigma.cpu())  # (K of this layer,)
        ranks.append(effective_rank(sigma))
        norms.append((delta.norm() / before.norm()).item())
        maps[name] = pool(delta).cpu().numpy()
    padded = nn.utils.rnn.pad_sequence(spectra, batch_first=True)  # (N, K)
    return Changes(names, padded.numpy(), np.array(ranks), np.array(norms), maps)


def pool(delta: Tensor) -> Tensor:
    """|ΔW| (O, I) as at most `MAP_SIZE` × `MAP_SIZE` blocks, each with its largest value."""
    size = [min(side, MAP_SIZE) for side in delta.shape]
    return F.adaptive_max_pool2d(delta.abs()[None, None], size)[0, 0]


def merged_difference(model: Decoder, ids: Tensor) -> tuple[float, float]:
    """Largest |logit merged − logit unmerged| on `ids` (B, T), and the largest |logit|; 0 without adapters.

    The model is left as it was, to the bit.
    """
    with evaluating(model):
        apart = model(ids)  # (B, T, V)
        difference = 0.0
        if adapted_layers(model):
            merge(model)
            difference = (model(ids) - apart).abs().max().item()
            unmerge(model)
    return difference, apart.abs().max().item()


def pack(model: Decoder, base_model: str) -> bytes:
    """A zip of one folder with the adapter in PEFT's format; empty if the model has none."""
    if not adapted_layers(model):
        return b""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(save_adapter(model, folder, base_model).iterdir()):
            archive.write(file, f"{ARCHIVE_FOLDER}/{file.name}")
    return packed.getvalue()
