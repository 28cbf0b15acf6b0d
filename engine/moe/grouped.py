"""One product for all experts: rows that are sorted by expert, each with its expert's matrix.

    y = grouped_product(x, weights, counts)  # (A, I), (E, I, O), (E,) → (A, O)

PyTorch has one kernel for it where `obstacle` finds nothing in its way; a loop of one product an expert computes the
same everywhere else, and is what a learner may read first.

Legend: A assignments (rows), E experts, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from engine.errors import InputError

HOPPER = (9, 0)
_fused = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class Groups:
    """How many consecutive rows belong to each expert.

    Args:
        counts: rows of each expert, (E,) integers on the rows' device; they add up to A.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    @cached_property
    def offsets(self) -> Tensor:
        """Where each expert's rows end, (E,) int32."""
        return self.counts.cumsum(0, dtype=torch.int32)

    @cached_property
    def sizes(self) -> list[int]:
        """The counts in Python, for which a GPU has to be waited for, once."""
        return self.counts.tolist()


def grouped_product(x: Tensor, weights: Tensor, groups: Groups | Tensor) -> Tensor:
    """y[a] = x[a] · weights[e(a)], where the first counts[0] rows belong to expert 0, the next counts[1] to expert 1…

    Differentiable in x and weights; an expert without rows gets a gradient of zeros. Under autocast both are computed
    in its dtype, as PyTorch's other products are.

    Args:
        x: (A, I), sorted by expert.
        weights: (E, I, O), also as a transposed view of (E, O, I).
        groups: the experts' rows; the same `Groups` for several products spares work. A tensor is taken for its counts.

    Returns:
        (A, O).

    Raises:
        InputError: the shapes do not belong together.
    """
    groups = Groups(groups) if isinstance(groups, Tensor) else groups
    _check(x, weights, groups)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, weights = (each.to(torch.get_autocast_dtype(device)) for each in (x, weights))
    if obstacle(x, weights):
        return looped_product(x, weights, groups)
    y = _fused(x, weights, offs=groups.offsets)
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(Tensor.contiguous)  # the kernel does not take the expanded gradient of a sum
    return y


def obstacle(x: Tensor, weights: Tensor) -> str:
    """Why PyTorch's one kernel is not used for such tensors, in a sentence; empty where it is.

    Source: the kernel's own checks in torch 2.11 and 2.13, `aten/src/ATen/native/cuda/GroupedBlas.cpp`; on Blackwell
    https://github.com/pytorch/pytorch/issues/172439.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if _fused is None:
        return "this PyTorch has no grouped product."
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not know {dtype}."
    if x.shape[0] == 0:
        return "there are no rows, which it does not take in every direction."
    if not (_aligned(x) and _aligned(weights)) or any(size * x.itemsize % 16 for size in weights.shape[1:]):
        return "its rows, and those of its gradients, must begin at multiples of 16 bytes."
    if x.dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return f"compiled it is known only in bfloat16, not in {dtype}."
    if x.device.type == "cuda":
        if x.dtype != torch.bfloat16:
            return f"on a GPU it is a kernel only in bfloat16, and a loop that waits for the GPU in {dtype}."
        if torch.cuda.get_device_capability(x.device) != HOPPER:
            return "only on Hopper is the gradient of an expert without rows known to be zero."
    return ""


def _aligned(x: Tensor) -> bool:
    """Whether one of the last two dimensions is dense and the other's steps are multiples of 16 bytes."""
    *_, rows, columns = x.stride()
    dense, step = (columns, rows) if columns == 1 else (rows, columns)
    return dense == 1 and step % (16 // x.itemsize) == 0 and x.data_ptr() % 16 == 0


@torch.compiler.disable  # the counts become numbers of Python, anew in every batch
def looped_product(x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """The same as `grouped_product`, as one ordinary product an expert.

    Args:
        x: (A, I), sorted by expert.
        weights: (E, I, O).
        groups: the experts' rows.
    """
    sizes = groups.sizes if x.shape[0] else [0] * len(weights)
    return _LoopedProduct.apply(x, weights, sizes)


class _LoopedProduct(torch.autograd.Function):
    """The products are written where they belong, which spares a copy of all of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        return _product(x, weights, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        x_gradient = weights_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _product(gradient, weights.mT, ctx.sizes)
        if ctx.needs_input_grad[1]:
            weights_gradient = torch.empty_like(weights)  # laid out as the weights are
            parts = zip(x.split(ctx.sizes), gradient.split(ctx.sizes), weights_gradient, strict=True)
            for rows, upstream, part in parts:
                torch.mm(rows.mT, upstream, out=part)  # zeros where there are no rows
        return x_gradient, weights_gradient, None


def _product(x: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    y = x.new_empty(x.shape[0], weights.shape[-1])  # (A, O)
    for rows, weight, part in zip(x.split(sizes), weights, y.split(sizes), strict=True):
        torch.mm(rows, weight, out=part)
    return y


def _check(x: Tensor, weights: Tensor, groups: Groups) -> None:
    if x.dim() != 2 or weights.dim() != 3 or x.shape[1] != weights.shape[1]:
        raise InputError(
            f"Rows of shape {tuple(x.shape)} and weights of shape {tuple(weights.shape)} do not multiply: "
            "give (rows, inputs) and (experts, inputs, outputs) with as many inputs."
        )
    if groups.counts.shape != weights.shape[:1]:
        raise InputError(
            f"There are counts of shape {tuple(groups.counts.shape)} for {len(weights)} experts: give one an expert."
        )
