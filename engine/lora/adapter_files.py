"""Adapters as files in PEFT's format: adapter_config.json and adapter_model.safetensors in a folder.

    save_adapter(model, "my-adapter")  # peft.PeftModel.from_pretrained(base, "my-adapter") opens it
    load_adapter(model, "my-adapter")  # and what PEFT has saved is opened here

The files name layers as transformers does. Our `Decoder` calls its layers what Llama does but for a leading
``model.``, which is added on the way out and dropped on the way in: an adapter trained on either serves both.

Only safetensors are read: a pickle could run code.

Legend: I inputs, O outputs, R rank; A (I, R), B (R, O), in the files transposed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import InputError
from engine.lora.adapter_config import CONFIG_FILE, LARGEST, read_config
from engine.lora.injection import adapted_layers, inject_lora, listed, shortened, uncompiled_name
from engine.lora.layer import ScalingRule, rank_stabilized_scaling, standard_scaling
from engine.lora.linear import DoRALinear, LoRALinear, own_dtype
from engine.model import Decoder

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_BODY = "model."
_HEAD = "lm_head"
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_BASE = ".base_layer.weight"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Factors:
    """What one layer's adapter has learned.

    Args:
        A: (I, R).
        B: (R, O).
        magnitude: DoRA's m (O,), or None.
        base_weight: the frozen weight (O, I), which PEFT puts beside the adapter of a head, or None.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None
    base_weight: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter without a model.

    Args:
        rank: R.
        alpha: α.
        dropout: that it was trained with.
        rank_stabilized: s = α / √R in place of α / R.
        layers: factors by the layers' names.
        base_model: name or path of the model that it is for, shortened; None if the file does not say.
    """

    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    layers: dict[str, Factors]
    base_model: str | None = None

    @property
    def scaling_rule(self) -> ScalingRule:
        """(α, R) → s."""
        return rank_stabilized_scaling if self.rank_stabilized else standard_scaling

    @property
    def scaling(self) -> float:
        """s."""
        return self.scaling_rule(self.alpha, self.rank)

    @property
    def dora(self) -> bool:
        """Whether magnitudes are learned apart from directions."""
        return any(factors.magnitude is not None for factors in self.layers.values())


def save_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None) -> Path:
    """Write the adapters of `model` to `folder` in PEFT's format.

    A PiSSA start is written as what it amounts to, the change from the given weights: an ordinary adapter of rank 2R.

    Args:
        model: with adapters of one kind, rank and scaling, merged or not.
        folder: is made if it is missing.
        base_model: name or path of the model that they belong to, for the record.

    Returns:
        The folder.

    Raises:
        InputError: there are no adapters, or they differ in kind, rank or scaling.
    """
    layers = adapted_layers(model)
    if not layers:
        raise InputError("The model has no adapters to save: put some on it with inject_lora.")
    outward = _llama_name if isinstance(getattr(model, "_orig_mod", model), Decoder) else str  # compiled or not
    tensors: dict[str, Tensor] = {}
    kinds = set()
    for name, layer in layers.items():
        A, B = layer.factors()
        stem = _PREFIX + outward(name)
        tensors[stem + _A], tensors[stem + _B] = A.T, B.T
        if isinstance(layer, DoRALinear):
            tensors[stem + _MAGNITUDE] = layer.magnitude
        stabilized = layer.adapter.scaling_rule is rank_stabilized_scaling
        kinds.add((isinstance(layer, DoRALinear), stabilized, A.shape[1], layer.adapter.scaling, layer.dropout.p))
    if len(kinds) > 1:
        raise InputError("The adapters differ in kind, rank, scaling or dropout: one file holds adapters of one sort.")
    dora, stabilized, rank, scaling, dropout = kinds.pop()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _neat(scaling * (math.sqrt(rank) if stabilized else rank)),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "r": rank,
        "target_modules": [outward(name) for name in layers],
        "task_type": None,
        "use_dora": dora,
        "use_rslora": stabilized,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder, saved here or by PEFT, without a model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError: a file is missing, damaged, a pickle, or asks for what is not supported; the message says which.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").exists():
            raise InputError(
                "The adapter's weights are in adapter_model.bin, a pickle, which could run code and is not opened: "
                f"save the adapter as {WEIGHTS_FILE}."
            )
        raise InputError(f"The folder {folder.name} has no {WEIGHTS_FILE}.")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{WEIGHTS_FILE} is damaged or incomplete: fetch or save it again.") from error
    adapter = Adapter(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        rank_stabilized=config["use_rslora"],
        layers=_factors(tensors, config["r"], config["use_dora"]),
        base_model=config["base_model_name_or_path"],
    )
    for name, factors in adapter.layers.items():
        _check_size(name, factors, adapter.scaling)
    return adapter


def load_adapter(
    model: nn.Module, adapter: Adapter | str | Path, *, adapter_dtype: torch.dtype | None = None
) -> dict[str, LoRALinear]:
    """Put an adapter on `model`, trainable and with everything else frozen; after an error the model is as before.

    Args:
        model: a transformers model or a `Decoder` without adapters on those layers.
        adapter: read before, or the folder to read.
        adapter_dtype: of A and B; each layer's own when left out.

    Returns:
        The adapted layers by name.

    Raises:
        InputError: as `read_adapter`, or the adapter is for another model: names or shapes differ, or its numbers are
            too large for the dtype that a layer computes in or that A and B are kept in.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    there = {
        uncompiled_name(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | LoRALinear)
    }
    layers = _rename(adapter.layers, there)
    for name, factors in layers.items():
        linear = there[name]
        wanted = (linear.in_features, linear.out_features)
        given = (factors.A.shape[0], factors.B.shape[1])
        if given != wanted:
            raise InputError(
                f"The adapter is for another model: its {name} maps {given[0]} to {given[1]} numbers, the model's "
                f"{wanted[0]} to {wanted[1]}."
            )
        brought = factors.base_weight
        if brought is not None and not torch.equal(brought.to(linear.weight), linear.weight):
            raise InputError(
                f"The adapter is for another model: it brings a frozen weight of {name} that differs from the model's."
            )
        for dtype in _computing_dtypes(linear):
            _check_range(name, factors, dtype, "load the model in float32 or bfloat16")
        kept = adapter_dtype or own_dtype(linear)
        _check_range(name, factors, kept, "keep it in another adapter_dtype, such as bfloat16 or float32")
    adapted = inject_lora(
        model,
        adapter.rank,
        adapter.alpha,
        layers.__contains__,
        adapter.dropout,
        scaling_rule=adapter.scaling_rule,
        layer=DoRALinear if adapter.dora else LoRALinear,
        adapter_dtype=adapter_dtype,
    )
    with torch.no_grad():
        for name, factors in layers.items():
            layer = adapted[name]
            layer.adapter.A.copy_(factors.A)
            layer.adapter.B.copy_(factors.B)
            if isinstance(layer, DoRALinear):
                layer.magnitude.copy_(factors.magnitude)
    return adapted


