"""FlashAttention-2 in plain PyTorch: exact attention tile by tile, and every step there to be looked at.

The matrix of scores is cut into tiles of Br queries × Bc keys, and only one tile exists at a time. A query block keeps
a running maximum m, a running sum ℓ and an unnormalized output O; each tile raises the maximum, rescales what was
summed relative to the old one, and adds its own share:

    m ← max(m, rowmax(S)),  P = exp(S − m),  ℓ ← r ℓ + rowsum(P),  O ← r O + P V  with r = exp(m_before − m)

At the end O / ℓ is softmax(S) V. The backward pass recomputes each tile's weights from the logsumexp m + ln ℓ.

Kernels do the same with tiles in on-chip memory, many query blocks at once. Here the loops are Python's, and each step
says how many bytes it would move between that memory and the device's (HBM).

Causal means that the last query sees the last key: query i sees the keys j ≤ i + Tk − Tq. A query that sees no key has
a zero output, a logsumexp of −∞ and zero gradients.

Legend: H query heads, G key/value heads (G divides H), R = H / G query heads that share one, Tq queries, Tk keys,
d head width, Br and Bc rows and columns of a tile (the last ones of each may be smaller).

Source: Dao 2023, algorithms 1 and 2, https://arxiv.org/abs/2307.08691.
"""

# ruff: noqa: E741 -- O is the papers' letter for the output

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.flash.grid import Grid, Tile
from engine.flash.online import absorb, finite_anchor

HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class TileState:
    """One step of the forward pass: a tile, and what its query block knows before and after it.

    Args:
        query_block, key_block: the tile's place in the grid.
        rows, columns: its queries and its keys.
        skipped: no query in it sees a key in it; nothing is read or computed and the state stays.
        partial: the causal mask cuts through it.
        last: the query block's last tile that is not skipped; output and logsumexp are written after it.
        scores: (Br, Bc) S = scale · Q Kᵀ, −∞ where forbidden; None when skipped.
        probabilities: (Br, Bc) exp(S − m), not yet divided by the sum; None when skipped.
        maximum_before, maximum: (Br,) m before and after.
        rescale: (Br,) r = exp(m_before − m), 0 as long as nothing was seen; 1 when skipped.
        sum_before, sum: (Br,) ℓ before and after.
        output_before, output: (Br, d) unnormalized output before and after.
        bytes_read, bytes_written: what this step moves from and to HBM.
    """

    query_block: int
    key_block: int
    rows: slice
    columns: slice
    skipped: bool
    partial: bool
    last: bool
    scores: Tensor | None
    probabilities: Tensor | None
    maximum_before: Tensor
    maximum: Tensor
    rescale: Tensor
    sum_before: Tensor
    sum: Tensor
    output_before: Tensor
    output: Tensor
    bytes_read: int
    bytes_written: int

    @property
    def normalized(self) -> Tensor:
        """(Br, d) output / sum: attention to the keys so far; zero rows where none was seen."""
        return self.output / self.sum.masked_fill(self.sum == 0, 1.0)[..., None]

    @property
    def logsumexp(self) -> Tensor:
        """(Br,) ln Σ exp(S) over the keys so far, m + ln ℓ; −∞ where none was seen."""
        return self.maximum + self.sum.log()


@dataclass(frozen=True, eq=False)
class BackwardTileState:
    """One step of the backward pass: a tile's weights, recomputed, and what it adds to each gradient.

    Args:
        key_block, query_block: the tile's place in the grid.
        rows, columns: its queries and its keys.
        skipped: no query in it sees a key in it; the tensors are None.
        partial: the causal mask cuts through it.
        probabilities: (Br, Bc) P = exp(S − logsumexp), the attention weights.
        D: (Br,) rowsum(dO ∘ O), which equals rowsum(P ∘ dP) over all keys.
        dS: (Br, Bc) P ∘ (dP − D) with dP = dO Vᵀ.
        dQ: (Br, d) scale · dS K, to be summed over key blocks.
        dK: (Bc, d) scale · dSᵀ Q, to be summed over query blocks.
        dV: (Bc, d) Pᵀ dO, to be summed over query blocks.
        bytes_read, bytes_written: what this step moves from and to HBM.
    """

    key_block: int
    query_block: int
    rows: slice
    columns: slice
    skipped: bool
    partial: bool
    probabilities: Tensor | None = None
    D: Tensor | None = None
    dS: Tensor | None = None
    dQ: Tensor | None = None
    dK: Tensor | None = None
    dV: Tensor | None = None
    bytes_read: int = 0
    bytes_written: int = 0


