"""What one QLoRA training step costs: PEFT on bitsandbytes' layers and ours on the same 4-bit weights, in one process.

    python -m tests.benchmarks.qlora_training_step [--device cuda] [--small] [--rows ours …]
        [--json FILE --note TEXT]

The model and the data are those of lora_training_step.py. The weights of all seven projections are NF4 in blocks of 64
with double quantization, made once by `quantize_model_4bit` for PEFT and ours alike; embeddings, norms and head stay in
bfloat16. The optimizer is bitsandbytes' paged 8-bit AdamW (on a CPU, where it does not run, PyTorch's).

What is trained is float32 everywhere. PEFT keeps its adapters so, and updates each of them. Ours are bfloat16 in the
model, and the optimizer keeps the float32 numbers that they are the roundings of, and updates all at once
(`engine.flat_optimizer`). "flat" gives PEFT the same optimizer, and "one update each" ours PEFT's, with float32
adapters. "captured" replays CUDA graphs of our Decoder's forward and backward pass: no compiler, but not eager either.

The losses of 50 steps on the same data start from the same codes and the same A. They are compared with what the same
run gives when it is repeated, and when A is drawn from another seed.
"""

from __future__ import annotations

import sys

import torch
from bitsandbytes.optim import PagedAdamW8bit
from peft import LoraConfig, get_peft_model
from torch import nn

from engine import llama
from engine.flat_optimizer import FlatOptimizer
from engine.lora.injection import PROJECTIONS, inject_lora
from engine.quantization.production import quantize_model_4bit
from tests.benchmarks.training_step import (
    ALPHA,
    LEARNING_RATE,
    Benchmark,
    Row,
    Size,
    base,
    captured,
    default_adamw,
    run,
)


def paged_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    on_gpu = parameters[0].is_cuda
    return PagedAdamW8bit(parameters, lr=LEARNING_RATE) if on_gpu else default_adamw(parameters)


def flat_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return FlatOptimizer(parameters, paged_adamw)


def quantized(model: nn.Module) -> nn.Module:
    """A copy with all in 4 bits but the head, which is what QLoRA leaves alone."""
    small = quantize_model_4bit(model)
    small.lm_head = model.lm_head
    return small


def transformers_4bit(size: Size, device: str) -> nn.Module:
    model = quantized(base(size, device))
    model.is_loaded_in_4bit = True  # by this PEFT knows
    return model


def decoder_4bit(size: Size, device: str) -> nn.Module:
    return quantized(llama.from_transformers(base(size, device)).train())


def with_peft(model: nn.Module, size: Size, seed: int, float32: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=size.rank, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    return get_peft_model(model, config, autocast_adapter_dtype=float32)


def with_ours(model: nn.Module, size: Size, seed: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(seed)
    inject_lora(model, size.rank, ALPHA, PROJECTIONS, adapter_dtype=dtype)
    return model


def peft(size: Size, device: str, seed: int) -> nn.Module:
    return with_peft(transformers_4bit(size, device), size, seed)


def ours(size: Size, device: str, seed: int) -> nn.Module:
    return with_ours(transformers_4bit(size, device), size, seed)


def ours_float32(size: Size, device: str, seed: int) -> nn.Module:
    return with_ours(transformers_4bit(size, device), size, seed, torch.float32)


def our_decoder(size: Size, device: str, seed: int) -> nn.Module:
    return with_ours(decoder_4bit(size, device), size, seed)


def our_decoder_float32(size: Size, device: str, seed: int) -> nn.Module:
    return with_ours(decoder_4bit(size, device), size, seed, torch.float32)


ROWS = {
    "PEFT": Row(peft, optimize=paged_adamw),
    "ours, Decoder": Row(our_decoder, optimize=flat_adamw),
    "ours, Decoder, captured": Row(our_decoder, captured, flat_adamw),
    "PEFT, flat": Row(peft, optimize=flat_adamw),
    "ours": Row(ours, optimize=flat_adamw),
    "ours, Decoder, one update each": Row(our_decoder_float32, optimize=paged_adamw),
    "ours, one update each": Row(ours_float32, optimize=paged_adamw),
}

BENCHMARK = Benchmark(
    description=__doc__,
    what="One QLoRA training step of a Llama on a 4-bit base, by tests/benchmarks/qlora_training_step.py",
    rows=ROWS,
    start=peft,
    runs={
        "PEFT": ("PEFT", 1),
        "PEFT again": ("PEFT", 1),
        "PEFT, other A": ("PEFT", 2),
        "ours": ("ours", 1),
        "ours again": ("ours", 1),
        "ours, Decoder": ("ours, Decoder", 1),
        "ours, Decoder, captured": ("ours, Decoder, captured", 1),
    },
    distances={
        "ours, PEFT": ("ours", "PEFT"),
        "ours, Decoder, PEFT": ("ours, Decoder", "PEFT"),
        "ours, Decoder, captured, PEFT": ("ours, Decoder, captured", "PEFT"),
        "PEFT, PEFT again": ("PEFT", "PEFT again"),
        "ours, ours again": ("ours", "ours again"),
        "PEFT, PEFT with another A": ("PEFT", "PEFT, other A"),
    },
    packages=("torch", "transformers", "peft", "bitsandbytes"),
)

if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
