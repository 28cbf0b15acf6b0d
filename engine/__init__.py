"""The engine: attention, its relatives and the experiments on them, in plain PyTorch.

The public names are resolved on first use (PEP 562), so that importing `engine` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Decoder": "engine.model",
    "KVCache": "engine.model",
    "ModelConfig": "engine.architecture",
    "MultiHeadAttention": "engine.attention",
    "Parts": "engine.model",
    "Sampling": "engine.generation",
    "ScaledDotProductAttention": "engine.attention",
    "TokenBlocks": "engine.data",
    "Trainer": "engine.trainer",
    "TrainerOptions": "engine.trainer",
    "create_test_dataset": "engine.data",
    "create_test_transformer": "engine.model",
    "generate": "engine.generation",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
