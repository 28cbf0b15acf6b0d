"""Codes of b bits without a gap between them: eight codes are b bytes.

Legend: N codes, b bits of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write codes one after the other, highest bit first; the last byte is filled up with zeros.

    With 4 bits the first of two codes is the high half of the byte, as in bitsandbytes.

    Args:
        codes: (N,) uint8, each below 2^bits.
        bits: b, 1 to 8.

    Returns:
        (⌈N·b / 8⌉,) uint8.
    """
    padded = F.pad(codes, (0, -len(codes) % 8)).view(-1, 8).long()  # (⌈N/8⌉, 8)
    shifts = torch.arange(7, -1, -1, device=codes.device)
    words = (padded << (bits * shifts)).sum(1, keepdim=True)  # 8·b bits of 64; they do not overlap
    stored = (words >> (8 * shifts[8 - bits :])) & 0xFF  # (⌈N/8⌉, b)
    return stored.flatten()[: _packed_length(len(codes), bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of what `pack` wrote, (count,) uint8."""
    padded = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()  # (⌈N/8⌉, b)
    shifts = torch.arange(7, -1, -1, device=packed.device)
    words = (padded << (8 * shifts[8 - bits :])).sum(1, keepdim=True)
    codes = (words >> (bits * shifts)) & (2**bits - 1)  # (⌈N/8⌉, 8)
    return codes.flatten()[:count].to(torch.uint8)


def _packed_length(count: int, bits: int) -> int:
    return -(-count * bits // 8)