def stream_tiles(
    Q: Tensor, K: Tensor, V: Tensor, *, block_q: int, block_k: int, causal: bool = False, scale: float | None = None
) -> Iterator[TileState]:
    """The forward pass of one head, one state per tile: query blocks one after the other, along the keys in each.

    Queries are read at a query block's first tile, keys and values at every tile that is not skipped; output and
    logsumexp are written at a query block's last such tile. A block that sees nothing is never touched: its rows stay
    the zeros that they began as.

    Args:
        Q: (Tq, d).
        K: (Tk, d).
        V: (Tk, d).
        block_q, block_k, causal, scale: as in `tiled_attention`.

    Returns:
        states in float32 when the input is half precision, else in its dtype.

    Raises:
        InputError: a block size is smaller than 1, the shapes or dtypes do not fit, or the scale is not finite.

    Source: Dao 2023, algorithm 1, https://arxiv.org/abs/2307.08691.
    """
    _check_one_head(Q)
    grid, scale = _plan(Q, K, V, block_q, block_k, causal, scale)
    return _forward_tiles(Q, K, V, grid, scale)


def tiled_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · QKᵀ + mask) · V by tiles, all heads at once; `differentiable_tiled_attention` has gradients.

    Args:
        Q: (..., H, Tq, d), or (Tq, d).
        K: (..., G, Tk, d), or (Tk, d); query head h reads key head h // (H / G).
        V: as K.
        block_q: Br.
        block_k: Bc.
        causal: hide the keys j > i + Tk − Tq.
        scale: factor on the scores, 1/√d when left out.

    Returns:
        output (..., H, Tq, d) in the queries' dtype; logsumexp of the scores (..., H, Tq), in float32 when that is
        half precision.

    Raises:
        InputError: a block size is smaller than 1, the shapes or dtypes do not fit, or the scale is not finite.

    Source: Dao 2023, algorithm 1, https://arxiv.org/abs/2307.08691.
    """
    grid, scale = _plan(Q, K, V, block_q, block_k, causal, scale)
    queries, keys, values = _group(Q, K, V)  # (..., G, R, Tq, d), (..., G, 1, Tk, d) twice
    output = queries.new_zeros(queries.shape)
    logsumexp = output.new_full(output.shape[:-1], -math.inf, dtype=_accumulator(Q.dtype))
    for tile in _forward_tiles(queries, keys, values, grid, scale):
        if tile.last:
            output[..., tile.rows, :] = tile.normalized.to(Q.dtype)
            logsumexp[..., tile.rows] = tile.logsumexp
    return output.reshape(Q.shape), logsumexp.reshape(Q.shape[:-1])


def stream_backward_tiles(
    dO: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,
    logsumexp: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
) -> Iterator[BackwardTileState]:
    """The backward pass of one head, one state per tile: key blocks one after the other, down the queries in each.

    Keys and values are read once, their gradients stay on the chip until they are written. The gradient of the queries
    travels: every tile reads it, adds to it and writes it back. The paper computes D in a pass of its own; here it is
    computed at a query block's first tile, where dO is on the chip anyway.

    Args:
        dO: (Tq, d) gradient of the output.
        Q: (Tq, d).
        K: (Tk, d).
        V: (Tk, d).
        O: (Tq, d) output of the forward pass.
        logsumexp: (Tq,) of the forward pass.
        block_q, block_k, causal, scale: as in `tiled_backward`.

    Returns:
        states in float32 when the input is half precision, else in its dtype.

    Raises:
        InputError: a block size is smaller than 1, the shapes or dtypes do not fit, or the scale is not finite.

    Source: Dao 2023, algorithm 2, https://arxiv.org/abs/2307.08691.
    """
    _check_one_head(Q)
    grid, scale = _plan(Q, K, V, block_q, block_k, causal, scale)
    _check_forward_results(Q, dO, O, logsumexp)
    return _backward_tiles(dO, Q, K, V, O, logsumexp, grid, scale)


def tiled_backward(
    dO: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,
    logsumexp: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention by tiles, all heads at once, from what `tiled_attention` returned.

    P = exp(S − logsumexp),  dV = PᵀdO,  dS = P ∘ (dO Vᵀ − D),  dQ = scale · dS K,  dK = scale · dSᵀQ

    Args:
        dO: (..., H, Tq, d) gradient of the output.
        Q: (..., H, Tq, d), or (Tq, d).
        K: (..., G, Tk, d), or (Tk, d).
        V: as K.
        O: (..., H, Tq, d) output of the forward pass.
        logsumexp: (..., H, Tq) of the forward pass.
        block_q, block_k: Br and Bc, not necessarily the forward pass's.
        causal, scale: as in the forward pass.

    Returns:
        dQ (..., H, Tq, d), dK and dV (..., G, Tk, d), in the inputs' dtype.

    Raises:
        InputError: a block size is smaller than 1, the shapes or dtypes do not fit, or the scale is not finite.

    Source: Dao 2023, algorithm 2, https://arxiv.org/abs/2307.08691.
    """
    grid, scale = _plan(Q, K, V, block_q, block_k, causal, scale)
    _check_forward_results(Q, dO, O, logsumexp)
    queries, keys, values = _group(Q, K, V)  # (..., G, R, Tq, d), (..., G, 1, Tk, d) twice
    dO, O = dO.reshape(queries.shape), O.reshape(queries.shape)
    logsumexp = logsumexp.reshape(queries.shape[:-1])
    dQ, dK, dV = (torch.zeros(x.shape, dtype=_accumulator(x.dtype), device=x.device) for x in (queries, keys, values))
    for tile in _backward_tiles(dO, queries, keys, values, O, logsumexp, grid, scale):
        if tile.skipped:
            continue
        dQ[..., tile.rows, :] += tile.dQ
        for whole, part in ((dK, tile.dK), (dV, tile.dV)):
            columns = whole[..., tile.columns, :]  # (..., G, 1, Bc, d)
            columns += part.sum_to_size(columns.shape)  # over the R heads that read them
    return dQ.reshape(Q.shape).to(Q.dtype), dK.reshape(K.shape).to(K.dtype), dV.reshape(V.shape).to(V.dtype)


