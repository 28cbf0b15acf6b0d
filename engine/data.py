"""Text and other sequences, cut into blocks that a decoder learns from.

    tokenizer = train_tokenizer(stories)
    blocks = pack(stories, tokenizer, block_size=256)
    inputs, targets = blocks.batch(torch.tensor([0, 7]))  # (2, 256) each

Legend: N blocks, B batch, T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_TOKEN = "<|endoftext|>"
IGNORED = -100
"""The target of a position that is not scored, as in `torch.nn.functional.cross_entropy`."""

VOCAB_SIZE = 4096


class Batch(NamedTuple):
    """What a decoder reads and what it should say at each position, (B, T) each; `IGNORED` is not scored."""

    inputs: Tensor
    targets: Tensor

    @property
    def read(self) -> Tensor:
        """(B, T), the positions up to each sample's last scored one: what follows is filling that nothing reads."""
        return (self.targets != IGNORED).flip(1).cumsum(1).flip(1) > 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))


class Dataset(Protocol):
    """What a `Trainer` learns from: numbered samples, drawn as batches."""

    def __len__(self) -> int:
        """N."""

    @property
    def block_size(self) -> int:
        """T."""

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The samples `indices` (B,); whatever is random about them comes from `generator`."""


class TokenBlocks:
    """Blocks of T + 1 tokens: the first T are read, the last T are to be said.

    Args:
        ids: (N, T + 1).

    Raises:
        InputError: no block, or no token to predict.
    """

    def __init__(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise InputError(
                f"Blocks of shape {tuple(ids.shape)} hold nothing to learn: give (blocks, tokens), 2 or more."
            )
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def block_size(self) -> int:
        """T."""
        return self.ids.shape[1] - 1

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The blocks `indices` (B,); nothing about them is random."""
        chosen = self.ids[indices.to(self.ids.device)].long()  # (B, T + 1)
        return Batch(chosen[:, :-1], chosen[:, 1:])

    def split(self, share: float) -> tuple[TokenBlocks, TokenBlocks]:
        """All but the last blocks, and the last `share` of them, at least one each.

        Raises:
            InputError: there is only one block.
        """
        if len(self) < 2:
            raise InputError(
                "There is one block of text, too little to learn from one part and test on another: add text."
            )
        held_out = min(max(1, round(share * len(self))), len(self) - 1)
        return self._part(slice(None, -held_out)), self._part(slice(-held_out, None))

    def _part(self, which: slice) -> TokenBlocks:
        return TokenBlocks(self.ids[which])


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, max_tokens: int | None = None
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer for `texts`; it starts from bytes, so that any other text works as well.

    Args:
        texts: what it is for.
        vocab_size: entries, the 256 bytes and `END_TOKEN` (id 0) included.
        max_tokens: longest text of the model that it is for.

    Raises:
        InputError: the vocabulary has no room for every byte.

    Source: Sennrich et al. 2016, on bytes as in Radford et al. 2019, GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(f"vocab_size is {vocab_size}: give at least {len(alphabet) + 1}, every byte and an end token.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END_TOKEN], show_progress=False
        ),
    )
    limit = {} if max_tokens is None else {"model_max_length": max_tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, **limit)


def stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The tokens of all `texts` in a row, (tokens,) int32, the end token after each."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return torch.tensor([token for text in encoded for token in (*text.ids, end)], dtype=torch.int32)


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> TokenBlocks:
    """`texts` one after the other, an end token after each, cut into blocks; a rest too short for one is left out.

    Args:
        texts: the documents.
        tokenizer: with an end token.
        block_size: T; neighbouring blocks share one token, so that each token but the first is predicted once.

    Raises:
        InputError: the texts are shorter than one block.
    """
    tokens = stream(texts, tokenizer)
    if len(tokens) <= block_size:
        raise InputError(
            f"The text has {len(tokens)} tokens, a block needs {block_size + 1}: give more text or shorter blocks."
        )
    return TokenBlocks(tokens.unfold(0, block_size + 1, block_size))


def create_test_dataset(num_samples: int) -> TokenBlocks:
    """Sentences of a synthetic language over 1000 words, the same on every call: (num_samples, 64) tokens.

    Some words are far more frequent than others, and each word is followed by one of three: by its favourite with
    probability 0.7, by the others with 0.2 and 0.1. Guessing costs ln 1000 = 6.9 nats a word, knowing the language 0.8.

    Args:
        num_samples: N, at least 1.

    Raises:
        InputError: no samples are asked for.
    """
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}: give 1 or more.")
    vocab_size, length = 1000, 64
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, vocab_size + 1) ** 1.2  # Zipf's law
    successors = torch.multinomial(frequency, 3 * vocab_size, replacement=True, generator=generator).view(-1, 3)
    words = [torch.multinomial(frequency, num_samples, replacement=True, generator=generator)]
    preference = torch.tensor([0.7, 0.2, 0.1])
    for _ in range(length - 1):
        choice = torch.multinomial(preference, num_samples, replacement=True, generator=generator)
        words.append(successors[words[-1], choice])
    return TokenBlocks(torch.stack(words, dim=1))
