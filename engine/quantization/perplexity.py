"""How well a model predicts a text, before and after it was quantized.

Legend: B batch, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from engine.data import TokenBlocks, stream
from engine.errors import InputError
from engine.trainer import evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FEWEST_TOKENS = 64
"""Of fewer, the mean loss would say more about the text than about the model."""

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
        loss: mean of −ln p(next token), in nats a token.
        tokens: how many were predicted.
    """

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(loss): among so many equally likely tokens the model might as well have guessed.

        Infinite where that is no number any more.
        """
        return math.inf if self.loss > _LARGEST_EXPONENT else math.exp(self.loss)


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
    loss = evaluate(_Logits(model), blocks, batch_size)
    return Perplexity(loss, len(blocks) * blocks.block_size)


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
