"""FlashAttention tile by tile on one small head: what a row holds after each tile, and the bytes that were moved.

Legend: S steps, R steps of the followed row's query block, T tokens, d head width, C columns of a key block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, model_validator

from engine.experiments import ExperimentParams
from engine.experiments._flash import bytes_in_words, number_in_words
from engine.flash.traffic import flash_traffic, standard_traffic, theorem, tile_sizes

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

MAX_TOKENS = 64

_NUMBER = 4
"""Bytes of a float32."""


class Params(ExperimentParams):
    """A small head, its tiles, and the row to follow."""

    lane: ClassVar = "short"

    length: int = Field(
        16, ge=4, le=MAX_TOKENS, title="Tokens", description="Queries, and as many keys: the whole matrix is T × T."
    )
    head_dim: int = Field(8, ge=2, le=32, title="Head width", description="Numbers in each query, key and value (d).")
    block_q: int = Field(
        4, ge=1, le=MAX_TOKENS, title="Rows of a tile", description="Queries that stay on the chip while keys pass by."
    )
    block_k: int = Field(
        4, ge=1, le=MAX_TOKENS, title="Columns of a tile", description="Keys and values that are loaded at a time."
    )
    causal: bool = Field(
        True, title="Causal mask", description="Tiles in which no query may see any key are skipped: never even read."
    )
    on_chip: float | None = Field(
        None,
        ge=0.125,
        le=64,
        title="On-chip memory (KiB)",
        description="If given, rows and columns follow from it as in the paper: tiles of queries, keys, values and "
        "output just fit.",
        json_schema_extra={"step": 0.125},
    )
    row: int = Field(13, ge=0, le=MAX_TOKENS - 1, title="Followed row", description="The query that is looked at.")
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="Of the random numbers.")

    @model_validator(mode="after")
    def _row_exists(self) -> Params:
        if self.row >= self.length:
            raise ValueError(
                f"There is no row {self.row} among {self.length} tokens: choose one from 0 to {self.length - 1}."
            )
        return self


@dataclass(frozen=True)
class Result:
    """Every step, and the followed row's running state.

    Args:
        block_q, block_k: rows and columns of a tile, as used; blocks at the end may be smaller.
        grid: blocks of queries, blocks of keys.
        query_block, key_block: (S,), which tile each step is about, in the order of the computation.
        skipped: (S,), the mask leaves nothing of it: it is not read.
        partial: (S,), the mask cuts through it.
        bytes_read, bytes_written: (S,), of off-chip memory so far, this step included; numbers of 4 bytes.
        row_steps: (R,), indices of the steps at which the followed row is on the chip.
        row_scores: (R, C), its scores in the tile; −∞ where masked, NaN past the last key and in skipped tiles.
        row_probabilities: (R, C), exp(score − maximum); as above 0 and NaN.
        maximum_before, maximum: (R,), the running maximum m; −∞ before the first tile.
        rescale: (R,), exp(m before − m), by which what is held is multiplied; 1 in skipped tiles.
        sum_before, sum: (R,), the running sum l.
        output_before, output: (R, d), the running output, not yet divided by l.
        row_output: (d,), the last `output` / the last `sum`.
        row_reference: (d,), by standard attention.
        logsumexp: m + log l at the end, kept for the backward pass.
        difference: largest absolute difference of the whole output to standard attention's, in float64.
        flash_bytes: moved in all.
        standard_bytes: that standard attention moves, with the whole T × T matrix written and read.
        held_bytes: on the chip at once: a tile each of Q, K, V, S and O, and m and l.
        sentence: what it comes to.
    """

    block_q: int
    block_k: int
    grid: tuple[int, int]
    query_block: np.ndarray
    key_block: np.ndarray
    skipped: np.ndarray
    partial: np.ndarray
    bytes_read: np.ndarray
    bytes_written: np.ndarray
    row_steps: np.ndarray
    row_scores: np.ndarray
    row_probabilities: np.ndarray
    maximum_before: np.ndarray
    maximum: np.ndarray
    rescale: np.ndarray
    sum_before: np.ndarray
    sum: np.ndarray
    output_before: np.ndarray
    output: np.ndarray
    row_output: np.ndarray
    row_reference: np.ndarray
    logsumexp: float
    difference: float
    flash_bytes: int
    standard_bytes: int
    held_bytes: int
    sentence: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that are moved, over on-chip memory. Legend: N sizes.

    Args:
        on_chip: (N,), M in bytes.
        counted: (N,), moved in all with the tiles of the paper for M.
        theorem: (N,), T²d²/M, in bytes as well.
        standard: that standard attention moves.
        sentence: what it comes to.
    """

    on_chip: np.ndarray
    counted: np.ndarray
    theorem: np.ndarray
    standard: int
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Stream the tiles once and keep what a page draws."""
    import torch

    from engine.attention import attend
    from engine.flash.tiled import stream_tiles, tiled_attention
    from engine.masks import causal, materialize

    T, d = params.length, params.head_dim
    block_q, block_k = _blocks(params)
    generator = torch.Generator().manual_seed(params.seed)
    Q, K, V = (torch.randn(T, d, generator=generator) for _ in range(3))
    steps = list(stream_tiles(Q, K, V, block_q=block_q, block_k=block_k, causal=params.causal))
    exact = [tensor.double() for tensor in (Q, K, V)]
    whole, _ = attend(*(tensor[None] for tensor in exact), materialize(causal, T) if params.causal else None)
    tiled, _ = tiled_attention(*exact, block_q=block_q, block_k=block_k, causal=params.causal)
    here = [index for index, step in enumerate(steps) if step.rows.start <= params.row < step.rows.stop]
    row = params.row - steps[here[0]].rows.start  # within its block

    def followed(name: str) -> np.ndarray:
        return np.stack([getattr(steps[index], name)[row].numpy() for index in here])

    def in_tile(name: str) -> np.ndarray:
        drawn = np.full((len(here), block_k), np.nan, np.float32)
        for place, index in enumerate(here):
            if (values := getattr(steps[index], name)) is not None:
                drawn[place, : values.shape[1]] = values[row].numpy()
        return drawn

    read, written = (np.cumsum([getattr(step, name) for step in steps]) for name in ("bytes_read", "bytes_written"))
    last = steps[here[-1]]
    result = Result(
        block_q=block_q,
        block_k=block_k,
        grid=(-(-T // block_q), -(-T // block_k)),
        query_block=np.array([step.query_block for step in steps]),
        key_block=np.array([step.key_block for step in steps]),
        skipped=np.array([step.skipped for step in steps]),
        partial=np.array([step.partial for step in steps]),
        bytes_read=read,
        bytes_written=written,
        row_steps=np.array(here),
        row_scores=in_tile("scores"),
        row_probabilities=in_tile("probabilities"),
        maximum_before=followed("maximum_before"),
        maximum=followed("maximum"),
        rescale=followed("rescale"),
        sum_before=followed("sum_before"),
        sum=followed("sum"),
        output_before=followed("output_before"),
        output=followed("output"),
        row_output=last.normalized[row].numpy(),
        row_reference=whole[0, params.row].numpy(),
        logsumexp=last.logsumexp[row].item(),
        difference=(tiled - whole[0]).abs().max().item(),
        flash_bytes=int(read[-1] + written[-1]),
        standard_bytes=standard_traffic(T, T, d, _NUMBER).total,
        held_bytes=_NUMBER * (2 * block_q * d + 2 * block_k * d + block_q * block_k + 2 * block_q),
        sentence="",
    )
    return replace(result, sentence=_describe(params, result))


def predict_traffic(params: Params) -> Traffic:
    """What on-chip memory is worth, from tiles of one row to tiles of the whole sequence; needs no torch."""
    T, d = params.length, params.head_dim
    smallest = 4 * d * _NUMBER
    on_chip = smallest << np.arange((T - 1).bit_length() + 1)
    counted = np.array(
        [flash_traffic(T, T, d, _NUMBER, *_blocks_for(params, int(size)), params.causal).total for size in on_chip]
    )
    return Traffic(
        on_chip=on_chip,
        counted=counted,
        theorem=np.array([theorem(T, d, int(size), _NUMBER) for size in on_chip]),
        standard=standard_traffic(T, T, d, _NUMBER).total,
        sentence=(
            f"From {bytes_in_words(on_chip[0])} on the chip (tiles of one row) to {bytes_in_words(on_chip[-1])} (the "
            f"whole sequence in a tile) the bytes that are counted fall {counted[0] / counted[-1]:.1f} times. By the "
            f"theorem, T²d²/M, they fall {on_chip[-1] / on_chip[0]:.0f} times: it is an order of growth without a "
            "factor, for M up to T · d numbers, and leaves out that queries are read and outputs written once whatever "
            "M is."
        ),
    )


def _blocks(params: Params) -> tuple[int, int]:
    """Rows and columns of a tile. FlashAttention-2 keeps queries where the paper's first version kept keys."""
    if params.on_chip is not None:
        return _blocks_for(params, round(params.on_chip * 1024))
    return min(params.block_q, params.length), min(params.block_k, params.length)


