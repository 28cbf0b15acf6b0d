"""Questions with their answers as tokens: what a decoder is fine-tuned on, and what it is asked.

Legend: N questions, B batch, T tokens of the longest question with its answer, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.data import IGNORED, Batch, TokenBlocks
from engine.errors import InputError
from engine.generation import generate
from engine.model import Decoder, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPOKEN = 6
"""Tokens that a model may answer with, or as many as the longest answer has."""

_READ_AT_ONCE = 4096
"""Positions, filling included."""


class Lessons(TokenBlocks):
    """Questions with answers. Only the answers are scored: a model is to know them, not to ask.

    Shorter ones are filled up at the end, where a decoder, which only looks back, cannot see it.

    Args:
        pairs: question and answer of each.
        tokenizer: of the model that learns; it is kept, and so are `pairs` and the tokens of the `longest_answer`.
        max_tokens: that the model reads at most.

    Raises:
        InputError: a question with its answer has more tokens than that.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.pairs, self.tokenizer = list(pairs), tokenizer
        self.longest_answer = 0
        rows, scored = [], []
        for question, answer in self.pairs:
            asked, said = _tokens(question, tokenizer), _tokens(_spoken(answer), tokenizer)
            if len(asked) + len(said) > max_tokens:
                raise InputError(
                    f"“{question[:40].strip()}” and its answer have {len(asked) + len(said)} tokens, the model reads "
                    f"at most {max_tokens}: shorten them."
                )
            self.longest_answer = max(self.longest_answer, len(said))
            rows.append(torch.tensor(asked + said))
            scored.append(torch.tensor([False] * len(asked) + [True] * len(said)))
        super().__init__(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        self._scored = torch.nn.utils.rnn.pad_sequence(scored, batch_first=True)  # (N, T + 1)
        self._lengths = torch.tensor([len(row) - 1 for row in rows])  # (N,), of what is read

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The lessons `indices` (B,), as long as the longest of them; nothing about them is random."""
        inputs, targets = super().batch(indices)
        batch = Batch(inputs, targets.masked_fill(~self._scored[indices][:, 1:], IGNORED))
        return Batch(*(part[:, : self._lengths[indices].max()] for part in batch))

    def batches(self, positions: int) -> Iterator[Batch]:
        """All lessons in their order, as many at once as fill no more than so many `positions`, but one at least."""
        chosen: list[int] = []
        longest = 0
        for index, length in enumerate(self._lengths.tolist()):
            longest = max(longest, length)
            if chosen and (len(chosen) + 1) * longest > positions:
                yield self.batch(torch.tensor(chosen))
                chosen, longest = [], length
            chosen.append(index)
        yield self.batch(torch.tensor(chosen))

    def longest(self, count: int) -> Lessons:
        """The `count` lessons that take most room."""
        order = self._lengths.argsort(descending=True, stable=True)[:count]
        return self._of([self.pairs[index] for index in order.tolist()])

    def _part(self, which: slice) -> Lessons:
        return self._of(self.pairs[which])

    def _of(self, pairs: Sequence[tuple[str, str]]) -> Lessons:
        return Lessons(pairs, self.tokenizer, max_tokens=self.ids.shape[1])


def answered_rightly(model: Decoder, lessons: Lessons) -> list[bool]:
    """Whether the most probable continuation of each question begins with exactly the answer, full stop included.

    It does if each token of the answer is the most probable one after the question and the answer up to there, which
    one pass tells of all of them: nothing is generated.
    """
    right: list[bool] = []
    with evaluating(model):
        for batch in lessons.batches(_READ_AT_ONCE):
            inputs, targets = batch.to(model.embed_tokens.weight.device)
            scored = targets != IGNORED
            likeliest = model.lm_head(model.hidden(inputs)[scored]).argmax(-1)
            wrong = torch.zeros_like(scored)
            wrong[scored] = likeliest != targets[scored]
            right += (~wrong.any(1)).tolist()
    return right


def answer(model: Decoder, lessons: Lessons) -> list[str]:
    """What the model says to each question, greedily, on one line.

    It is heard up to its first full stop; where the right answer has some inside it, such as “3.14”, up to one more.
    """
    tokenizer = lessons.tokenizer
    alike: dict[int, list[int]] = defaultdict(list)  # a batch of one length needs no padding
    asked = [_tokens(question, tokenizer) for question, _ in lessons.pairs]
    for index, ids in enumerate(asked):
        alike[len(ids)].append(index)
    said = [""] * len(asked)
    device = model.embed_tokens.weight.device
    inside = any("." in right for _, right in lessons.pairs)
    end_token = None if inside else _tokens(".", tokenizer)[-1]
    for length, indices in alike.items():
        room = min(max(_SPOKEN, lessons.longest_answer), model.config.max_seq_len - length)
        ids = torch.tensor([asked[index] for index in indices], device=device)
        spoken = generate(model, ids, room, end_token=end_token)[:, length:]
        for index, text in zip(indices, spoken.tolist(), strict=True):
            stops = lessons.pairs[index][1].count(".") + 1
            said[index] = _up_to(tokenizer.decode(text, skip_special_tokens=True), stops)
    return said


def _up_to(text: str, stops: int) -> str:
    """The text to the given full stop, or all of it if it has fewer, on one line."""
    *sentences, rest = text.split(".", stops)
    heard = "".join(f"{sentence}." for sentence in sentences)
    return " ".join((heard if len(sentences) == stops else heard + rest).split())


def _spoken(answer: str) -> str:
    """The answer as it follows its question; the full stop makes a beginning such as "bear" for "bearded" wrong."""
    return f" {answer}."


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
