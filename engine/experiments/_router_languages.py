"""Five sources for experts to specialise on: stories, words backwards, sums, brackets and code.

Legend: J sources, B batch, T tokens of a sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.experiments._training import SHIPPED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from engine.data import Batch, TokenBlocks

NAMES = ("stories", "words backwards", "sums", "brackets", "code")

_LETTERS = 80_000
"""Characters of each source; the shipped stories have twice as many, for the first two."""
_EXAMPLE_LETTERS = 60
_WORDS = ("total", "item", "count", "value", "index", "rows")
_STATEMENTS = (
    "def get_{0}({1}, {2}):\n    return {1} + {2}\n",
    "for {1} in range(len({2})):\n    {0} += {2}[{1}]\n",
    "if {1} is None:\n    {2} = [{0}]\n",
    "{0} = [{1} for {1} in {2} if {1}]\n",
    "while {0} < {1}:\n    {2}.append({0})\n",
)
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_DEEPEST = 8


@dataclass(frozen=True)
class Languages:
    """The five sources as tokens.

    Args:
        tokenizer: made for all of them.
        learned: J streams, (tokens,) each.
        held_out: as many blocks of each source, one source after the other.
        examples: how each begins.
    """

    tokenizer: PreTrainedTokenizerFast
    learned: tuple[Tensor, ...]
    held_out: TokenBlocks
    examples: tuple[str, ...]


class SourceMixture:
    """Windows of J streams; an `engine.data.Dataset`.

    The i-th sample of a batch is of source i mod J, so that every step has as much of each: with random shares experts
    that know one source would look busier or idler by chance.

    Args:
        streams: (tokens,) each, on the device where batches are wanted.
        block_size: T.
    """

    def __init__(self, streams: tuple[Tensor, ...], block_size: int) -> None:
        self.streams, self.block_size = streams, block_size
        self._places = min(map(len, streams)) - block_size

    def __len__(self) -> int:
        return self._places // self.block_size

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Windows that start within the blocks `indices` (B,), where `generator` says."""
        import torch

        from engine.data import Batch

        shift = torch.randint(self.block_size, (len(indices),), generator=generator)
        starts = ((indices * self.block_size + shift) % self._places).tolist()
        windows = [
            self.streams[place % len(self.streams)][start : start + self.block_size + 1]
            for place, start in enumerate(starts)
        ]
        ids = torch.stack(windows).long()  # (B, T + 1)
        return Batch(ids[:, :-1], ids[:, 1:])


def read(vocab_size: int, block_size: int, held_out_blocks: int) -> Languages:
    """The sources, the same on every call.

    Args:
        vocab_size: of the tokenizer.
        block_size: T.
        held_out_blocks: of each source, from its end; never learned.
    """
    import torch

    from engine.data import TokenBlocks, train_tokenizer

    texts = write()
    tokenizer = train_tokenizer([text[: _LETTERS // 4] for text in texts], vocab_size, block_size)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    streams = [torch.tensor(text.ids, dtype=torch.int32) for text in encoded]
    kept = held_out_blocks * block_size + 1
    blocks = [stream[-kept:].unfold(0, block_size + 1, block_size) for stream in streams]
    return Languages(
        tokenizer=tokenizer,
        learned=tuple(stream[:-kept] for stream in streams),
        held_out=TokenBlocks(torch.cat(blocks)),
        examples=tuple(text[:_EXAMPLE_LETTERS].strip() for text in texts),
    )


def write() -> tuple[str, ...]:
    """The five texts, in the order of `NAMES`, the same on every call."""
    from engine.pretraining.run import read_stories

    stories = "\n".join(read_stories(SHIPPED / "heldout.txt"))
    middle = len(stories) // 2
    dice = random.Random(0)
    return (
        stories[: min(middle, _LETTERS)],
        " ".join(word[::-1] for word in stories[middle : middle + _LETTERS].split()),
        _fill(dice, _write_sum),
        _write_brackets(dice, _LETTERS),
        _fill(dice, _write_statement),
    )


def _fill(dice: random.Random, write_line: Callable[[random.Random], str]) -> str:
    lines, length = [], 0
    while length < _LETTERS:
        lines.append(write_line(dice))
        length += len(lines[-1])
    return "".join(lines)


def _write_sum(dice: random.Random) -> str:
    a, b = dice.randint(0, 99), dice.randint(0, 99)
    sign, result = dice.choice((("+", a + b), ("-", a - b), ("*", a * b)))
    return f"{a} {sign} {b} = {result}\n"


def _write_statement(dice: random.Random) -> str:
    return dice.choice(_STATEMENTS).format(*dice.sample(_WORDS, 3))


def _write_brackets(dice: random.Random, length: int) -> str:
    written, unclosed = [], []
    for _ in range(length):
        if unclosed and (len(unclosed) == _DEEPEST or dice.random() < 0.5):
            written.append(_PAIRS[unclosed.pop()])
        else:
            unclosed.append(dice.choice(tuple(_PAIRS)))
            written.append(unclosed[-1])
    return "".join(written)
