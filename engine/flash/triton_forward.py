"""FlashAttention-2's forward pass as a kernel, for CUDA, in Triton; `engine.flash.tiled` is the same in plain PyTorch.

    output = attend(Q, K, V, causal=True)

One program computes Br rows of one head's output. It reads its queries once, walks over the keys and values in tiles of
Bc, and writes once; scores and weights never leave the chip. Keys are not split among programs as in
`engine.flash.split`: a single query keeps B·H programs busy, however long the cache. A tile that the causal mask or the
end of the sequence cuts through costs comparisons, so whole tiles come first and without them, then the few that are
cut. Exponentials are of base 2, which is what the chip has: e^x = 2^(x · log₂e), and log₂e is part of the scale.

Legend: B batch, H query heads, G key/value heads, Tq queries, Tk keys, d head width, D the power of two that holds d,
Br and Bc rows and columns of a tile.
"""
# ruff: noqa: ANN001, ANN202 - what the kernels take and give are blocks of numbers, and Triton reads annotations

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How work is cut up for the GPU.

    Args:
        block_q: Br, a power of two, at least 16.
        block_k: Bc, likewise.
        num_warps: that share a tile.
        num_stages: tiles of K and V on their way to the chip at a time.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


LAUNCHES = (
    Launch(128, 128, 8, 2),
    Launch(128, 128, 8, 3),
    Launch(128, 64, 8, 2),
    Launch(128, 64, 8, 3),
    Launch(128, 64, 4, 3),
    Launch(64, 64, 4, 3),
    Launch(64, 32, 4, 2),
)
"""From which the fastest is chosen, once for every width, mask, dtype and powers of two of both lengths."""


def attend(
    Q: Tensor, K: Tensor, V: Tensor, *, causal: bool = False, scale: float | None = None, launch: Launch | None = None
) -> Tensor:
    """softmax(QKᵀ · scale) V, the forward pass only: float32 in the sums, the inputs' dtype in the products.

    Args:
        Q: (B, H, Tq, d), float16 or bfloat16, d at most 256.
        K: (B, G, Tk, d), query head h reads key head h // (H / G).
        V: (B, G, Tk, d).
        causal: query i sees the keys j ≤ i + Tk − Tq.
        scale: 1/√d when left out.
        launch: how the work is cut up; the fastest of `LAUNCHES`, which are tried first, when left out.

    Returns:
        (B, H, Tq, d) in the dtype of Q, zero rows where nothing is visible.

    Source: Dao 2023, algorithm 1, https://arxiv.org/abs/2307.08691.
    """
    Q, K, V = (x if x.stride(-1) == 1 else x.contiguous() for x in (Q, K, V))
    (batch, heads, queries, width), (groups, keys) = Q.shape, K.shape[1:3]
    output = torch.empty_like(Q)
    scale = (width**-0.5 if scale is None else scale) * math.log2(math.e)
    shape = (heads, heads // groups, queries, keys, scale, queries.bit_length(), keys.bit_length())
    constants = {"WIDTH": width, "D": max(16, triton.next_power_of_2(width)), "CAUSAL": causal}
    tensors = (Q, K, V, output)
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    with torch.cuda.device_of(Q):
        if launch is None:
            _tuned_kernel[lambda chosen: _grid(queries, batch * heads, chosen["BLOCK_Q"])](
                *tensors, *strides, *shape, **constants
            )
        else:
            _forward_kernel[_grid(queries, batch * heads, launch.block_q)](
                *tensors,
                *strides,
                *shape,
                **constants,
                BLOCK_Q=launch.block_q,
                BLOCK_K=launch.block_k,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return output


def _grid(queries: int, heads: int, block_q: int) -> tuple[int]:
    return (triton.cdiv(queries, block_q) * heads,)  # CUDA counts to 65535 only on other axes than the first


@triton.jit(do_not_specialize=["query_class", "key_class"])
def _forward_kernel(
    Q,
    K,
    V,
    output,
    q_batch,  # strides: what lies between one batch entry, head or token and the next
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    o_batch,
    o_head,
    o_token,
    heads,
    heads_per_group,
    queries,
    keys,
    scale,  # times log₂e
    query_class,  # for the choice of the launch alone, as is the next
    key_class,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_Q)
    block = blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the last rows have most to do
    batch, head = tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads
    group = head // heads_per_group
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)  # (Br,)
    row_places = rows.to(tl.int64)[:, None]  # times a stride they may be past what 32 bits hold
    channels = tl.arange(0, D)  # (D,)
    Q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    K += batch.to(tl.int64) * k_batch + group.to(tl.int64) * k_head
    V += batch.to(tl.int64) * v_batch + group.to(tl.int64) * v_head
    output += batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head
    inside = (rows < queries)[:, None] & (channels < WIDTH)[None, :]
    q = tl.load(Q + row_places * q_token + channels[None, :], mask=inside, other=0.0)  # (Br, D)

    maximum = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mixed = tl.zeros((BLOCK_Q, D), tl.float32)
    whole, end = keys, keys  # keys that every row sees, and that any row sees
    if CAUSAL:
        shift = keys - queries
        whole = tl.minimum(tl.maximum(block * BLOCK_Q + shift + 1, 0), keys)
        end = tl.minimum(tl.maximum(block * BLOCK_Q + BLOCK_Q + shift, 0), keys)
    whole = whole // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        maximum, total, mixed = _absorb(
            maximum, total, mixed, q, K, V, k_token, v_token, rows, first, queries, keys, scale,
            WIDTH, D, CAUSAL, BLOCK_K, CUT=False,
        )  # fmt: skip
    for first in range(whole, end, BLOCK_K):
        maximum, total, mixed = _absorb(
            maximum, total, mixed, q, K, V, k_token, v_token, rows, first, queries, keys, scale,
            WIDTH, D, CAUSAL, BLOCK_K, CUT=True,
        )  # fmt: skip

    mixed /= tl.where(total > 0, total, 1.0)[:, None]  # a row that saw nothing stays 0
    tl.store(
        output + row_places * o_token + channels[None, :], mixed.to(output.dtype.element_ty), mask=inside
    )  # (Br, D)


