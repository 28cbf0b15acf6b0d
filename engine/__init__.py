"""The engine: attention, its relatives and the experiments on them, in plain PyTorch.

The public names are resolved on first use (PEP 562), so that importing `engine` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "MultiHeadAttention": "engine.attention",
    "ScaledDotProductAttention": "engine.attention",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
