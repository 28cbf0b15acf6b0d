"""What attention costs: bytes between the device's memory (HBM) and the chip, and floating-point operations.

Standard attention writes its (Tq, Tk) matrices to HBM and reads them back. FlashAttention keeps each tile of them on
the chip and reads keys and values once per block of queries instead: less traffic for about the same arithmetic. The
counts are exact for the algorithms as written, per head, with no cache between HBM and the chip.

Legend: B batch, H heads, Tq queries, Tk keys, d head width, M on-chip memory, Br and Bc rows and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import InputError

Direction = Literal["forward", "backward", "both"]

STATISTICS_BYTES = 4
"""Logsumexp, D and unfinished gradients are kept in float32 when the tensors are half precision."""


@dataclass(frozen=True)
class Traffic:
    """Bytes moved between HBM and the chip.

    Args:
        read: from HBM.
        written: to HBM.
    """

    read: int
    written: int

    @property
    def total(self) -> int:
        """Bytes both ways."""
        return self.read + self.written


def tile_sizes(d: int, on_chip_bytes: int, element_bytes: int) -> tuple[int, int]:
    """The paper's tile for a chip with M elements of memory: Bc = ⌈M / 4d⌉, Br = min(Bc, d).

    The paper's outer loop runs over keys. FlashAttention-2 exchanged the loops, and with them the blocks' parts: there
    the larger block is that of the queries, block_q = Bc and block_k = Br.

    Args:
        d: head width.
        on_chip_bytes: memory of the chip, in bytes.
        element_bytes: width of a number, in bytes.

    Returns:
        (Br, Bc).

    Raises:
        InputError: one of them is smaller than 1.

    Source: Dao et al. 2022, algorithm 1, https://arxiv.org/abs/2205.14135.
    """
    _check_at_least_one(d=d, on_chip_bytes=on_chip_bytes, element_bytes=element_bytes)
    columns = _divide_up(on_chip_bytes, 4 * d * element_bytes)
    return min(columns, d), columns


def held_matrices(backend: str, element_bytes: int, grad: bool, *, on_gpu: bool = False) -> int:
    """How many matrices of B·H·Tq·Tk numbers of the input's size a backend holds at once: 0 for all but two.

    Scores beside weights, and for gradients the weights P beside their own gradients dP and the scores'; on a GPU the
    softmax's backward pass holds P ∘ dP as well. PyTorch's "math" computes half precision in float32, and on a
    processor it has a copy of a matrix in half precision at the peak.

    Args:
        backend: its name in `engine.flash.backends.BACKENDS`.
        element_bytes: width of a number, in bytes.
        grad: whether gradients are computed as well.
        on_gpu: whether it runs on one.
    """
    if backend not in ("standard", "torch-math"):
        return 0
    matrices = 2 + grad * (2 if on_gpu else 1)
    if backend == "standard" or element_bytes != 2:
        return matrices
    return 2 * matrices if on_gpu else matrices + 3


def standard_traffic(Tq: int, Tk: int, d: int, element_bytes: int) -> Traffic:
    """One head of standard attention, forward; a causal mask saves nothing.

    S = QKᵀ reads Q and K and writes S, P = softmax(S) reads S and writes P, O = PV reads P and V and writes O.

    Args:
        Tq: queries.
        Tk: keys.
        d: head width.
        element_bytes: width of a number, in bytes.

    Raises:
        InputError: one of them is smaller than 1.

    Source: Dao et al. 2022, algorithm 0, https://arxiv.org/abs/2205.14135.
    """
    _check_at_least_one(Tq=Tq, Tk=Tk, d=d, element_bytes=element_bytes)
    queries, keys, matrix = Tq * d, Tk * d, Tq * Tk
    return Traffic(element_bytes * (queries + 2 * keys + 2 * matrix), element_bytes * (queries + 2 * matrix))


def standard_backward_traffic(Tq: int, Tk: int, d: int, element_bytes: int) -> Traffic:
    """One head of standard attention, backward, with P kept from the forward pass.

    dV = PᵀdO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS K, dK = dSᵀQ, each from HBM to HBM.

    Arguments and errors as in `standard_traffic`.

    Source: Dao et al. 2022, algorithm 3, https://arxiv.org/abs/2205.14135.
    """
    _check_at_least_one(Tq=Tq, Tk=Tk, d=d, element_bytes=element_bytes)
    queries, keys, matrix = Tq * d, Tk * d, Tq * Tk
    read = (matrix + queries) + (queries + keys) + 2 * matrix + (matrix + keys) + (matrix + queries)
    written = keys + matrix + matrix + queries + keys
    return Traffic(element_bytes * read, element_bytes * written)


def flash_traffic(
    Tq: int, Tk: int, d: int, element_bytes: int, block_q: int, block_k: int, causal: bool = False
) -> Traffic:
    """One head of FlashAttention-2, forward: what the steps of `tiled.stream_tiles` add up to.

    A query block reads its queries once and, for every key block that it sees, keys and values; it writes its output
    and its logsumexp. A query block that sees nothing moves nothing.

    Args:
        Tq: queries.
        Tk: keys.
        d: head width.
        element_bytes: width of a number, in bytes; the logsumexp has at least four.
        block_q: Br.
        block_k: Bc.
        causal: query i sees the keys j ≤ i + Tk − Tq.

    Raises:
        InputError: a size is smaller than 1.

    Source: Dao 2023, algorithm 1, https://arxiv.org/abs/2307.08691.
    """
    _check_at_least_one(Tq=Tq, Tk=Tk, d=d, element_bytes=element_bytes, block_q=block_q, block_k=block_k)
    statistics = max(element_bytes, STATISTICS_BYTES)
    read = written = 0
    for rows, keys in _seen_by_blocks(Tq, Tk, block_q, block_k, causal):
        read += element_bytes * d * (rows + 2 * keys)
        written += element_bytes * d * rows + statistics * rows
    return Traffic(read, written)


def flash_backward_traffic(
    Tq: int, Tk: int, d: int, element_bytes: int, block_q: int, block_k: int, causal: bool = False
) -> Traffic:
    """One head of FlashAttention-2, backward: what the steps of `tiled.stream_backward_tiles` add up to.

    Keys and values are read once and their gradients written once. Every tile reads Q, dO, logsumexp, D and dQ of its
    rows and writes dQ, which is float32 at least until a query block's last tile. In a query block's first tile O takes
    the place of D, which is computed and written there, and there is no dQ to read yet.

    Arguments and errors as in `flash_traffic`.

    Source: Dao 2023, algorithm 2, https://arxiv.org/abs/2307.08691.
    """
    _check_at_least_one(Tq=Tq, Tk=Tk, d=d, element_bytes=element_bytes, block_q=block_q, block_k=block_k)
    statistics = max(element_bytes, STATISTICS_BYTES)
    read = written = element_bytes * d * 2 * Tk  # K and V; dK and dV
    for rows, keys in _seen_by_blocks(Tq, Tk, block_q, block_k, causal):
        tiles = _divide_up(keys, block_k)
        read += rows * tiles * (2 * element_bytes * d + statistics)  # Q, dO and logsumexp
        read += rows * (element_bytes * d + (tiles - 1) * statistics * (d + 1))  # O, then D and dQ
        written += rows * (statistics + element_bytes * d + (tiles - 1) * statistics * d)  # D, and dQ at every tile
    return Traffic(read, written)


def attention_flops(B: int, H: int, Tq: int, Tk: int, d: int, causal: bool, direction: Direction = "forward") -> int:
    """Floating-point operations of attention's matrix products, by the convention of the FlashAttention papers.

    Forward 4 · B · H · d for each visible pair of query and key, QKᵀ and PV; backward 2.5 times that, five products
    instead of two. With a causal mask only the visible pairs count, exactly.

    Args:
        B: batch.
        H: query heads.
        Tq: queries.
        Tk: keys.
        d: head width.
        causal: query i sees the keys j ≤ i + Tk − Tq.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.

    Raises:
        InputError: a size is smaller than 1, or there is no such direction.

    Source: Dao 2023, section 4.1, https://arxiv.org/abs/2307.08691 (which halves the causal count).
    """
    _check_at_least_one(B=B, H=H, Tq=Tq, Tk=Tk, d=d)
    products = {"forward": 2, "backward": 5, "both": 7}
    if direction not in products:
        raise InputError(f"direction ({direction!r}) must be one of {', '.join(products)}")
    return products[direction] * 2 * B * H * d * visible_pairs(Tq, Tk, causal)


def visible_pairs(Tq: int, Tk: int, causal: bool) -> int:
    """How many (query, key) pairs the mask allows: all Tq · Tk, or those with j ≤ i + Tk − Tq."""
    if not causal:
        return Tq * Tk
    seeing = min(Tq, Tk)  # their counts are Tk − seeing + 1, …, Tk
    return seeing * (2 * Tk - seeing + 1) // 2


def theorem(T: int, d: int, M: int, element_bytes: int = 1) -> float:
    """T²d² / M, what FlashAttention's traffic grows as: standard attention's grows as Td + T².

    It is an order of growth and has no constant factor; it holds for d ≤ M ≤ Td, M in elements.

    Args:
        T: tokens.
        d: head width.
        M: on-chip memory in bytes; in elements when `element_bytes` is 1, which is how the paper writes it.
        element_bytes: width of a number, in bytes.

    Returns:
        (T · d · element_bytes)² / M, in the unit of M.

    Raises:
        InputError: a size is smaller than 1.

    Source: Dao et al. 2022, theorem 2, https://arxiv.org/abs/2205.14135.
    """
    _check_at_least_one(T=T, d=d, M=M, element_bytes=element_bytes)
    return (T * d * element_bytes) ** 2 / M


def _seen_by_blocks(Tq: int, Tk: int, block_q: int, block_k: int, causal: bool) -> list[tuple[int, int]]:
    """(rows, keys) of every query block that sees anything; keys are those in whole key blocks, seen or not."""
    blocks = []
    for start in range(0, Tq, block_q):
        stop = min(start + block_q, Tq)
        seen = max(stop + Tk - Tq, 0) if causal else Tk
        if seen:
            blocks.append((stop - start, min(_divide_up(seen, block_k) * block_k, Tk)))
    return blocks


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _check_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} ({size}) must be at least 1")
