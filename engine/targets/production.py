"""The production model against its targets on a GPU.

Legend: B batch, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.data import TokenBlocks
from engine.full_model import create_optimized_model, production_config
from engine.measure import measure_time, peak_memory
from engine.targets.target import Figure
from engine.trainer import Trainer, TrainerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from engine.model import Decoder
    from engine.runtime.jobs import Job

_RUNS = 100
"""Ten milliseconds each that a GPU is timed for: a pass of all layers takes several of them."""


def reading_time(job: Job, batch: int, length: int) -> Figure:
    """Milliseconds in which the model that `production_config` describes reads (B, T) ids, as for a first token."""
    model, ids = _build(job.device).eval(), _draw(batch, length, job.device)  # (B, T)

    def read() -> None:
        with torch.inference_mode():
            model(ids)

    for _ in range(_passes_before_choice(model)):  # not within the measurement, in which no kernel would be chosen
        read()
    shape, runs = f"({batch}, {length}) ids", _RUNS if torch.device(job.device).type == "cuda" else 10
    found = measure_time(read, job.device, dtype=model.embed_tokens.weight.dtype, shape=shape, runs=runs)
    return Figure(found.median_ms, found.low_ms, found.high_ms, found.runs)


def training_memory(job: Job, batch: int, length: int) -> Figure:
    """Gigabytes of 10⁹ bytes allocated at the peak of training steps on (B, T) ids, model and state included.

    The steps reach beyond the one in which `FlashAttention` compares its kernels, and what that takes counts.
    """

    def train() -> None:
        blocks = TokenBlocks(_draw(batch, length + 1, "cpu"))  # (B, T + 1)
        model = _build(job.device)
        steps = _passes_before_choice(model) + 1  # the last with the kernel chosen and all of AdamW's means there
        Trainer(model, blocks, TrainerOptions(batch_size=batch), held_out=blocks).train_steps(steps)

    on_cuda = torch.device(job.device).type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()  # what others left reserved is not the steps'
    peak = peak_memory(train, job.device, alone=False)
    note = f"The allocator had reserved {torch.cuda.max_memory_reserved(job.device) / 1e9:.3g} GB." if on_cuda else ""
    return Figure(peak / 1e9, note=note)


def _build(device: str) -> Decoder:
    torch.manual_seed(0)
    return create_optimized_model(production_config()).to(device)


def _passes_before_choice(model: Decoder) -> int:
    """Forward passes up to and with the one in which `FlashAttention` chooses its kernel."""
    return model.layers[0].attention.calls_before_measuring // len(model.layers) + 1


def _draw(batch: int, length: int, device: str) -> Tensor:
    return torch.randint(production_config().vocab_size, (batch, length), device=device)
