"""A candidate for `engine.moe.grouped`: the product in Triton, with what surrounds it inside; forward, for CUDA.

    hidden = expert_product(x, gate_up_proj.mT, groups, tokens=tokens, gated=True)  # (N, D) → (A, F)
    y = expert_product(hidden, down_proj.mT, groups)  # (A, F) → (A, D)

The rows are gathered while they are read, and silu(gate) ⊙ up is taken from sums that have not left the chip, so that
neither the gathered rows nor gate and up are ever written. One program computes one tile of one expert's rows. Which
expert that is it finds out from the counts, so that nothing waits for the GPU: there are as many programs as the worst
counts would need, and those that are left over end at once.

Legend: N tokens, A assignments (rows), E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.moe.grouped import Groups


class Launch(NamedTuple):
    """How work is cut up for the GPU.

    Args:
        rows: of a tile, a power of two, at least 16.
        columns: of a tile, likewise; of gate and of up each if gated.
        inner: terms of the sums that are on the chip at a time, likewise.
        num_warps: that share a tile.
        num_stages: steps that are on their way to the chip at a time.
        described: whether the weights, and rows that lie in order, are copied by the chip's own engine (TMA).
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    described: bool


LAUNCHES = tuple(
    Launch(128, columns, 64, 8, stages, described)
    for described in (True, False)
    for columns, stages in ((128, 3), (128, 4), (256, 3))
)
BAND = 16
"""Tiles of rows that share the weights' columns before the next columns come, so that both stay in the cache."""


def expert_product(
    x: Tensor,
    weights: Tensor,
    groups: Groups,
    *,
    tokens: Tensor | None = None,
    gated: bool = False,
    launch: Launch = LAUNCHES[0],
) -> Tensor:
    """y[a] = x[tokens[a]] · weights[e(a)], or silu of its first half times its second if gated; forward only.

    Args:
        x: (A, I), sorted by expert, or (N, I) with `tokens`; bfloat16 or float16.
        weights: (E, I, O) as a transposed view of (E, O, I); every row of those begins at a multiple of 16 bytes.
        groups: the experts' rows.
        tokens: the rows of x that the assignments read, (A,).
        gated: whether the outputs are gate and up side by side.
        launch: how the work is cut up.

    Returns:
        (A, O), or (A, O / 2) if gated.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    stored = weights.mT.contiguous()  # (E, O, I)
    num_rows = len(x) if tokens is None else len(tokens)
    num_experts, outputs, inputs = stored.shape
    width = outputs // 2 if gated else outputs
    y = x.new_empty(num_rows, width)
    if not y.numel():
        return y
    described_x = launch.described and tokens is None
    columns = min(launch.columns, 128) if gated else launch.columns
    tiles = triton.cdiv(num_rows, launch.rows) + num_experts
    flat = stored.view(num_experts * outputs, inputs)
    with torch.cuda.device_of(x):
        _expert_product_kernel[(tiles * triton.cdiv(width, columns),)](
            TensorDescriptor.from_tensor(x, [launch.rows, launch.inner]) if described_x else x,
            TensorDescriptor.from_tensor(flat, [columns, launch.inner]) if launch.described else flat,
            x if tokens is None else tokens,
            groups.offsets,
            y,
            x.stride(0),
            num_experts,
            inputs,
            width,
            GATHERED=tokens is not None,
            GATED=gated,
            DESCRIBED=launch.described,
            WHOLE=inputs % launch.inner == 0,
            EXPERTS=triton.next_power_of_2(num_experts),
            ROWS=launch.rows,
            COLUMNS=columns,
            INNER=launch.inner,
            BAND=BAND,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return y


@triton.jit
def _expert_product_kernel(
    x,
    weights,
    tokens_ptr,
    ends_ptr,
    y_ptr,
    x_row,
    num_experts,
    inputs,
    width,
    GATHERED: tl.constexpr,
    GATED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BAND: tl.constexpr,
):
    experts = tl.arange(0, EXPERTS)  # (E',), E' the power of two that holds E
    ends = tl.load(ends_ptr + experts, mask=experts < num_experts, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < num_experts), other=0)
    column_tiles = tl.cdiv(width, COLUMNS)
    programs = (ends - starts + ROWS - 1) // ROWS * column_tiles  # of each expert
    program_ends = tl.cumsum(programs, 0)
    program = tl.program_id(0)
    if program >= tl.sum(programs):
        return
    expert = tl.sum((program_ends <= program).to(tl.int32))
    own = experts == expert
    start = tl.sum(tl.where(own, starts, 0))
    end = tl.sum(tl.where(own, ends, 0))
    local = program - tl.sum(tl.where(own, program_ends - programs, 0))

    row_tiles = tl.cdiv(end - start, ROWS)
    first_tile = local // (BAND * column_tiles) * BAND
    height = tl.minimum(row_tiles - first_tile, BAND)
    within = local % (BAND * column_tiles)
    first_row = start + (first_tile + within % height) * ROWS
    first_column = within // height * COLUMNS

    rows = first_row + tl.arange(0, ROWS)
    read = tl.where(rows < end, rows, start)  # another row of the expert in place of one that is none
    if GATHERED:
        read = tl.load(tokens_ptr + read)
    columns = first_column + tl.arange(0, COLUMNS)
    weight_row = expert * (2 * width if GATED else width)
    weight_rows = weight_row.to(tl.int64) + tl.where(columns < width, columns, 0)
    x_places = read.to(tl.int64)[:, None] * x_row  # (ROWS, 1)
    weight_places = weight_rows[None, :] * inputs  # (1, COLUMNS)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, inputs, INNER):
        inner = first + tl.arange(0, INNER)
        if DESCRIBED and not GATHERED:
            a = x.load([first_row, first])
        elif WHOLE:
            a = tl.load(x + x_places + inner[None, :])
        else:
            a = tl.load(x + x_places + inner[None, :], mask=(inner < inputs)[None, :], other=0.0)
        if DESCRIBED:
            total = tl.dot(a, weights.load([weight_row + first_column, first]).T, total)
            if GATED:
                total_up = tl.dot(a, weights.load([weight_row + width + first_column, first]).T, total_up)
        elif WHOLE:
            total = tl.dot(a, tl.load(weights + weight_places + inner[:, None]), total)
            if GATED:
                up_places = weight_places + width.to(tl.int64) * inputs
                total_up = tl.dot(a, tl.load(weights + up_places + inner[:, None]), total_up)
        else:
            there = (inner < inputs)[:, None]
            total = tl.dot(a, tl.load(weights + weight_places + inner[:, None], mask=there, other=0.0), total)
            if GATED:
                up_places = weight_places + width.to(tl.int64) * inputs
                total_up = tl.dot(a, tl.load(weights + up_places + inner[:, None], mask=there, other=0.0), total_up)

    if GATED:
        total = total * tl.sigmoid(total) * total_up
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=inside)
