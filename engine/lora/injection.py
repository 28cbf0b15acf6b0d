"""Adapters for the linear layers of a whole model, and what is done with all of them at once.

    inject_lora(model, rank=8, targets=["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-4)
    ...
    merge(model)    # the model now costs what it did without adapters
    unmerge(model)  # and is what it was, to the bit

Legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from engine.architecture import ATTENTION, FEED_FORWARD
from engine.errors import InputError
from engine.lora.layer import ScalingRule, check_rank, standard_scaling
from engine.lora.linear import LoRALinear, Start

PROJECTIONS = (*ATTENTION, *FEED_FORWARD)
"""Every matrix of a Llama's block."""

Targets = str | Sequence[str] | Callable[[str], bool]
"""Patterns of names in the shell's manner, or what says of a name whether it is meant."""

_LISTED = 12
_LONGEST = 120
_COMPILED = "_orig_mod."


def inject_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = PROJECTIONS,
    dropout: float = 0.0,
    *,
    scaling_rule: ScalingRule = standard_scaling,
    start: Start | None = None,
    layer: Callable[..., LoRALinear] = LoRALinear,
    adapter_dtype: torch.dtype | None = None,
) -> dict[str, LoRALinear]:
    """Put an adapter on every linear layer whose name matches, and freeze everything else, in place.

    A layer that several names lead to gets one adapter, reached by all of them. A weight that is tied to another
    layer's, as a head's to the embedding, stays tied and frozen; merging gives the head a weight of its own, and
    unmerging ties it again. A `pissa_start` changes the frozen weight, so that it gives the head one of its own for
    good and leaves the embedding as it was. Either all layers are adapted or, after an error, none.

    Args:
        model: anything with `nn.Linear` layers, or with layers derived from it such as bitsandbytes' `Linear4bit`.
            transformers' GPT-2 keeps its weights transposed in `Conv1D` layers, which are not supported.
        rank: R, from 1 to the smaller side of each layer.
        alpha: α, R when left out.
        targets: patterns in the shell's manner, of a layer's whole name or of its end: ``"q_proj"``, ``"*_proj"``,
            ``"layers.0.*"``, ``"*"`` for every linear layer; or what says of a whole name whether it is meant.
        dropout: share of the updates' inputs that is dropped in training.
        scaling_rule: `standard_scaling` (α/R) or `rank_stabilized_scaling` (α/√R).
        start: `pissa_start`, or None for a random A and B = 0.
        layer: `LoRALinear` or `DoRALinear`.
        adapter_dtype: of A and B; each layer's own when left out.

    Returns:
        The adapted layers by the names of those that they took the place of, in a model that is not compiled.

    Raises:
        InputError: nothing matches (the message lists what there is), something that matches cannot be adapted or is
            already, or a value is out of range (it names the layer).
    """
    chosen = select_linear_layers(model, targets)
    for name, linear in chosen.items():
        check_rank(rank, linear.in_features, linear.out_features, name)
    made: dict[int, LoRALinear] = {}
    with _restored_on_error(model, chosen.values()):
        for name, linear in chosen.items():
            if id(linear) in made:
                continue
            try:
                made[id(linear)] = layer(
                    linear, rank, alpha, dropout, scaling_rule=scaling_rule, start=start, dtype=adapter_dtype
                )
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
    for name, linear in chosen.items():
        model.set_submodule(name, made[id(linear)])
    learning = {id(parameter) for parameter in lora_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    return {uncompiled_name(name): made[id(linear)] for name, linear in chosen.items()}


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model` by name, each once; names are those of the model before it was compiled."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {uncompiled_name(name): layer for name, layer in layers.items()}


def uncompiled_name(name: str) -> str:
    """What a module was called before it, or one that it is a part of, was wrapped by `torch.compile`."""
    return name.replace(_COMPILED, "")


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What is trained: A and B of every adapted layer, and DoRA's magnitudes."""
    for layer in adapted_layers(model).values():
        yield from (parameter for name, parameter in layer.named_parameters() if not name.startswith("base."))


def lora_parameter_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: A (and DoRA's magnitudes) with the rate η, B with λ·η (LoRA+).

    With one rate for both, A's updates hardly change the output of a wide layer: the efficient choice is η_B / η_A of
    the order of the width, in practice λ ≈ 16.

    Args:
        model: with adapters.
        lr: η.
        ratio: λ, at least 1.

    Returns:
        ``[{"params": …, "lr": η}, {"params": …, "lr": λ·η}]``.

    Raises:
        InputError: the model has no adapters, or the ratio is below 1.

    Source: Hayou et al. 2024, https://arxiv.org/abs/2402.12354.
    """
    if not ratio >= 1:
        raise InputError(f"The ratio of the learning rates is {ratio}: B's must be at least A's, so at least 1.")
    of_b = [layer.adapter.B for layer in _require_adapters(model).values()]
    known = {id(parameter) for parameter in of_b}
    others = [parameter for parameter in lora_parameters(model) if id(parameter) not in known]
    return [{"params": others, "lr": lr}, {"params": of_b, "lr": ratio * lr}]


def merge(model: nn.Module) -> None:
    """Put every update into its layer's weight (`LoRALinear.merge`); all of them or, after an error, none.

    Raises:
        InputError: the model has no adapters, or one cannot be merged.
    """
    done = []
    for name, layer in _require_adapters(model).items():
        try:
            if not layer.merged:
                layer.merge()
                done.append(layer)
        except InputError as error:
            for merged in done:
                merged.unmerge()
            raise InputError(f"{name}: {error}") from error


def unmerge(model: nn.Module) -> None:
    """Take every update out again; the weights are then the same to the bit as before `merge`.

    Raises:
        InputError: the model has no adapters.
    """
    for layer in _require_adapters(model).values():
        layer.unmerge()


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What the adapters have learned, by name: ``{layer}.adapter.A``, ``{layer}.adapter.B``, …; no base weight.

    To continue in a model with the same base and the same adapters. With a PiSSA start the frozen weight is not the
    given one, but follows from it and the ``start_A`` and ``start_B`` that are part of this. For a file that other
    software reads: `engine.lora.adapter_files`.
    """
    return {
        f"{name}.{key}": value.detach()
        for name, layer in adapted_layers(model).items()
        for key, value in layer.state_dict().items()
        if not key.startswith("base.")
    }


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `lora_state_dict` gave into a model with the same adapters; all of it or, after an error, none.

    Raises:
        InputError: the model has no adapters or some are merged, names or shapes differ (the message lists them), or
            numbers are too large for the model's dtypes.
    """
    layers = _require_adapters(model)
    if any(layer.merged for layer in layers.values()):
        raise InputError("The adapters are merged into the weights: unmerge them before loading others.")
    own = lora_state_dict(model)
    differing = sorted(
        key
        for key in own.keys() | state.keys()
        if key not in own or key not in state or own[key].shape != state[key].shape
    )
    if differing:
        raise InputError(f"The state is not of these adapters: {listed(differing)} differ in name or shape.")
    too_large = sorted(key for key, value in own.items() if not state[key].to(value).isfinite().all())
    if too_large:
        raise InputError(f"The state holds numbers too large for these adapters: {listed(too_large)} would overflow.")
    started = {
        layer: (state[f"{name}.start_A"], state[f"{name}.start_B"])
        for name, layer in layers.items()
        if layer.start_A is not None
    }
    for layer, start in started.items():  # all of them before the first is changed
        layer.rest_of_start(*start)
    for layer, start in started.items():
        layer.start_from(*start)
    for key, value in lora_state_dict(model).items():
        value.copy_(state[key])


def listed(names: Sequence[str]) -> str:
    """The first few of `names`, each shortened, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(map(shortened, names[:_LISTED])) + (f" and {more} more" if more > 0 else "")


def shortened(name: str) -> str:
    """What a sentence can hold of `name`."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, form) for pattern in patterns for form in (pattern, f"*.{pattern}"))


def select_linear_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """The linear layers of `model` whose names are meant and that can be adapted.

    Args:
        model: not adapted there yet.
        targets: as `inject_lora`'s.

    Raises:
        InputError: nothing matches, or something that matches cannot be adapted or is already.
    """
    patterns = (targets,) if isinstance(targets, str) else () if callable(targets) else tuple(targets)
    meant = targets if callable(targets) else partial(_matches, patterns)
    adapters = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoRALinear)}
    bypassed = _bypassed(model)
    chosen, linear_names, unsupported = {}, [], []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(name.startswith(f"{adapter}.") for adapter in adapters):
            continue  # the model itself, or a part of an adapted layer
        matches = meant(uncompiled_name(name))
        if matches and name in adapters:
            raise InputError(f"{name} has an adapter already: choose other layers, or load the model anew.")
        if matches and (type(module).__name__ == "Conv1D" or type(module) is NonDynamicallyQuantizableLinear):
            unsupported.append(f"{name} ({type(module).__name__})")
        elif matches and id(module) in bypassed:
            unsupported.append(f"{name} (of a {bypassed[id(module)]})")
        elif isinstance(module, nn.Linear):
            linear_names.append(name)
            if matches:
                chosen[name] = module
    if unsupported:
        raise InputError(
            "Only nn.Linear layers that their owner calls can be adapted, which does not hold for "
            f"{listed(unsupported)}: choose targets without them."
        )
    if not chosen:
        ends = Counter(name.rpartition(".")[2] for name in linear_names)
        there = listed([f"{end} ({count})" for end, count in ends.items()]) or "none"
        raise InputError(f"No linear layer's name matches {', '.join(patterns) or 'no pattern'}. There are: {there}.")
    return chosen


def _bypassed(model: nn.Module) -> dict[int, str]:
    """Layers, by id, whose weights their owner reads past any adapter, and the owner's class.

    In eval mode nn.TransformerEncoderLayer hands its weights to one kernel and calls neither of its linear layers.
    """
    owners = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return {id(linear): type(owner).__name__ for owner in owners for linear in (owner.linear1, owner.linear2)}


@contextmanager
def _restored_on_error(model: nn.Module, chosen: Collection[nn.Linear]) -> Iterator[None]:
    """Give the chosen layers their weights back, and all of the model its freedom to learn, if an error occurs."""
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = [linear.weight for linear in chosen]
    try:
        yield
    except Exception:
        for linear, weight in zip(chosen, weights, strict=True):
            linear.weight = weight
        for parameter, learned in learning:
            parameter.requires_grad_(learned)
        raise


def _require_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(model)
    if not layers:
        raise InputError("The model has no adapters: put some on it with inject_lora.")
    return layers
