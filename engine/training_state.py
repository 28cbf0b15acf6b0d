"""What training has to remember to go on as if it had never stopped, in one safetensors file.

Tensors: ``model.*``, ``best.*`` (the weights of the best evaluation so far, where they are kept),
``optimizer.<parameter>.*``, and the random generators' ``random.cpu`` and ``random.cuda``, with ``random.<rank>.*`` of
further processes; the rest is JSON in the file's header. Nothing is pickled, so opening a foreign file runs no code.

The optimizer's tensors have torch's names (`step`, `exp_avg`, `exp_avg_sq`) whichever AdamW it is, so that a run that
paged them on a GPU goes on where there is nothing to page.
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
from engine.quantization.production import scales_of

_HEADER = "workbench_training"
_CPU, _CUDA = "cpu", "cuda"
_MEANS = ("exp_avg", "exp_avg_sq")
_ADAMW = {"step", *_MEANS}
_IN_BITSANDBYTES = {"exp_avg": "state1", "exp_avg_sq": "state2"}


class DamagedCheckpointError(InputError):
    """The file was a checkpoint once, or a part of one."""

    def __init__(self) -> None:
        super().__init__("The checkpoint is damaged or incomplete: use an earlier one, or start again.")


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's state, by name; shared weights once."""
    tensors = {f"model.{name}": tensor for name, tensor in tensors_of(model).items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in _memory(optimizer, parameter).items()}
    return tensors


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones once, and `scales_of` it."""
    return dict(model.named_parameters()) | _buffers(model) | scales_of(model)


@torch.no_grad()
def copy_learned(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the CPU, of what training changes: the parameters that are not frozen, and the buffers."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _learned(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, learned: dict[str, Tensor]) -> None:
    """Give `model` the values that `copy_learned` took.

    Raises:
        DamagedCheckpointError: they are not all there, of other shapes or no numbers; nothing is changed then.
    """
    check_learned(model, learned)
    for name, tensor in _learned(model).items():
        tensor.copy_(learned[name])


def check_learned(model: nn.Module, learned: dict[str, Tensor]) -> None:
    """Raise DamagedCheckpointError unless `learned` may have come from `copy_learned`."""
    wanted = _learned(model)
    if wanted.keys() != learned.keys() or not all(
        _alike(learned[name], tensor) and _is_finite(learned[name]) for name, tensor in wanted.items()
    ):
        raise DamagedCheckpointError


def random_states(model: nn.Module) -> dict[str, Tensor]:
    """The generators that draw for `model` in this process: the CPU's, and that of the GPU where it is."""
    states = {_CPU: torch.get_rng_state()}
    if _device(model).type == "cuda":
        states[_CUDA] = torch.cuda.get_rng_state(_device(model))
    return states


