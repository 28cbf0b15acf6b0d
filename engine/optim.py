"""AdamW whose state may leave the GPU, and a step that shows when that is needed.

AdamW keeps two numbers beside each weight. Paged (CUDA's unified) memory lets them wait in the host's memory and come
to the GPU page by page while a step uses them, so that a model fits whose weights and gradients fit.

    model = create_large_test_model()
    simulate_training_step(model, torch.optim.AdamW(model.parameters()))  # raises torch.cuda.OutOfMemoryError
    simulate_training_step(model, PagedAdamW(model.parameters()))         # completes

Legend: B batch, D width, L layers; the model has L·D² weights.
"""

from __future__ import annotations

import logging
import math
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

_BUDGET = 3 * 2**30
_LEAST_BUDGET = 512 * 2**20
"""Of which 40 % hold what is not weights or gradients: activations, and cuBLAS' 64 MiB."""

_WEIGHTS_SHARE = 0.3
"""Of the budget. With gradients 0.6 is used; AdamW's state would make it 1.2."""

_LEAST_LAYERS = 16
"""Rounding down to whole layers then leaves 16/17 of the weights at least: 4 · 0.3 · 16/17 of the budget is 1.13."""

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

    PyTorch's allocator knows nothing of the paged memory, so that neither `torch.cuda.max_memory_allocated` nor a
    `StepReport`'s `memory_bytes` counts it, though some of it may be on the GPU. bitsandbytes' page manager holds on to
    it until the process ends: an optimizer that is gone frees nothing, and one whose state is cleared, as where a
    `Trainer` starts another run, takes as much again.

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


class LargeTestModel(nn.Sequential):
    """A stack of L linear layers without bias, (B, D) → (B, D).

    Args:
        width: D.
        layers: L.
        device: of the weights.
        budget: bytes that the model was sized to; 0 where nothing limits it.
        limit: what the budget is, in words; empty likewise.
    """

    def __init__(self, width: int, layers: int, device: torch.device, budget: int = 0, limit: str = "") -> None:
        super().__init__(*(nn.Linear(width, width, bias=False, device=device) for _ in range(layers)))
        self.budget, self.limit = budget, limit


def create_large_test_model(budget: int = _BUDGET) -> LargeTestModel:
    """A stack of linear layers that leaves no room for AdamW's state on the GPU, (B, D) → (B, D).

    On CUDA it sets the caching allocator's limit to what is in use and `budget` more (half of what is free or the
    limit that there is, where that is less), and fills 30 % of that with whole layers of float32 weights: with
    gradients up to 60 %, with AdamW's state 112 to 120 %. The state that `PagedAdamW` keeps instead is as
    large as 60 %, which the card has free outside of the limit. The limit that was there before comes back when the
    model is gone. Without CUDA it is a small model, and nothing runs out, whatever the budget.

    Args:
        budget: bytes for weights, gradients, activations and state.

    Returns:
        The model on CUDA if there is one, else on the CPU; it says which budget it got, and what that is.

    Raises:
        DoesNotFitError: on CUDA, fewer than 512 MiB: the budget, half of what is free, or what the limit leaves.
    """
    if not torch.cuda.is_available():
        return LargeTestModel(*_CPU_SHAPE, torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    total, used = memory.total(str(device)), torch.cuda.memory_reserved(device)
    before = torch.cuda.get_per_process_memory_fraction(device)
    limits = {
        "the budget": budget,
        f"half of what {device} has free": memory.free(str(device)) // 2,
        "what the limit of PyTorch's allocator leaves": int(before * total) - used,
    }
    limit, given = min(limits.items(), key=lambda item: item[1])
    width, layers = large_test_shape(given, limit)
    torch.cuda.set_per_process_memory_fraction((used + given) / total, device)
    model = LargeTestModel(width, layers, device, given, limit)
    weakref.finalize(model, torch.cuda.set_per_process_memory_fraction, before, device).atexit = False
    return model


def large_test_shape(budget: int, limit: str = "the budget") -> tuple[int, int]:
    """D and L of float32 weights that take 30 % of `budget`, rounded down to whole layers.

    D is the largest power of two for which there are 16 layers or more.

    Args:
        budget: bytes.
        limit: what that is, for the message.

    Raises:
        DoesNotFitError: fewer than 512 MiB.
    """
    if budget < _LEAST_BUDGET:
        raise DoesNotFitError(
            f"The test model needs {_LEAST_BUDGET / 2**20:.0f} MiB, and {limit} is {max(budget, 0) / 2**20:.0f}: "
            f"{'give more' if limit == 'the budget' else 'end what else uses the GPU'}."
        )
    weights = int(_WEIGHTS_SHARE * budget) // 4  # L·D² at most
    width = 2 ** int(math.log2(weights / _LEAST_LAYERS) / 2)
    return width, weights // width**2


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


def _listed(entry: Tensor | dict[str, Any]) -> Tensor | dict[str, Any]:
    """A group with its parameters in a list, since they are looked through here and again by the optimizer."""
    if not isinstance(entry, dict):
        return entry
    inner = entry["params"]
    return {**entry, "params": [inner] if isinstance(inner, Tensor) else list(inner)}


@cache
def _say_plain() -> None:
    _logger.warning("PagedAdamW is plain AdamW here: the parameters are on the CPU, where there is nothing to page.")
