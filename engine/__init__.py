"""The engine: attention, its relatives and the experiments on them, in plain PyTorch.

The public names are resolved on first use (PEP 562), so that importing `engine` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AttentionWithLoRA": "engine.lora.attention",
    "Decoder": "engine.model",
    "ExpertRouter": "engine.moe.routing",
    "FlashAttention": "engine.flash.attention",
    "KVCache": "engine.model",
    "LoRALayer": "engine.lora.layer",
    "LoRALinear": "engine.lora.linear",
    "MoELoRALayer": "engine.moe.lora",
    "ModelConfig": "engine.architecture",
    "MultiHeadAttention": "engine.attention",
    "PagedAdamW": "engine.optim",
    "Parts": "engine.model",
    "Sampling": "engine.generation",
    "ScaledDotProductAttention": "engine.attention",
    "StandardAttention": "engine.flash.attention",
    "TokenBlocks": "engine.data",
    "Trainer": "engine.trainer",
    "TrainerOptions": "engine.trainer",
    "create_attention_with_lora": "engine.lora.attention",
    "create_large_test_model": "engine.optim",
    "create_optimized_model": "engine.full_model",
    "create_test_dataset": "engine.data",
    "create_test_transformer": "engine.model",
    "dequantize_nf4": "engine.quantization.four_bit",
    "dequantize_uniform_4bit": "engine.quantization.four_bit",
    "double_quantize_4bit": "engine.quantization.four_bit",
    "generate": "engine.generation",
    "get_model_memory_mb": "engine.quantization.production",
    "get_tensor_memory_mb": "engine.quantization.four_bit",
    "inject_lora": "engine.lora.injection",
    "inject_moe_lora": "engine.moe.injection",
    "load_adapter": "engine.lora.adapter_files",
    "optimize": "engine.full_model",
    "production_config": "engine.full_model",
    "quantize_4bit": "engine.quantization.four_bit",
    "quantize_model_4bit": "engine.quantization.production",
    "quantize_nf4": "engine.quantization.four_bit",
    "quantize_uniform_4bit": "engine.quantization.four_bit",
    "save_adapter": "engine.lora.adapter_files",
    "simulate_training_step": "engine.optim",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
