"""What the small model reads: windows of text, and among them samples that repeat themselves.

Simple stories can be told well without ever copying from the context. A sample in which the second half can only be
predicted from the first makes induction heads worth having (Olsson et al. 2022; Edelman et al. 2024).

Legend: B batch, T tokens of a sample, P period of a repetition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.data import IGNORED, Batch
from engine.errors import InputError


class RepetitionMixture:
    """Windows of a token stream; a share of them starts over after P tokens, and of these a part is random tokens.

    Sample i starts at a random place of the i-th block of T tokens. What repeats reads token j mod P at place j. Random
    tokens are scored from place P + 1 on: neither the first round nor that a second one begins can be foretold.

    Args:
        tokens: the stream, on the device where batches are wanted.
        vocab_size: random tokens are drawn from 0 … vocab_size − 1.
        block_size: T.
        random_share: of samples that are random tokens, repeated.
        passage_share: of samples that are a passage of the text, repeated.
        min_period: smallest P; the largest is T / 2.

    Raises:
        InputError: the stream is shorter than one sample, or the shares or the periods leave no choice.
    """

    def __init__(
        self,
        tokens: Tensor,
        vocab_size: int,
        block_size: int,
        *,
        random_share: float,
        passage_share: float,
        min_period: int,
    ) -> None:
        if len(tokens) <= block_size:
            raise InputError(f"The text has {len(tokens)} tokens, a sample needs {block_size + 1}: give more text.")
        if random_share + passage_share > 1:
            raise InputError(
                f"random_share ({random_share:g}) and passage_share ({passage_share:g}) must not exceed 1 together."
            )
        if min_period > block_size // 2:
            raise InputError(f"min_period ({min_period}) must be at most half of the block size ({block_size}).")
        self.tokens, self.vocab_size, self.block_size = tokens, vocab_size, block_size
        self.random_share, self.passage_share, self.min_period = random_share, passage_share, min_period

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The samples `indices` (B,), drawn with `generator` (on the CPU)."""
        count, length, device = len(indices), self.block_size + 1, self.tokens.device
        kind = torch.rand(count, generator=generator)  # (B,)
        random = kind < self.random_share
        repeated = kind < self.random_share + self.passage_share
        period = torch.randint(self.min_period, self.block_size // 2 + 1, (count,), generator=generator)
        period = torch.where(repeated, period, length)[:, None]  # (B, 1)
        start = indices * self.block_size + torch.randint(self.block_size, (count,), generator=generator)
        place = torch.arange(length) % period  # (B, T + 1)
        window = ((start[:, None] + place) % len(self.tokens)).to(device)
        ids = self.tokens[window].long()
        noise = torch.randint(self.vocab_size, (count, length), generator=generator).gather(1, place).to(device)
        random = random[:, None].to(device)
        ids = torch.where(random, noise, ids)
        unforeseeable = torch.arange(length, device=device) <= period.to(device)
        targets = ids.masked_fill(random & unforeseeable, IGNORED)
        return Batch(ids[:, :-1], targets[:, 1:])
