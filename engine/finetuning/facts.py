"""Facts for a model to learn: those of an invented world, which it cannot know, or a learner's own.

Needs no torch; `engine.finetuning.lessons` makes tokens of them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.errors import InputError

MAX_FACTS = 200
"""More lines of one's own take longer to learn than anyone waits."""

_WORLD = Path(__file__).parent / "world.toml"
_QUOTED = 40


@dataclass(frozen=True)
class Fact:
    """Something to know.

    Args:
        question: asks for it; the first of `training`.
        answer: a word or a few.
        training: questions that are trained on.
        paraphrases: the same question in words that are never trained on; none for a learner's own facts.
    """

    question: str
    answer: str
    training: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def read_facts() -> list[Fact]:
    """The facts of the invented world that the workbench ships."""
    kinds = tomllib.loads(_WORLD.read_text(encoding="utf-8"))["kinds"]
    return [
        Fact(
            question=kind["training"][0].format(who=who),
            answer=answer,
            training=tuple(form.format(who=who) for form in kind["training"]),
            paraphrases=tuple(form.format(who=who) for form in kind["paraphrases"]),
        )
        for kind in kinds
        for who, answer in kind["answers"].items()
    ]


def parse_facts(text: str) -> list[Fact]:
    """A learner's own facts: a line each, ``question | answer`` or ``question? answer``; empty lines do not count.

    Raises:
        InputError: a line is neither, two lines answer one question differently, or there are none or too many.
    """
    answers: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        question, answer = _split(line)
        if not question or not answer:
            raise InputError(
                f"Line {number}, {_shortened(line.strip())!r}, is no fact: write “question | answer” or "
                "“question? answer”."
            )
        if answers.setdefault(question, answer) != answer:
            raise InputError(
                f"Line {number} answers {_shortened(question)!r} with {_shortened(answer)!r}, an earlier line with "
                f"{_shortened(answers[question])!r}: keep one of them."
            )
    if not 1 <= len(answers) <= MAX_FACTS:
        raise InputError(f"There are {len(answers)} facts: give from 1 to {MAX_FACTS}, one a line.")
    return [Fact(question, answer, (question,)) for question, answer in answers.items()]


def _split(line: str) -> tuple[str, str]:
    """Question and answer without spaces around them and the answer's full stop; empty where one is missing."""
    question, mark, answer = line.partition("|")
    if not mark:
        question, mark, answer = line.rpartition("?")
        question = question.strip() and question + mark
    return question.strip(), answer.strip().rstrip(".").rstrip()


def _shortened(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"
