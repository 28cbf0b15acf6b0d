"""The engine: attention, its relatives and the experiments on them, in plain PyTorch.

The public names are resolved on first use (PEP 562), so that importing `engine` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AttentionWithLoRA": "engine.lora.attention",
    "Decoder": "engine.model",
    "KVCache": "engine.model",
    "LoRALayer": "engine.lora.layer",
    "LoRALinear": "engine.lora.linear",
    "ModelConfig": "engine.architecture",
    "MultiHeadAttention": "engine.attention",
    "Parts": "engine.model",
    "Sampling": "engine.generation",
    "ScaledDotProductAttention": "engine.attention",
    "TokenBlocks": "engine.data",
    "Trainer": "engine.trainer",
    "TrainerOptions": "engine.trainer",
    "create_attention_with_lora": "engine.lora.attention",
    "create_test_dataset": "engine.data",
    "create_test_transformer": "engine.model",
    "generate": "engine.generation",
    "inject_lora": "engine.lora.injection",
    "load_adapter": "engine.lora.adapter_files",
    "save_adapter": "engine.lora.adapter_files",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