def _blocks_for(params: Params, on_chip: int) -> tuple[int, int]:
    columns, rows = tile_sizes(params.head_dim, on_chip, _NUMBER)
    return min(rows, params.length), min(columns, params.length)


def _describe(params: Params, found: Result) -> str:
    tiles, skipped = len(found.skipped), int(found.skipped.sum())
    seen = f"all {tiles} tiles" if not skipped else f"{tiles - skipped} of {tiles} tiles (the mask skips the rest)"
    ratio = found.standard_bytes / found.flash_bytes
    less = (
        f"{ratio:.1f} times less than standard attention's {found.standard_bytes:,}"
        if ratio > 1
        else f"{1 / ratio:.1f} times more than standard attention's {found.standard_bytes:,}, as blocks of few rows "
        "read every key and value again and again"
    )
    matrix = _NUMBER * params.length**2
    held = (
        f"{found.held_bytes:,} bytes are on the chip at once, and no matrix of {matrix:,} bytes is ever held"
        if found.held_bytes < matrix
        else f"the {found.held_bytes:,} bytes on the chip at once are no less than the matrix's {matrix:,}: on "
        "sequences this short there is little to save"
    )
    return (
        f"FlashAttention computes {seen} and moves {found.flash_bytes:,} bytes, {less}; {held}. In float64 the two "
        f"outputs differ by at most {number_in_words(found.difference)}."
    )
