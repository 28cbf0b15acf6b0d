"""What training costs: parameters, arithmetic and memory, as they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.architecture import ModelConfig
    from engine.data import TokenBlocks
    from engine.pretraining.mixture import RepetitionMixture
    from engine.pretraining.recipe import Recipe


@dataclass(frozen=True)
class Cost:
    """What training takes.

    Args:
        parameters: of the model.
        flops: of all steps together.
        memory_bytes: at the peak.
    """

    parameters: int
    flops: float
    memory_bytes: int


def weigh(recipe: Recipe, dataset: RepetitionMixture, held_out: TokenBlocks, device: str) -> int:
    """Bytes that a model, its gradients, AdamW's means and two steps allocate at their peak."""
    from engine.measure import peak_memory
    from engine.model import Decoder
    from engine.trainer import Trainer

    calm = recipe.options.model_copy(update={"learning_rate": 1e-6})  # it is not to diverge

    def rehearse() -> None:
        Trainer(Decoder(recipe.model).to(device), dataset, calm, held_out=held_out).train_steps(2)

    return peak_memory(rehearse, device)


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