def _factors(tensors: Mapping[str, Tensor], rank: int, dora: bool) -> dict[str, Factors]:
    """The tensors of the file by layer, each checked."""
    parts = (_A, _B, _MAGNITUDE) if dora else (_A, _B)
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        part = next((part for part in (*parts, _BASE) if key.endswith(part)), None)
        if part is None or not key.startswith(_PREFIX):
            strange.append(key)
        else:
            found.setdefault(key.removeprefix(_PREFIX).removesuffix(part), {})[part] = tensor
    if strange or not found:
        what = f"holds what is no part of its adapter: {listed(strange)}" if strange else "holds no adapter"
        raise InputError(f"{WEIGHTS_FILE} {what}.")
    layers = {}
    for name, tensor_of in found.items():
        missing = [name + part for part in parts if part not in tensor_of]
        if missing:
            raise InputError(f"{WEIGHTS_FILE} is incomplete: {listed(missing)} is missing.")
        layers[name] = _check_factors(name, tensor_of, rank)
    return layers


def _check_factors(name: str, tensor_of: Mapping[str, Tensor], rank: int) -> Factors:
    A, B, magnitude, brought = (tensor_of.get(part) for part in (_A, _B, _MAGNITUDE, _BASE))
    name = shortened(name)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise InputError(
            f"The adapter of {name} has the shapes {tuple(A.shape)} and {tuple(B.shape)}, which is not rank {rank} as "
            f"{CONFIG_FILE} says."
        )
    if not (A.numel() and B.numel()):
        raise InputError(
            f"The adapter of {name} maps {A.shape[1]} to {B.shape[0]} numbers: a layer has at least one of each."
        )
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        raise InputError(
            f"The magnitudes of {name} have the shape {tuple(magnitude.shape)}, they should be ({B.shape[0]},)."
        )
    for tensor in tensor_of.values():
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"The adapter of {name} is stored as {_dtype_name(tensor.dtype)}: save it as one of "
                f"{', '.join(map(_dtype_name, _DTYPES))}."
            )
        if not tensor.float().isfinite().all():
            raise InputError(f"The adapter of {name} holds values that are not finite numbers.")
    return Factors(A.T, B.T, magnitude, brought)


def _check_size(name: str, factors: Factors, scaling: float) -> None:
    """Raise unless s·A·B, and what is met on the way to it, stays far from float32's largest numbers."""
    norms = [torch.linalg.vector_norm(factor, dtype=torch.float64).item() for factor in (factors.A, factors.B)]
    if not math.prod(max(1.0, size) for size in (scaling, *norms)) <= LARGEST:
        raise InputError(
            f"The update of {shortened(name)} is too large to compute with: the scaling is {scaling:.3g}, the factors' "
            f"norms are {norms[0]:.3g} and {norms[1]:.3g}, and their product must be at most {LARGEST:g}."
        )


def _computing_dtypes(linear: nn.Linear) -> list[torch.dtype]:
    """What the factors may be cast to: the weight's dtype before any packing, and what a layer casts x to."""
    state = getattr(linear.weight, "quant_state", None)
    dtypes = (linear.weight.dtype if state is None else state.dtype, getattr(linear, "compute_dtype", None))
    return [dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point]


def _check_range(name: str, factors: Factors, dtype: torch.dtype, remedy: str) -> None:
    """Raise unless `dtype` reaches as far as the factors do."""
    if not all(factor.to(dtype).isfinite().all() for factor in (factors.A, factors.B)):
        raise InputError(
            f"The adapter of {shortened(name)} holds numbers beyond {_dtype_name(dtype)}'s largest, "
            f"{torch.finfo(dtype).max:g}: {remedy}."
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rename(layers: Mapping[str, Factors], there: Collection[str]) -> dict[str, Factors]:
    """The layers under the names that are `there`: as in the file, or without or with a leading ``model.``."""
    best: list[str] = list(layers)
    for rename in (str, lambda name: name.removeprefix(_BODY), _llama_name):
        names = {rename(name): factors for name, factors in layers.items()}
        missing = sorted(name for name in names if name not in there)
        if not missing:
            return names
        best = min(best, missing, key=len)
    raise InputError(f"The adapter is for another model: this one has no linear layer {listed(best)}.")


def _llama_name(name: str) -> str:
    """What transformers' Llama calls a layer of our `Decoder`."""
    return name if name.startswith(_HEAD) else _BODY + name


def _neat(number: float) -> float:
    """Without the rounding of a root that was multiplied by itself."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number
