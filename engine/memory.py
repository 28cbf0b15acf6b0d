"""Memory of a device as this process may use it: the one place that reads it.

A worker may have less of the host's memory than is free: its nanny ends it when it takes more than its share. It says
so with `limit_host` before it does anything else.
"""

from __future__ import annotations

import psutil

_host_limit: int | None = None


def limit_host(nbytes: int | None) -> None:
    """From now on this process may have `nbytes` of the host's memory; None for all there is."""
    global _host_limit
    _host_limit = nbytes


def free(device: str) -> int:
    """Bytes that this process can still take on `device` now, what PyTorch's allocator keeps in reserve included.

    Args:
        device: torch device, ``"cpu"``, ``"cuda:0"``, …
    """
    if device.startswith("cuda"):
        import torch

        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    available = psutil.virtual_memory().available
    if _host_limit is None:
        return available
    return max(0, min(available, _host_limit - psutil.Process().memory_info().rss))


def total(device: str) -> int:
    """Bytes of `device` that this process may use in all."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[1]
    host = psutil.virtual_memory().total
    return host if _host_limit is None else min(host, _host_limit)
