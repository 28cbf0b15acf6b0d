"""What training costs: parameters, arithmetic and memory, as they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.architecture import ModelConfig
    from engine.trainer import Trainer


@dataclass(frozen=True)
class Cost:
    """What training takes.

    Args:
        parameters: of the model.
        flops: of all steps together.
        memory_bytes: at the peak; 0 if it has not been weighed.
    """

    parameters: int
    flops: float
    memory_bytes: int


def weigh(trainer: Trainer) -> int:
    """Take what `trainer` takes before it pauses, which is to be one step, and weigh it.

    Before a step there are the weights and, from the second on, AdamW's two means of each that learns; on top of these
    come what the step allocates: activations, gradients and, in the first, the means. What `on_step` does is not
    weighed.

    Returns:
        Bytes at the peak of the step; 0 if it was not taken.
    """
    from engine.measure import peak_memory
    from engine.quantization.production import get_model_memory_mb

    on_step, reports = trainer.on_step, []
    held = round(1e6 * get_model_memory_mb(trainer.model))
    if trainer.step:
        held += 2 * sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainer.model.zero_grad()
    trainer.on_step = reports.append
    try:
        peak = peak_memory(trainer.resume, str(trainer.device))
    finally:
        trainer.on_step = on_step
    for report in reports:
        on_step(report)
    return held + peak if reports else 0


def count_flops(config: ModelConfig, block_size: int) -> int:
    """FLOPs of a forward and a backward pass over a sample of `block_size` tokens, as PyTorch counts its own operators.

    The counter does not know every fused attention, so that the weights are spelled out; forbidden pairs count too.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.model import Decoder, Parts, visible_attention
    from engine.trainer import summed_loss

    ids = torch.zeros(1, block_size, dtype=torch.long)
    twin = Decoder(config, Parts(attention=visible_attention))
    with FlopCounterMode(display=False) as counter:
        summed_loss(twin, ids, ids).backward()
    return counter.get_total_flops()
