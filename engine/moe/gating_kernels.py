"""What `engine.moe.gating` defines, for CUDA, in Triton: a few small steps on (N, E) numbers become one launch.

Legend: N tokens, E experts, E' the power of two that holds E, K experts chosen per token, R rank, W columns.
"""
# ruff: noqa: ANN001, ANN202 - what the kernels take and give are blocks of numbers, and Triton reads annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_EXPERTS = 1024
"""E that one program holds."""
_BLOCK = 2048
"""Numbers that one program of the choice holds at once."""
_ROWS, _COLUMNS = 8, 256
"""Of a block of the gated columns."""


def choose(
    product: Tensor,
    bias: Tensor,
    valid: Tensor | None,
    counts: Tensor | None,
    *,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    largest: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The K experts of each token, best first, −1 for padding, and their gates; `counts` grows by the tokens of each.

    Args:
        product: (N, E), float32; logits are the product within ±largest, times scale.
        bias: (E,), float32.
        valid: (N,) bool, False for padding.
        counts: (E,), int32.
        top_k: K.
        sigmoid: whether a score is the logit's sigmoid, else its softmax.
        normalize: whether a token's gates sum to 1.
        largest: see product.
        scale: see product.

    Returns:
        (N, K) int64, (N, K) float32.
    """
    product = product.contiguous()
    num_rows, num_experts = product.shape
    indices = torch.empty(num_rows, top_k, dtype=torch.int64, device=product.device)
    gates = torch.empty(num_rows, top_k, dtype=torch.float32, device=product.device)
    width, rows = _block(num_experts)
    if num_rows:
        with torch.cuda.device_of(product):
            _choose_kernel[(triton.cdiv(num_rows, rows),)](
                product, bias, bias if valid is None else valid.contiguous(), bias if counts is None else counts,
                indices, gates, num_rows, num_experts, largest, scale,
                SIGMOID=sigmoid, NORMALIZE=normalize, PADDED=valid is not None, COUNTED=counts is not None,
                K=top_k, SLOTS=triton.next_power_of_2(top_k), EXPERTS=width, ROWS=rows, num_warps=4,
            )  # fmt: skip
    return indices, gates


def choose_backward(
    gradient: Tensor,
    product: Tensor,
    indices: Tensor,
    gates: Tensor,
    *,
    sigmoid: bool,
    normalize: bool,
    largest: float,
    scale: float,
) -> Tensor:
    """The gradient of the product (N, E) from that of the gates (N, K). The others as in `choose`."""
    product, gradient = product.contiguous(), gradient.contiguous()
    num_rows, num_experts = product.shape
    top_k = gates.shape[1]
    found = torch.empty_like(product)
    width, rows = _block(num_experts)
    if num_rows:
        with torch.cuda.device_of(product):
            _choose_backward_kernel[(triton.cdiv(num_rows, rows),)](
                gradient, product, indices, gates, found, num_rows, num_experts, largest, scale,
                SIGMOID=sigmoid, NORMALIZE=normalize, K=top_k, EXPERTS=width, ROWS=rows, num_warps=4,
            )  # fmt: skip
    return found


def gate_columns(
    u: Tensor, indices: Tensor, gates: Tensor, num_experts: int, rank: int, scaling: float, limit: float
) -> Tensor:
    """y[n, e·R + r] = s·gates[n, k]·u[n, e·R + r] where indices[n, k] is e, 0 where none is; u within ±limit.

    Args:
        u: (N, E·R), or (N, R) if all experts have the same.
        indices: (N, K).
        gates: (N, K), float32.
        num_experts: E.
        rank: R.
        scaling: s.
        limit: of |u|; NaN counts as 0.

    Returns:
        (N, E·R) in u's dtype.
    """
    u, indices, gates = u.contiguous(), indices.contiguous(), gates.contiguous()
    num_rows, width = len(u), num_experts * rank
    y = u.new_empty(num_rows, width)
    if y.numel():
        with torch.cuda.device_of(u):
            _gate_columns_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(width, _COLUMNS))](
                u, indices, gates, y, num_rows, width, rank, u.shape[1], scaling, limit,
                K=indices.shape[1], ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
            )  # fmt: skip
    return y


def gate_columns_backward(
    gradient: Tensor, u: Tensor, indices: Tensor, gates: Tensor, rank: int, scaling: float, limit: float
) -> tuple[Tensor, Tensor]:
    """The gradients of u and of the gates, (N, K) float32, from that of y. The others as in `gate_columns`."""
    u, indices, gates, gradient = u.contiguous(), indices.contiguous(), gates.contiguous(), gradient.contiguous()
    num_rows, width = gradient.shape
    u_gradient, gates_gradient = torch.empty_like(u), torch.empty_like(gates)
    if gradient.numel():
        with torch.cuda.device_of(u):
            _gate_columns_backward_kernel[(triton.cdiv(num_rows, _ROWS),)](
                gradient, u, indices, gates, u_gradient, gates_gradient,
                num_rows, width, rank, u.shape[1], scaling, limit,
                K=indices.shape[1], SHARED=u.shape[1] != width, RANK=triton.next_power_of_2(rank),
                ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
            )  # fmt: skip
    return u_gradient, gates_gradient


def _block(num_experts: int) -> tuple[int, int]:
    """E' and the rows of a program."""
    width = triton.next_power_of_2(num_experts)
    return width, max(1, min(64, _BLOCK // width))


@triton.jit
def _logits(product, largest, scale):
    product = tl.where(tl.abs(product) == float("inf"), float("nan"), product)
    return tl.where(product > largest, largest, tl.where(product < -largest, -largest, product)) * scale


@triton.jit
def _log_sigmoid(logits):
    return tl.where(logits < 0, logits, logits * 0) - tl.log(1 + tl.exp(-tl.abs(logits)))  # NaN · 0 is NaN


@triton.jit
def _choose_kernel(
    product_ptr, bias_ptr, valid_ptr, counts_ptr, indices_ptr, gates_ptr, num_rows, num_experts, largest, scale,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr, COUNTED: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # (ROWS,)
    experts = tl.arange(0, EXPERTS)  # (E',)
    there, known = rows < num_rows, experts < num_experts
    places = rows[:, None] * num_experts + experts[None, :]
    product = tl.load(product_ptr + places, mask=there[:, None] & known[None, :], other=0.0)
    bias = tl.load(bias_ptr + experts, mask=known, other=0.0)
    logits = _logits(product, largest, scale)
    log_scores = _log_sigmoid(logits) if SIGMOID else logits
    ranked = (tl.sigmoid(logits) if SIGMOID else logits) + bias[None, :]
    ranked = tl.where(ranked == ranked, ranked, float("inf"))  # NaN is the largest, as for topk
    ranked = tl.where(ranked < -3e38, -3e38, ranked)  # less is who is taken
    ranked = tl.where(known[None, :], ranked, float("-inf"))
    valid = there
    if PADDED:
        valid = tl.load(valid_ptr + rows, mask=there, other=0) != 0

    slots = tl.arange(0, SLOTS)  # (K',)
    chosen = tl.full((ROWS, SLOTS), float("-inf"), tl.float32)  # logarithms of the scores
    taken = tl.zeros((ROWS, EXPERTS), tl.int32)
    for k in range(K):
        best = tl.argmax(ranked, 1)  # (ROWS,)
        hit = experts[None, :] == best[:, None]
        score = tl.sum(tl.where(hit, log_scores, 0.0), 1)
        chosen = tl.where(slots[None, :] == k, score[:, None], chosen)
        taken += hit.to(tl.int32)
        ranked = tl.where(hit, float("-inf"), ranked)
        tl.store(indices_ptr + rows * K + k, tl.where(valid, best, -1).to(tl.int64), mask=there)
    if COUNTED:
        found = tl.sum(tl.where(valid[:, None], taken, 0), 0)  # (E',)
        tl.atomic_add(counts_ptr + experts, found, mask=known & (found > 0))

    if NORMALIZE:
        powers = tl.exp(chosen - tl.max(chosen, 1)[:, None])
        gates = powers / tl.sum(powers, 1)[:, None]
    elif SIGMOID:
        gates = tl.exp(chosen)
    else:
        all_scores = tl.where(known[None, :], log_scores, float("-inf"))
        top = tl.max(all_scores, 1)
        gates = tl.exp(chosen - top[:, None]) / tl.sum(tl.exp(all_scores - top[:, None]), 1)[:, None]
    tl.store(gates_ptr + rows[:, None] * K + slots[None, :], gates, mask=there[:, None] & (slots < K)[None, :])


@triton.jit
def _choose_backward_kernel(
    gradient_ptr, product_ptr, indices_ptr, gates_ptr, found_ptr, num_rows, num_experts, largest, scale,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # (ROWS,)
    experts = tl.arange(0, EXPERTS)  # (E',)
    there, known = rows < num_rows, experts < num_experts
    places = rows[:, None] * num_experts + experts[None, :]
    inside = there[:, None] & known[None, :]
    product = tl.load(product_ptr + places, mask=inside, other=0.0)
    logits = _logits(product, largest, scale)

    total = tl.zeros((ROWS,), tl.float32)  # Σ g·dg
    for k in range(K):
        gate = tl.load(gates_ptr + rows * K + k, mask=there, other=0.0)
        total += gate * tl.load(gradient_ptr + rows * K + k, mask=there, other=0.0)
    found = tl.zeros((ROWS, EXPERTS), tl.float32)  # of the logarithms of the scores
    for k in range(K):
        gate = tl.load(gates_ptr + rows * K + k, mask=there, other=0.0)
        given = gate * tl.load(gradient_ptr + rows * K + k, mask=there, other=0.0)
        if NORMALIZE:
            given -= gate * total
        index = tl.load(indices_ptr + rows * K + k, mask=there, other=-1)
        found += tl.where(experts[None, :] == index[:, None], given[:, None], 0.0)
    if SIGMOID:
        found *= tl.sigmoid(-logits)
    elif not NORMALIZE:
        scores = tl.where(known[None, :], logits, float("-inf"))
        powers = tl.exp(scores - tl.max(scores, 1)[:, None])
        found -= powers / tl.sum(powers, 1)[:, None] * total[:, None]
    found = tl.where(tl.abs(product) <= largest, found * scale, 0.0)
    tl.store(found_ptr + places, found, mask=inside)


@triton.jit
def _within(u, limit):
    u = tl.where(u == u, u, 0.0)
    return tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))


@triton.jit
def _gates_of(indices_ptr, gates_ptr, rows, there, experts, K: tl.constexpr):
    """Of each row and column, 0 where its expert was not chosen."""
    gates = tl.zeros((rows.shape[0], experts.shape[0]), tl.float32)
    for k in range(K):
        index = tl.load(indices_ptr + rows * K + k, mask=there, other=-1)
        gate = tl.load(gates_ptr + rows * K + k, mask=there, other=0.0)
        gates = tl.where(index[:, None] == experts[None, :], gate[:, None], gates)
    return gates


@triton.jit
def _gate_columns_kernel(
    u_ptr, indices_ptr, gates_ptr, y_ptr, num_rows, width, rank, u_width, scaling, limit,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # (ROWS,)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (W,)
    there = rows < num_rows
    inside = there[:, None] & (columns < width)[None, :]
    gates = scaling * _gates_of(indices_ptr, gates_ptr, rows, there, columns // rank, K)
    places = rows[:, None] * u_width + (columns % u_width)[None, :]
    u = tl.load(u_ptr + places, mask=inside & (gates != 0), other=0.0).to(tl.float32)
    y = _within(u, limit) * gates
    tl.store(y_ptr + rows[:, None] * width + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_columns_backward_kernel(
    gradient_ptr, u_ptr, indices_ptr, gates_ptr, u_gradient_ptr, gates_gradient_ptr,
    num_rows, width, rank, u_width, scaling, limit,
    K: tl.constexpr, SHARED: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # (ROWS,)
    there = rows < num_rows
    own = tl.arange(0, RANK)  # (R',)
    shared_gradient = tl.zeros((ROWS, RANK), tl.float32)
    for k in range(K):
        index = tl.load(indices_ptr + rows * K + k, mask=there, other=-1)
        gate = tl.load(gates_ptr + rows * K + k, mask=there, other=0.0)
        inside = (index >= 0)[:, None] & (own < rank)[None, :]
        columns = index[:, None] * rank + own[None, :]
        upstream = tl.load(gradient_ptr + rows[:, None] * width + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + rows[:, None] * u_width + columns % u_width, mask=inside, other=0.0).to(tl.float32)
        tl.store(gates_gradient_ptr + rows * K + k, scaling * tl.sum(upstream * _within(u, limit), 1), mask=there)
        if SHARED:
            shared_gradient += tl.where(tl.abs(u) <= limit, scaling * gate[:, None] * upstream, 0.0)
    if SHARED:
        places = rows[:, None] * u_width + own[None, :]
        inside = there[:, None] & (own < rank)[None, :]
        tl.store(u_gradient_ptr + places, shared_gradient.to(u_gradient_ptr.dtype.element_ty), mask=inside)
    else:
        for first in range(0, width, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)  # (W,)
            inside = there[:, None] & (columns < width)[None, :]
            gates = scaling * _gates_of(indices_ptr, gates_ptr, rows, there, columns // rank, K)
            places = rows[:, None] * width + columns[None, :]
            needed = inside & (gates != 0)
            upstream = tl.load(gradient_ptr + places, mask=needed, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + places, mask=needed, other=0.0).to(tl.float32)
            found = tl.where(tl.abs(u) <= limit, gates * upstream, 0.0)
            tl.store(u_gradient_ptr + places, found.to(u_gradient_ptr.dtype.element_ty), mask=inside)
