"""Which of a model's layers can be quantized, and why the others are left as they are.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from engine.errors import InputError


@dataclass(frozen=True)
class LeftAlone:
    """Weights that keep their precision.

    Args:
        name: of the parameter.
        shape: of it.
        nbytes: of it.
        reason: one sentence.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """The linear layers of a model, told apart.

    Args:
        chosen: those to quantize, by name; one that several names lead to has the first.
        left: every other parameter of two dimensions or more, each once.
    """

    chosen: dict[str, nn.Linear]
    left: tuple[LeftAlone, ...]


Objection = Callable[[str, nn.Linear], str | None]
"""Says why a linear layer of that name is not to be quantized, in a sentence; None if it is."""


def only(wanted: Callable[[str], bool]) -> Objection:
    """Objects to every layer whose name is not `wanted`."""
    return lambda name, _: None if wanted(name) else "It was not asked for."


def select_layers(model: nn.Module, objection: Objection | None = None) -> Selection:
    """Every plain `nn.Linear` of `model` whose weight is its own, and the reasons why other matrices are not taken.

    Vectors, such as biases and the gains of norms, are too small to matter and are not listed.

    Args:
        model: ours or transformers', or any other.
        objection: to layers that could be quantized; none if left out.

    Raises:
        InputError: there is none to quantize; the message says what there is.
    """
    owners = _owners(model)
    chosen, left, seen = {}, [], set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}".removeprefix(".")
            if id(parameter) in seen or (parameter.dim() < 2 and not _is_quantized(parameter)):
                continue
            seen.add(id(parameter))
            reason = _reason(module, own_name, parameter, owners[id(parameter)])
            if reason is None and objection is not None:
                reason = objection(module_name, module)
            if reason is None:
                chosen[module_name] = module
            else:
                left.append(LeftAlone(name, tuple(parameter.shape), parameter.nbytes, reason))
    if not chosen:
        there = "; ".join(f"{entry.name}: {entry.reason.removesuffix('.')}" for entry in left[:3])
        raise InputError(f"The model has no linear layer to quantize: {there or 'it has no matrices'}.")
    return Selection(chosen, tuple(left))


def copy_without_weights(model: nn.Module, selection: Selection) -> nn.Module:
    """A copy of `model` that shares the chosen layers' weights with it, for they are about to be replaced there."""
    shared = {id(linear.weight): linear.weight for linear in selection.chosen.values()}
    return copy.deepcopy(model, shared)


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By parameter, all modules that hold it, each once."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _reason(module: nn.Module, own_name: str, parameter: Tensor, owners: list[tuple[str, nn.Module]]) -> str | None:
    """Why `parameter` is not to be quantized; None if it is."""
    kind = type(module).__name__
    if _is_quantized(parameter):
        return f"It is quantized already, a {kind}."
    if len(owners) > 1:
        return (
            f"It is shared by {' and '.join(name for name, _ in owners)}: a quantized copy for one would cost memory "
            "instead of saving it."
        )
    if isinstance(module, nn.Embedding):
        return "It is an embedding: its rows are looked up, not multiplied."
    if parameter.dim() > 2:
        return (
            f"It has {parameter.dim()} dimensions and {kind} multiplies it by itself: only nn.Linear's are quantized."
        )
    if type(module) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads it without calling its layer."
    if type(module) is not nn.Linear or own_name != "weight":
        return f"It is a matrix of {kind}, which multiplies it by itself: only nn.Linear has a quantized counterpart."
    return None


def _is_quantized(parameter: Tensor) -> bool:
    return hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")