@triton.jit
def _absorb(
    maximum, total, mixed, q, K, V, k_token, v_token, rows, first, queries, keys, scale,
    WIDTH: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_K: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One tile of keys: raise the maximum, rescale what was summed relative to the old one, add the tile's share."""
    columns = first + tl.arange(0, BLOCK_K)  # (Bc,)
    places = columns.to(tl.int64)
    channels = tl.arange(0, D)  # (D,)
    k_places = K + places[None, :] * k_token + channels[:, None]  # (D, Bc)
    v_places = V + places[:, None] * v_token + channels[None, :]  # (Bc, D)
    if CUT or WIDTH < D:
        there = columns < keys
        real = channels < WIDTH
        k = tl.load(k_places, mask=there[None, :] & real[:, None], other=0.0)
        v = tl.load(v_places, mask=there[:, None] & real[None, :], other=0.0)
    else:
        k = tl.load(k_places)
        v = tl.load(v_places)
    scores = tl.dot(q, k) * scale  # (Br, Bc)
    if CUT:
        visible = (columns < keys)[None, :]
        if CAUSAL:
            visible &= columns[None, :] <= rows[:, None] + (keys - queries)
        scores = tl.where(visible, scores, -float("inf"))
    raised = tl.maximum(maximum, tl.max(scores, axis=1))  # (Br,)
    anchor = tl.where(raised == -float("inf"), 0.0, raised) if CUT else raised  # −∞ − −∞ is no number
    weights = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(maximum - anchor)
    total = total * rescale + tl.sum(weights, axis=1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * rescale[:, None])
    return raised, total, mixed


_tuned_kernel = triton.autotune(
    [
        triton.Config(
            {"BLOCK_Q": launch.block_q, "BLOCK_K": launch.block_k},
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        for launch in LAUNCHES
    ],
    key=["WIDTH", "CAUSAL", "query_class", "key_class"],
)(_forward_kernel)
