"""AdamW whose state may leave the GPU, and a step that shows when that is needed.

AdamW keeps two numbers beside each weight. Paged (CUDA's unified) memory lets them wait in the host's memory and come
to the GPU page by page while a step uses them, so that a model fits whose weights and gradients fit.

    model = create_large_test_model()
    simulate_training_step(model, torch.optim.AdamW(model.parameters()))  # raises torch.cuda.OutOfMemoryError
    simulate_training_step(model, PagedAdamW(model.parameters()))         # completes

Legend: B batch, D width, L layers; a model has L·D² weights.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from engine import memory
from engine.errors import DoesNotFitError

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]

_logger = logging.getLogger(__name__)

_WIDTH = 2048
_BUDGET = 3 * 2**30
_WEIGHTS_SHARE = 0.3
"""Of the budget. With gradients 0.6 is used; AdamW's state would make it 1.2."""

_SMALL_BATCH, _LARGE_BATCH = 8, 256
_CPU_SHAPE = (64, 2)
"""Width and layers of the test model where there is no CUDA: nothing runs out there."""


def PagedAdamW(
    params: Parameters,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """AdamW with its state in paged memory: 8 bytes a weight that need not be on the GPU.

    On CUDA this is bitsandbytes' `PagedAdamW`, which pages the state of tensors of 100,000 numbers or more. On the CPU,
    where there is nothing to page, it is `torch.optim.AdamW`, and a log message says so once.

    Args:
        params: as for `torch.optim.AdamW`; all on one kind of device.
        lr: learning rate.
        betas: decay of the mean gradient and of the mean squared one.
        eps: added to the root of the latter.
        weight_decay: decoupled.

    Source: Loshchilov and Hutter 2019, AdamW; Dettmers et al. 2023, QLoRA, paged optimizers.
    """
    given = [_listed(entry) for entry in params]
    tensors = [tensor for entry in given for tensor in (entry["params"] if isinstance(entry, dict) else [entry])]
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if any(tensor.is_cuda for tensor in tensors):
        from bitsandbytes import optim

        return optim.PagedAdamW(given, **options)
    _say_plain()
    return torch.optim.AdamW(given, **options)


def create_large_test_model() -> nn.Module:
    """A stack of linear layers that leaves no room for AdamW's state on the GPU, (B, D) → (B, D).

    On CUDA it sets the caching allocator's limit to what is in use and 3 GiB more (half of what is free or the limit
    that there is, where that is less), and fills 30 % of them with float32 weights: with gradients 60 %, with AdamW's
    state 120 %. The state that `PagedAdamW` keeps instead is as large as 60 %, which the card has free outside of the
    limit. The limit that was there before comes back when the model is gone. Without CUDA it is a small model, and
    nothing runs out.

    Returns:
        The model on CUDA if there is one, else on the CPU.

    Raises:
        DoesNotFitError: the GPU has less than 112 MiB free, or the limit leaves less than 56.
    """
    if not torch.cuda.is_available():
        return _stack(*_CPU_SHAPE, "cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    total, used = memory.total(str(device)), torch.cuda.memory_reserved(device)
    before = torch.cuda.get_per_process_memory_fraction(device)
    budget = min(_BUDGET, memory.free(str(device)) // 2, int(before * total) - used)
    layers = int(_WEIGHTS_SHARE * budget) // (4 * _WIDTH**2)
    if layers < 1:
        raise DoesNotFitError(
            f"{device} has {budget / 2**20:.0f} MiB for the test, which needs 56: end what else runs."
        )
    torch.cuda.set_per_process_memory_fraction((used + budget) / total, device)
    model = _stack(_WIDTH, layers, device)
    weakref.finalize(model, torch.cuda.set_per_process_memory_fraction, before, device).atexit = False
    return model


def simulate_training_step(model: nn.Module, optimizer: torch.optim.Optimizer, large_batch: bool = False) -> float:
    """One step on random numbers: forward, mean squared output, backward, update.

    A step that runs out of memory frees its gradients and the half-made state of the optimizer before it raises, so
    that another optimizer can be tried on the same model.

    Args:
        model: (B, D) → (B, D), from `create_large_test_model` or alike: its first parameter is (…, D).
        optimizer: of its parameters.
        large_batch: 256 samples instead of 8.

    Returns:
        The loss before the update.

    Raises:
        torch.cuda.OutOfMemoryError: the step does not fit.
    """
    try:
        return _step(model, optimizer, _LARGE_BATCH if large_batch else _SMALL_BATCH)
    except torch.cuda.OutOfMemoryError as error:
        message = str(error)
    # Only here are the frames of the failed step gone, and with them what they held.
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    torch.cuda.empty_cache()
    raise torch.cuda.OutOfMemoryError(message)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> float:
    weight = next(model.parameters())
    x = torch.randn(batch_size, weight.shape[-1], device=weight.device, dtype=weight.dtype)
    optimizer.zero_grad(set_to_none=True)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def _stack(width: int, layers: int, device: torch.device | str) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(layers)))


def _listed(entry: Tensor | dict[str, Any]) -> Tensor | dict[str, Any]:
    """A group with its parameters in a list, since they are looked through here and again by the optimizer."""
    if not isinstance(entry, dict):
        return entry
    inner = entry["params"]
    return {**entry, "params": [inner] if isinstance(inner, Tensor) else list(inner)}


@cache
def _say_plain() -> None:
    _logger.warning("PagedAdamW is plain AdamW here: the parameters are on the CPU, where there is nothing to page.")