def name_random(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The names in the file of what `random_states` returned in each process, by rank."""
    return {_random_prefix(rank) + kind: state for rank, found in enumerate(states) for kind, state in found.items()}


def check(model: nn.Module, tensors: dict[str, Tensor], remembers: bool, rank: int = 0) -> None:
    """Check that what was read can be put back into `model`, by `restore`; nothing is changed.

    Args:
        model: whose weights they are, in the same shape.
        tensors: what `collect` and `name_random` returned.
        remembers: whether the optimizer has something to remember of all that is not frozen, as it does after a step.
        rank: of this process; the main one's generators must be there.

    Raises:
        InputError: the tensors are those of another model, or of one with other weights frozen.
        DamagedCheckpointError: not all of them are there, or some hold what training cannot have left.
    """
    weights, given = tensors_of(model), part(tensors, "model.")
    for name in sorted(weights.keys() | given.keys()):
        found, wanted = given.get(name), weights.get(name)
        if found is None or wanted is None or not _alike(found, wanted):
            raise InputError(
                f"The checkpoint is of another model: its {name} is {_described(found)}, here it is "
                f"{_described(wanted)}; give one that was saved from this architecture."
            )
    states = {parameter: part(tensors, f"optimizer.{name}.") for name, parameter in model.named_parameters()}
    if remembers and any(states.values()):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != bool(states[parameter]):
                there, here = ("frozen", "trained") if parameter.requires_grad else ("trained", "frozen")
                raise InputError(
                    f"The checkpoint trained other weights: {name} is {there} in it and {here} in this model; freeze "
                    "the same ones."
                )
    random = _random_part(model, tensors, rank)
    if not (
        all(_is_finite(value) for value in given.values())
        and all(_fits(state, parameter, remembers) for parameter, state in states.items())
        and all(_starts(state, _device(model) if name == _CUDA else "cpu") for name, state in random.items())
    ):
        raise DamagedCheckpointError


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rank: int = 0) -> bool:
    """Put back what `check` found to fit.

    Args:
        model: whose weights they are, in the same shape.
        optimizer: AdamW, which has not taken a step.
        tensors: what `collect` and `name_random` returned.
        rank: of this process.

    Returns:
        Whether the generators of this process were put back too: those of further processes may be missing.
    """
    for name, weight in tensors_of(model).items():
        weight.copy_(tensors[f"model.{name}"])
    states = {parameter: part(tensors, f"optimizer.{name}.") for name, parameter in model.named_parameters()}
    _remind(optimizer, {parameter: state for parameter, state in states.items() if state})
    random = _random_part(model, tensors, rank)
    if _CPU in random:
        torch.set_rng_state(random[_CPU])
    if _CUDA in random:
        torch.cuda.set_rng_state(random[_CUDA], _device(model))
    return _CPU in random


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


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad} | _buffers(model)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    model.state_dict()  # what a module has yet to do to its buffers it does before it is saved
    return dict(model.named_buffers())


def _memory(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What AdamW remembers of a parameter, under torch's names; bitsandbytes counts steps in a plain number."""
    state = optimizer.state.get(parameter, {})
    theirs = {name: ours for ours, name in _IN_BITSANDBYTES.items()}
    return {
        theirs.get(key, key): value if isinstance(value, Tensor) else torch.tensor(float(value))
        for key, value in state.items()
    }


def _remind(optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    """Let an optimizer that has not taken a step remember `states`."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter not in states:
                continue
            given = states[parameter]
            if hasattr(optimizer, "init_state"):  # bitsandbytes' own way to make room, which may be paged
                optimizer.init_state(group, parameter, group_index, index)
                room = optimizer.state[parameter]
                room["step"] = int(given["step"])
                if parameter.is_cuda:
                    torch.cuda.synchronize(parameter.device)  # it fills paged memory that we write to on the CPU
                for key, name in _IN_BITSANDBYTES.items():
                    room[name].copy_(given[key])
            else:
                fused = bool(optimizer.defaults.get("fused"))
                means = {key: given[key].to(parameter.device, parameter.dtype, copy=True) for key in _MEANS}
                step = given["step"].to(parameter.device) if fused else given["step"].clone()
                optimizer.state[parameter] = {"step": step, **means}


def _random_part(model: nn.Module, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor | None]:
    """The states of the generators of process `rank` that are there; None for one that has to be and is not."""
    prefix = _random_prefix(rank)
    found = {kind: tensors[prefix + kind] for kind in random_states(model) if prefix + kind in tensors}
    return {_CPU: None} | found if rank == 0 else found


def _random_prefix(rank: int) -> str:
    return "random." if rank == 0 else f"random.{rank}."


def _fits(state: dict[str, Tensor], parameter: nn.Parameter, remembers: bool) -> bool:
    """Whether `state` is what AdamW keeps of a parameter: nothing of a frozen one, nor if it remembers nothing."""
    if not (remembers and parameter.requires_grad):
        return not state
    return (
        state.keys() == _ADAMW
        and state["step"].shape == ()
        and state["step"].is_floating_point()
        and all(state[key].shape == parameter.shape for key in _MEANS)
        and all(state[key].dtype in (parameter.dtype, torch.float32) for key in _MEANS)
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


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and found.dtype == wanted.dtype


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{'×'.join(map(str, tensor.shape)) or 'a number'} in {str(tensor.dtype).removeprefix('torch.')}"
