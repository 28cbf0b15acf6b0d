"""What one training step costs: everything trained, PEFT's LoRA, ours; eager and compiled, in one process.

    python -m tests.benchmarks.lora_training_step [--device cuda] [--small] [--rows ours …]
        [--json FILE --note TEXT]

A Llama of 1.1 billion random parameters (transformers' own code with PyTorch's fused attention under PEFT and ours
alike; our `Decoder` in the rows that say so), bfloat16, batch 4 × 1024, rank 16 on all seven projections of every
block, and AdamW with `fused=True` unless a row says otherwise. PEFT keeps its adapters in float32 unless told; so do
ours, in the rows that say nothing else. `frozen` is what no adapter can undercut: forward, loss, and the gradient of
the activations. The floor is that arithmetic at the speed of one large product, measured in the same run.

The losses of 50 steps on the same data start from the same weights, A copied from PEFT's. They are compared with what
the same run gives when it is repeated, and when A is drawn from another seed.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from engine import llama
from engine.lora.injection import PROJECTIONS, inject_lora
from tests.benchmarks.training_step import ALPHA, Benchmark, Row, Size, base, compiled, default_adamw, run


def everything(size: Size, device: str, seed: int) -> nn.Module:
    return base(size, device)


def frozen(size: Size, device: str, seed: int) -> nn.Module:
    """No adapters; the embeddings' output wants a gradient, so that the backward pass runs to the first layer."""
    model = base(size, device).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def peft(size: Size, device: str, seed: int, float32: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=size.rank, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    model = base(size, device)
    torch.manual_seed(seed)
    return get_peft_model(model, config, autocast_adapter_dtype=float32)


def peft_bf16(size: Size, device: str, seed: int) -> nn.Module:
    return peft(size, device, seed, float32=False)


def ours(size: Size, device: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = base(size, device)
    torch.manual_seed(seed)
    inject_lora(model, size.rank, ALPHA, PROJECTIONS, adapter_dtype=dtype)
    return model


def ours_bf16(size: Size, device: str, seed: int) -> nn.Module:
    return ours(size, device, seed, torch.bfloat16)


def decoder(size: Size, device: str, seed: int) -> nn.Module:
    return llama.from_transformers(base(size, device)).train()


def peft_decoder(size: Size, device: str, seed: int, float32: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=size.rank, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    return get_peft_model(decoder(size, device, seed), config, autocast_adapter_dtype=float32)


def peft_decoder_bf16(size: Size, device: str, seed: int) -> nn.Module:
    return peft_decoder(size, device, seed, float32=False)


def our_decoder(size: Size, device: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = decoder(size, device, seed)
    torch.manual_seed(seed)
    inject_lora(model, size.rank, ALPHA, PROJECTIONS, adapter_dtype=dtype)
    return model


def our_decoder_bf16(size: Size, device: str, seed: int) -> nn.Module:
    return our_decoder(size, device, seed, torch.bfloat16)


ROWS = {  # in the order in which they are measured, should the time not suffice for all
    "full": Row(everything),
    "frozen": Row(frozen, optimize=None),
    "PEFT": Row(peft),
    "ours": Row(ours),
    "ours, Decoder": Row(our_decoder),
    "PEFT, Decoder": Row(peft_decoder),
    "full, Decoder": Row(decoder),
    "PEFT compiled": Row(peft, prepare=compiled),
    "ours compiled": Row(ours, prepare=compiled),
    "ours, Decoder compiled": Row(our_decoder, prepare=compiled),
    "PEFT, default AdamW": Row(peft, optimize=default_adamw),
    "PEFT bf16": Row(peft_bf16),
    "ours bf16": Row(ours_bf16),
    "PEFT bf16, Decoder": Row(peft_decoder_bf16),
    "ours bf16, Decoder": Row(our_decoder_bf16),
    "ours bf16 compiled": Row(ours_bf16, prepare=compiled),
}

BENCHMARK = Benchmark(
    description=__doc__,
    what="One LoRA training step of a Llama in bfloat16, by tests/benchmarks/lora_training_step.py",
    rows=ROWS,
    start=peft,
    runs={
        "PEFT": ("PEFT", 1),
        "PEFT again": ("PEFT", 1),
        "PEFT, other A": ("PEFT", 2),
        "ours": ("ours", 1),
        "ours again": ("ours", 1),
        "ours bf16": ("ours bf16", 1),
    },
    distances={
        "ours, PEFT": ("ours", "PEFT"),
        "ours bf16, PEFT": ("ours bf16", "PEFT"),
        "PEFT, PEFT again": ("PEFT", "PEFT again"),
        "ours, ours again": ("ours", "ours again"),
        "PEFT, PEFT with another A": ("PEFT", "PEFT, other A"),
    },
)

if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
