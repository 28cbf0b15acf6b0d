"""What a model learns from: the shipped stories or a learner's own text, with a tokenizer made for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import InputError
from engine.experiments._training import SHIPPED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

HELD_OUT_SHARE = 0.1
_PROMPT_WORDS = 8
_PROMPT_TOKENS = 20
_ENOUGH = 1500  # characters: with fewer the last tenth rarely has the tokens of a sample


@dataclass(frozen=True)
class Corpus:
    """A text in two parts, as tokens.

    Args:
        tokenizer: made for the part that is learned.
        learned, tested: (tokens,) each.
        characters_per_token: of the tested part.
        prompt: where a sample of what was learned may begin; of a learner's own text, words of the tested part.
    """

    tokenizer: PreTrainedTokenizerFast
    learned: Tensor
    tested: Tensor
    characters_per_token: float
    prompt: str


def read(text: str, vocab_size: int, block_size: int) -> Corpus:
    """`text`, or the shipped stories if it is empty, with a tokenizer for it; its last tenth is what it is tested on.

    Args:
        text: what to learn from, without blanks around it.
        vocab_size: of the tokenizer.
        block_size: T; each part must hold T + 1 tokens.

    Raises:
        InputError: the text is too short for that.
    """
    from engine.data import train_tokenizer
    from engine.pretraining.run import PROMPT, read_stories

    learned, tested = split([text] if text else read_stories(SHIPPED / "heldout.txt"))
    return encode(learned, tested, train_tokenizer(learned, vocab_size, block_size), block_size, "" if text else PROMPT)


def encode(
    learned: list[str], tested: list[str], tokenizer: PreTrainedTokenizerFast, block_size: int, prompt: str = ""
) -> Corpus:
    """Both parts of a text as tokens.

    Args:
        learned, tested: documents of each part.
        tokenizer: with an end token.
        block_size: T; each part must hold T + 1 tokens.
        prompt: where samples begin; words of the tested part if it is empty.

    Raises:
        InputError: a part is too short.
    """
    from engine.data import stream

    parts = stream(learned, tokenizer), stream(tested, tokenizer)
    if min(map(len, parts)) <= block_size:
        raise InputError(
            f"The text has {len(parts[0])} tokens to learn from and {len(parts[1])} in its last tenth to be tested on, "
            f"each part needs {block_size + 1}: paste more text, or leave it empty for the text that is shipped."
        )
    return Corpus(
        tokenizer,
        *parts,
        characters_per_token=sum(map(len, tested)) / len(parts[1]),
        prompt=prompt or _first_words(tested[0], tokenizer),
    )


def check_length(text: str, block_size: int) -> None:
    """Refuse a text of which it is plain, without a tokenizer, that its last tenth fills no sample.

    Raises:
        InputError: it is; an empty text stands for the stories and passes.
    """
    if not text:
        return
    _, tested = split([text])
    if sum(len(part.encode()) for part in tested) < block_size:  # a token has at least one byte, and one ends the text
        raise InputError(
            f"Your text has {len(text)} characters: its last tenth is kept to be tested on and must fill a sample of "
            f"{block_size} tokens, so paste {_ENOUGH:,} or more, or leave it empty for the text that is shipped."
        )


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """The first nine tenths of the characters of all `documents`, and the rest; at most one document is cut."""
    left = round((1 - HELD_OUT_SHARE) * sum(map(len, documents)))
    learned, tested = [], []
    for document in documents:
        learned.append(document[:left])
        tested.append(document[left:])
        left = max(0, left - len(document))
    return list(filter(None, learned)), list(filter(None, tested))


def _first_words(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The first whole words of a text that may begin within a word, and no more than leave room for what follows."""
    words = text.split(maxsplit=_PROMPT_WORDS + 1)
    prompt = " ".join(words[1 : _PROMPT_WORDS + 1] or words)
    return tokenizer.decode(tokenizer(prompt).input_ids[:_PROMPT_TOKENS]).strip("\N{REPLACEMENT CHARACTER} ")
