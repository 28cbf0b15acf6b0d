"""The cache that flash_decode reads, and the ways to read it.

Legend: B batch, H heads, G key/value heads (G divides H), T tokens in the cache, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from engine.experiments.flash_decode import Params

_QUERY_SIZE = 3.0


@dataclass(frozen=True)
class Way:
    """One way to read the cache: its name, what it is called, whether keys are repeated for every head, how it runs."""

    name: str
    label: str
    repeats: bool
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


def list_ways(params: Params, device: str) -> tuple[list[Way], dict[str, str]]:
    """What can read the cache here, our own last, and why the rest cannot."""
    import torch

    from engine.flash.backends import BACKENDS, Case
    from engine.flash.split import split_attention

    ways, absent = [], {}
    grouped = params.heads != params.kv_heads
    dtype, keys = getattr(torch, params.dtype), params.max_length
    case = Case(device, dtype, params.head_dim, 1, keys, causal=False, grad=False, grouped=grouped)
    for backend in (BACKENDS[name] for name in dict.fromkeys(params.backends)):
        if (reason := backend.why_not(case)) is not None:
            absent[backend.label] = reason
        else:
            ways.append(Way(backend.name, backend.label, grouped and not backend.groups, backend.run))
    if params.splits > 1:
        ways.append(Way("whole", "Our split, in one part", False, lambda Q, K, V: split_attention(Q, K, V, 1)))
    label = f"Our split, in {'one part' if params.splits == 1 else f'{params.splits} parts'}"
    ways.append(Way("split", label, False, lambda Q, K, V: split_attention(Q, K, V, params.splits)))
    return ways, absent


def draw_cache(params: Params, length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Q (B, H, 1, d) and a cache K, V (B, G, T, d); queries are large, so that some tokens matter more than others."""
    import torch

    generator = torch.Generator(device).manual_seed(params.seed)
    dtype = getattr(torch, params.dtype)

    def draw(heads: int, tokens: int, size: float = 1.0) -> Tensor:
        shape = (params.batch, heads, tokens, params.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(size)

    return draw(params.heads, 1, _QUERY_SIZE), draw(params.kv_heads, length), draw(params.kv_heads, length)
