"""What `engine.moe.rows` defines, in one pass over memory each, for CUDA, in Triton.

Sums are in float32 and in the order of the rows, so that they repeat to the bit, which atomic additions do not.

Legend: N tokens, A assignments (rows), D model width, F feed-forward width, W columns of one program.
"""
# ruff: noqa: ANN001, ANN202 - what the kernels take and give are blocks of numbers, and Triton reads annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048
"""W at most: what one program holds of a row."""


def sum_rows(rows: Tensor, gates: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """y[n] = Σ gates[a] · rows[a] over a in order[starts[n] : starts[n + 1]].

    Args:
        rows: (A, D).
        gates: (A,); 1 each when left out.
        order: the rows by token, (A,).
        starts: (N + 1,).

    Returns:
        (N, D) in the rows' dtype.
    """
    rows = rows.contiguous()
    width = rows.shape[1]
    y = rows.new_empty(len(starts) - 1, width)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if y.numel():
        with torch.cuda.device_of(rows):
            _sum_rows_kernel[(len(y), triton.cdiv(width, columns))](
                rows, rows if gates is None else gates.contiguous(), order, starts, y, width,
                GATED=gates is not None, COLUMNS=columns, num_warps=_warps(columns),
            )  # fmt: skip
    return y


def sum_rows_backward(gradient: Tensor, rows: Tensor, gates: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """gates[a] · gradient[token of a], and ⟨rows[a], gradient[token of a]⟩.

    Args:
        gradient: of y, (N, D).
        rows: (A, D).
        gates: (A,).
        tokens: of the rows, (A,).

    Returns:
        The gradients of the rows (A, D) and of the gates (A,).
    """
    gradient, rows, gates = gradient.contiguous(), rows.contiguous(), gates.contiguous()
    width = rows.shape[1]
    rows_gradient, gates_gradient = torch.empty_like(rows), torch.zeros_like(gates)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if rows.numel():
        with torch.cuda.device_of(rows):
            _sum_rows_backward_kernel[(len(rows),)](
                gradient, rows, gates, tokens, rows_gradient, gates_gradient, width,
                COLUMNS=columns, num_warps=_warps(columns),
            )  # fmt: skip
    return rows_gradient, gates_gradient


def silu_times(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up of (A, 2F), rounded once: (A, F)."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[1] // 2
    y = gate_up.new_empty(len(gate_up), width)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if y.numel():
        with torch.cuda.device_of(y):
            _silu_times_kernel[(len(y), triton.cdiv(width, columns))](
                gate_up, y, width, COLUMNS=columns, num_warps=_warps(columns)
            )
    return y


def silu_times_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up side by side, (A, 2F), from that of what `silu_times` returned, (A, F)."""
    gradient, gate_up = gradient.contiguous(), gate_up.contiguous()
    width = gradient.shape[1]
    gate_up_gradient = torch.empty_like(gate_up)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            _silu_times_backward_kernel[(len(gradient), triton.cdiv(width, columns))](
                gradient, gate_up, gate_up_gradient, width, COLUMNS=columns, num_warps=_warps(columns)
            )
    return gate_up_gradient


def _warps(columns: int) -> int:
    return max(1, min(8, columns // 256))  # eight numbers a thread, 16 bytes in half precision


@triton.jit
def _sum_rows_kernel(
    rows_ptr,
    gates_ptr,
    order_ptr,
    starts_ptr,
    y_ptr,
    width,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (W,)
    inside = columns < width
    first = tl.load(starts_ptr + token).to(tl.int32)
    last = tl.load(starts_ptr + token + 1).to(tl.int32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in range(first, last):
        row = tl.load(order_ptr + place).to(tl.int64)
        values = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            values *= tl.load(gates_ptr + row).to(tl.float32)
        total += values
    tl.store(y_ptr + token * width + columns, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows_backward_kernel(
    gradient_ptr,
    rows_ptr,
    gates_ptr,
    tokens_ptr,
    rows_gradient_ptr,
    gates_gradient_ptr,
    width,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    gate = tl.load(gates_ptr + row).to(tl.float32)
    product = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)  # (W,)
        inside = columns < width
        upstream = tl.load(gradient_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        product += upstream * values
        given = (gate * upstream).to(rows_gradient_ptr.dtype.element_ty)
        tl.store(rows_gradient_ptr + row * width + columns, given, mask=inside)
    tl.store(gates_gradient_ptr + row, tl.sum(product).to(gates_gradient_ptr.dtype.element_ty))


@triton.jit
def _silu_times_kernel(gate_up_ptr, y_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (W,)
    inside = columns < width
    gate = tl.load(gate_up_ptr + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _silu_times_backward_kernel(gradient_ptr, gate_up_ptr, gate_up_gradient_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (W,)
    inside = columns < width
    upstream = tl.load(gradient_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gate_gradient = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    up_gradient = upstream * gate * sigmoid
    place = gate_up_gradient_ptr + 2 * row * width + columns
    tl.store(place, gate_gradient.to(gate_up_gradient_ptr.dtype.element_ty), mask=inside)
    tl.store(place + width, up_gradient.to(gate_up_gradient_ptr.dtype.element_ty), mask=inside)