class TiledAttention(torch.autograd.Function):
    """`tiled_attention` with `tiled_backward` as its gradient: autograd keeps Q, K, V, O and logsumexp, no matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        block_q: int,
        block_k: int,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        """The output alone, (..., H, Tq, d)."""
        ctx.settings = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": scale}
        O, logsumexp = tiled_attention(Q, K, V, **ctx.settings)
        ctx.save_for_backward(Q, K, V, O, logsumexp)
        return O

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dO: Tensor) -> tuple[Tensor | None, ...]:
        """dQ, dK, dV, and None for each of the settings."""
        return *tiled_backward(dO, *ctx.saved_tensors, **ctx.settings), None, None, None, None


def differentiable_tiled_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The output of `tiled_attention`, (..., H, Tq, d), with gradients by `tiled_backward`. Arguments as there."""
    return TiledAttention.apply(Q, K, V, block_q, block_k, causal, scale)


@torch.no_grad()
def _forward_tiles(Q: Tensor, K: Tensor, V: Tensor, grid: Grid, scale: float) -> Iterator[TileState]:
    for query_block in range(grid.query_blocks):
        q = Q[..., grid.rows(query_block), :]  # (..., Br, d)
        output = torch.zeros(q.shape, dtype=_accumulator(q.dtype), device=q.device)
        total = output.new_zeros(q.shape[:-1])  # (..., Br)
        maximum = torch.full_like(total, -math.inf)
        for key_block in range(grid.key_blocks):
            tile = grid.tile(query_block, key_block)
            place = (query_block, key_block, tile.rows, tile.columns, tile.skipped, tile.partial, tile.last_of_rows)
            if tile.skipped:
                unchanged = (maximum, maximum, torch.ones_like(total), total, total, output, output)
                yield TileState(*place, None, None, *unchanged, bytes_read=0, bytes_written=0)
                continue
            k, v = K[..., tile.columns, :], V[..., tile.columns, :]  # (..., Bc, d)
            scores = _scores(q, k, tile, grid, scale)  # (..., Br, Bc)
            after = absorb(scores, maximum, total)
            summed = after.rescale[..., None] * output + after.exponentials @ v.to(output.dtype)  # (..., Br, d)
            read = _nbytes(k, v) + (_nbytes(q) if tile.first_of_rows else 0)
            written = _nbytes(q, total) if tile.last_of_rows else 0  # O is as large as Q, logsumexp as the sum
            yield TileState(
                *place,
                scores,
                after.exponentials,
                maximum,
                after.maximum,
                after.rescale,
                total,
                after.sum,
                output,
                summed,
                bytes_read=read,
                bytes_written=written,
            )
            maximum, total, output = after.maximum, after.sum, summed


