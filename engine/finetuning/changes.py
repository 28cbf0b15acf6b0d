"""What fine-tuning did to the weights: how far each matrix moved, in how many directions, and where.

Legend: N layers, K singular values, R rank, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data import Batch
from engine.finetuning.lessons import Lessons
from engine.lora.adapter_files import save_adapter
from engine.lora.injection import adapted_layers, merge, unmerge
from engine.lora.linear import DoRALinear
from engine.lora.spectrum import effective_rank, singular_values
from engine.model import Decoder, evaluating

MAP_SIZE = 64
"""Rows and columns of a map at most: more squares nobody can see."""

ARCHIVE_FOLDER = "adapter"

_LOGITS_AT_ONCE = 2**23
"""Numbers, filling included."""


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


def merged_difference(model: Decoder, lessons: Lessons) -> tuple[float, float]:
    """Largest |logit merged − logit unmerged| on the lessons, 0 without adapters, and the largest |logit unmerged|.

    The model is left as it was, to the bit.
    """

    def merged(batch: Batch) -> Tensor:
        merge(model)
        try:
            return _logits(model, batch)
        finally:
            unmerge(model)

    unmerged = partial(_logits, model)
    return _largest(unmerged, merged if adapted_layers(model) else unmerged, lessons, model.config.vocab_size)


def difference(model: Decoder, other: Decoder, lessons: Lessons) -> tuple[float, float]:
    """Largest |logit of `other` − logit of `model`| on the lessons, and the largest |logit of `model`|."""
    return _largest(partial(_logits, model), partial(_logits, other), lessons, model.config.vocab_size)


def _largest(
    one: Callable[[Batch], Tensor], other: Callable[[Batch], Tensor], lessons: Lessons, vocab_size: int
) -> tuple[float, float]:
    """The largest |other − one| and the largest |one|, of a few lessons at a time: all logits at once are gigabytes."""
    largest = []
    for batch in lessons.batches(max(1, _LOGITS_AT_ONCE // vocab_size)):
        logits = one(batch)  # (positions, V)
        largest.append(torch.stack([(other(batch) - logits).abs().max(), logits.abs().max()]))
    apart, scale = torch.stack(largest).amax(0).tolist()
    return apart, scale


def _logits(model: Decoder, batch: Batch) -> Tensor:
    """Of all that is read, without the filling, (positions, V)."""
    batch = batch.to(model.embed_tokens.weight.device)
    with evaluating(model):
        return model.lm_head(model.hidden(batch.inputs)[batch.read])


def pack(model: Decoder, base_model: str) -> bytes:
    """A zip of one folder with the adapter in PEFT's format; empty if the model has none."""
    if not adapted_layers(model):
        return b""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(save_adapter(model, folder, base_model).iterdir()):
            archive.write(file, f"{ARCHIVE_FOLDER}/{file.name}")
    return packed.getvalue()
