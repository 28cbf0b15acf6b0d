"""What autocast means to code that chooses its dtypes itself.

Source: `torch.autocast`, which casts what goes into single operations; several in a row would be cast in between.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: x's dtype, or autocast's where that is on."""
    device = x.device.type
    casting = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casting else x.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which operations on `tensor`'s device compute in the dtypes that they are given."""
    device = tensor.device.type
    casting = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if casting else nullcontext()