@torch.no_grad()
def _backward_tiles(
    dO: Tensor, Q: Tensor, K: Tensor, V: Tensor, O: Tensor, logsumexp: Tensor, grid: Grid, scale: float
) -> Iterator[BackwardTileState]:
    dtype = _accumulator(Q.dtype)
    D = torch.zeros_like(logsumexp)  # (..., Tq), filled as the first key block is passed
    for key_block in range(grid.key_blocks):
        for query_block in range(grid.query_blocks):
            tile = grid.tile(query_block, key_block)
            place = (key_block, query_block, tile.rows, tile.columns, tile.skipped, tile.partial)
            if tile.skipped:
                yield BackwardTileState(*place)
                continue
            q, do, o = (x[..., tile.rows, :] for x in (Q, dO, O))  # (..., Br, d)
            k, v = (x[..., tile.columns, :] for x in (K, V))  # (..., Bc, d)
            log_total = logsumexp[..., tile.rows]  # (..., Br)
            if tile.first_of_rows:
                D[..., tile.rows] = (do.to(dtype) * o.to(dtype)).sum(-1)
            d = D[..., tile.rows]
            scores = _scores(q, k, tile, grid, scale)  # (..., Br, Bc)
            probabilities = torch.exp(scores - finite_anchor(log_total)[..., None])
            dP = do.to(dtype) @ v.to(dtype).mT
            dS = probabilities * (dP - d[..., None])
            dQ = scale * dS @ k.to(dtype)  # (..., Br, d)
            read = _nbytes(q, do, log_total) + (_nbytes(o) if tile.first_of_rows else _nbytes(d, dQ))
            written = (_nbytes(d) if tile.first_of_rows else 0) + _nbytes(q if tile.last_of_rows else dQ)
            yield BackwardTileState(
                *place,
                probabilities=probabilities,
                D=d,
                dS=dS,
                dQ=dQ,
                dK=scale * dS.mT @ q.to(dtype),  # (..., Bc, d)
                dV=probabilities.mT @ do.to(dtype),  # (..., Bc, d)
                bytes_read=read + (_nbytes(k, v) if tile.first_of_columns else 0),
                bytes_written=written + (_nbytes(k, v) if tile.last_of_columns else 0),
            )


def _scores(q: Tensor, k: Tensor, tile: Tile, grid: Grid, scale: float) -> Tensor:
    """(..., Br, Bc) scale · q kᵀ, at least in float32, −∞ where the mask forbids."""
    dtype = _accumulator(q.dtype)
    scores = scale * (q.to(dtype) @ k.to(dtype).mT)
    if not tile.partial:
        return scores
    query = torch.arange(tile.rows.start, tile.rows.stop, device=q.device)[:, None]  # (Br, 1)
    key = torch.arange(tile.columns.start, tile.columns.stop, device=q.device)  # (Bc,)
    return scores.masked_fill(key > query + grid.keys - grid.queries, -math.inf)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in, as on a tensor core: float32 for half precision."""
    return torch.float32 if dtype in HALF_PRECISION else dtype


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _group(Q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the R query heads that share a key head an axis of their own: (..., G, R, Tq, d) and (..., G, 1, Tk, d)."""
    if Q.dim() == 2:
        return Q, K, V
    return Q.unflatten(-3, (K.shape[-3], Q.shape[-3] // K.shape[-3])), K.unsqueeze(-3), V.unsqueeze(-3)


def _plan(
    Q: Tensor, K: Tensor, V: Tensor, block_q: int, block_k: int, causal: bool, scale: float | None
) -> tuple[Grid, float]:
    """The grid and the scale, once everything fits together."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise InputError(f"{name} ({size}) must be at least 1: a tile has rows and columns")
    shapes = f"Q {tuple(Q.shape)}, K {tuple(K.shape)}, V {tuple(V.shape)}"
    if Q.dim() < 2 or Q.dim() != K.dim() or K.shape != V.shape or Q.shape[-1] != K.shape[-1] or Q.shape[-1] < 1:
        raise InputError(f"Q must be (..., H, Tq, d), K and V both (..., G, Tk, d) with the same d, not {shapes}")
    if Q.dim() > 2 and (K.shape[-3] < 1 or Q.shape[-3] % K.shape[-3]):
        raise InputError(f"the query heads ({Q.shape[-3]}) must be a multiple of the key heads ({K.shape[-3]})")
    if Q.shape[:-3] != K.shape[:-3]:
        raise InputError(f"Q, K and V must have the same batch, not {shapes}")
    if not Q.is_floating_point() or not Q.dtype == K.dtype == V.dtype:
        raise InputError(f"Q, K and V must have one floating-point dtype, not {Q.dtype}, {K.dtype} and {V.dtype}")
    scale = Q.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise InputError(f"scale ({scale}) must be finite")
    return Grid(Q.shape[-2], K.shape[-2], block_q, block_k, causal), scale


def _check_one_head(Q: Tensor) -> None:
    if Q.dim() != 2:
        raise InputError(f"one head is drawn at a time: Q must be (Tq, d), not {tuple(Q.shape)}")


def _check_forward_results(Q: Tensor, dO: Tensor, O: Tensor, logsumexp: Tensor) -> None:
    if not dO.shape == O.shape == Q.shape or logsumexp.shape != Q.shape[:-1]:
        raise InputError(
            f"dO and O must have Q's shape {tuple(Q.shape)} and logsumexp that without d, not {tuple(dO.shape)}, "
            f"{tuple(O.shape)} and {tuple(logsumexp.shape)}"
        )
