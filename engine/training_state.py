"""What training has to remember to go on as if it had never stopped, in one safetensors file.

Tensors: ``model.*``, ``optimizer.<parameter>.*``, ``random.cpu`` and ``random.cuda``; the rest is JSON in the file's
header. Nothing is pickled, so opening a foreign file runs no code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import InputError

_HEADER = "workbench_training"
_CPU, _CUDA = "random.cpu", "random.cuda"
_MEANS = ("exp_avg", "exp_avg_sq")
_ADAMW = {"step", *_MEANS}


class DamagedCheckpointError(InputError):
    """The file was a checkpoint once, or a part of one."""

    def __init__(self) -> None:
        super().__init__("The checkpoint is damaged or incomplete: use an earlier one, or start again.")


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers, the optimizer's state and the random generators', by name; shared weights once."""
    tensors = {f"model.{name}": tensor for name, tensor in _weights(model).items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors | _random_states(model)


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], begun: bool) -> None:
    """Put what `collect` returned back, into a model of the same shape; nothing is changed unless all of it fits.

    Args:
        model: whose weights they are.
        optimizer: AdamW.
        tensors: what `collect` returned.
        begun: whether a step was taken, so that the optimizer has something to remember of all that is not frozen.

    Raises:
        InputError: the tensors are those of another model, or of one with other weights frozen.
        DamagedCheckpointError: not all of them are there, or some hold what training cannot have left.
    """
    weights, given = _weights(model), _part(tensors, "model.")
    for name in sorted(weights.keys() | given.keys()):
        found, wanted = given.get(name), weights.get(name)
        if found is None or wanted is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise InputError(
                f"The checkpoint is of another model: its {name} is {_described(found)}, here it is "
                f"{_described(wanted)}; give one that was saved from this architecture."
            )
    states = {parameter: _part(tensors, f"optimizer.{name}.") for name, parameter in model.named_parameters()}
    if begun and any(states.values()):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != bool(states[parameter]):
                there, here = ("frozen", "trained") if parameter.requires_grad else ("trained", "frozen")
                raise InputError(
                    f"The checkpoint trained other weights: {name} is {there} in it and {here} in this model; freeze "
                    "the same ones."
                )
    random = {name: tensors.get(name) for name in _random_states(model) if name == _CPU or name in tensors}
    if not (
        all(value.isfinite().all() for value in given.values() if value.is_floating_point())
        and all(_remembers(state, parameter, begun) for parameter, state in states.items())
        and all(_starts(state, _device(model) if name == _CUDA else "cpu") for name, state in random.items())
    ):
        raise DamagedCheckpointError

    for name, weight in weights.items():
        weight.copy_(given[name])
    for parameter, state in states.items():
        if state:
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" and not _fused(optimizer) else value.to(parameter.device)
                for key, value in state.items()
            }
    torch.set_rng_state(random[_CPU])
    if _CUDA in random:
        torch.cuda.set_rng_state(random[_CUDA], _device(model))


def write(path: str | os.PathLike, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able `facts` to `path`; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, unfinished, metadata={_HEADER: json.dumps(facts)})
    unfinished.replace(target)


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], Any]:
    """Tensors and facts that `write` wrote to `path`.

    Raises:
        InputError: there is no such file, it is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        facts = None if header is None else json.loads(header)
    except FileNotFoundError as error:
        raise InputError(f"There is no checkpoint {os.fspath(path)}: check the path.") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError from error
    if header is None:
        raise InputError(f"The file {os.fspath(path)} is no checkpoint of a training run: it holds weights alone.")
    return tensors, facts


def _remembers(state: dict[str, Tensor], parameter: nn.Parameter, begun: bool) -> bool:
    """Whether `state` is what AdamW keeps of a parameter: nothing before the first step, and never of a frozen one."""
    if not (begun and parameter.requires_grad):
        return not state
    return (
        state.keys() == _ADAMW
        and state["step"].shape == ()
        and state["step"].is_floating_point()
        and all(state[key].shape == parameter.shape and state[key].dtype == parameter.dtype for key in _MEANS)
        and all(value.isfinite().all() for value in state.values())
        and bool(state["step"] >= 1)
        and bool((state["exp_avg_sq"] >= 0).all())
    )


def _starts(state: Tensor | None, device: torch.device | str) -> bool:
    """Whether a random generator can go on from `state`."""
    try:
        torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """The generators that draw for `model`: the CPU's, and that of the GPU where it is."""
    states = {_CPU: torch.get_rng_state()}
    if _device(model).type == "cuda":
        states[_CUDA] = torch.cuda.get_rng_state(_device(model))
    return states


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{'×'.join(map(str, tensor.shape)) or 'a number'} in {str(tensor.dtype).removeprefix('torch.')}"
