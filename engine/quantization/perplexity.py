"""How well a model predicts a text, before and after it was quantized.

Legend: B batch, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data import TokenBlocks, stream
from engine.errors import InputError
from engine.model import evaluating
from engine.quantization.limits import FEWEST_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
        loss: mean of −ln p(next token), in nats a token.
        tokens: how many were predicted.
        block_losses: the same of each block of the text; their mean is `loss`, for blocks are equally long.
    """

    loss: float
    tokens: int
    block_losses: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        """exp(loss): among so many equally likely tokens the model might as well have guessed.

        Infinite where that is no number any more, NaN for a model that computes none.
        """
        return math.inf if self.loss > _LARGEST_EXPONENT else math.exp(self.loss)

    def increase_over(self, other: Perplexity) -> tuple[float, float]:
        """By which part this perplexity is above `other`'s on the same text, and the standard error of that.

            increase = exp(mean d) − 1,    error = exp(mean d) · s(d) / √B,    d = loss − other's loss, block by block

        Both models have read the same blocks, so that what is hard in the text for both has no part in the error. It is
        NaN of one block, and where a loss is not finite.
        """
        increase = self.value / other.value - 1
        changes = [mine - yours for mine, yours in zip(self.block_losses, other.block_losses, strict=True)]
        if len(changes) < 2 or not all(math.isfinite(change) for change in changes):
            return increase, math.nan
        return increase, (1 + increase) * statistics.stdev(changes) / math.sqrt(len(changes))


def read_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, block_size: int = 256) -> TokenBlocks:
    """Texts as blocks for `measure_perplexity` and `collect_statistics`; a text shorter than a block is one block.

    Args:
        texts: the documents, an end token is put after each; a rest that fills no block is left out.
        tokenizer: the model's.
        block_size: T, no more than the model's context.

    Raises:
        InputError: fewer than 64 tokens to predict.
    """
    tokens = stream(texts, tokenizer)
    if len(tokens) <= FEWEST_TOKENS:
        raise InputError(
            f"The text has {len(tokens)} tokens, too few to measure perplexity on: give {FEWEST_TOKENS + 1} or more."
        )
    size = min(block_size, len(tokens) - 1)
    return TokenBlocks(tokens.unfold(0, size + 1, size))


def measure_perplexity(model: nn.Module, blocks: TokenBlocks, batch_size: int = 8) -> Perplexity:
    """The perplexity of `model` on `blocks`, each of which it reads from the start without what came before.

    Args:
        model: ours, ids (B, T) → logits (B, T, V), or a causal language model of transformers.
        blocks: the text.
        batch_size: B.
    """
    reader = _Logits(model)
    losses: list[float] = []
    with evaluating(reader):
        for indices in torch.arange(len(blocks)).split(batch_size):
            batch = blocks.batch(indices).to(next(model.parameters()).device)
            losses += _mean_losses(reader(batch.inputs), batch.targets).tolist()
    return Perplexity(statistics.fmean(losses), len(blocks) * blocks.block_size, tuple(losses))


def _mean_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each block, (B,): the mean of −ln p(target) over its T tokens."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")  # (B·T,)
    return losses.view(targets.shape).double().mean(1)


class _Logits(nn.Module):
    """A model that gives its logits alone, as ours do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, V)."""
        output = self.model(ids)
        return output if isinstance(output, Tensor) else output.logits
