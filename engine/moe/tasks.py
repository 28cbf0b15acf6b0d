"""Four small tasks for one model to learn at once, each with questions that it is never trained on.

Needs no torch; `engine.finetuning.lessons` makes tokens of them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_TASKS = Path(__file__).parent / "tasks.toml"

_TRAINED_DISTANCES, _UNSEEN_DISTANCE = (1, 2, 3), 7
"""From the first word of a pair to the second, in the list: no pair is both trained on and tested with, nor is it with
its words exchanged, which would need distances that sum to the length of the list."""


@dataclass(frozen=True)
class Task:
    """Something to learn; an answer is right if it is exactly the expected one.

    Args:
        name: a word.
        about: what there is to do, and how it is tested, a sentence.
        training: question and answer of each lesson.
        held_out: the same of what is never trained on.
    """

    name: str
    about: str
    training: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]


@lru_cache(maxsize=1)
def read_tasks() -> tuple[Task, ...]:
    """The tasks that the workbench ships, with as many lessons each."""
    entries = tomllib.loads(_TASKS.read_text(encoding="utf-8"))["tasks"]
    return tuple(_task(entry) for entry in entries)


def _task(entry: dict[str, Any]) -> Task:
    wordings = entry["wordings"]
    if "words" in entry:
        words = entry["words"]
        answers = {pair: turned for distance in _TRAINED_DISTANCES for pair, turned in _pairs(words, distance)}
        unseen = dict(_pairs(words, _UNSEEN_DISTANCE))
    else:
        answers, unseen = entry["answers"], entry.get("unseen", {})
    return Task(
        name=entry["name"],
        about=entry["about"],
        training=_ask(wordings, answers),
        held_out=_ask(entry.get("unseen_wordings", []), answers) + _ask(wordings, unseen),
    )


def _pairs(words: list[str], distance: int) -> list[tuple[str, str]]:
    """Every word with the one so far behind it, in this order and in the other."""
    pairs = [(first, words[(place + distance) % len(words)]) for place, first in enumerate(words)]
    return [(f"{first} {second}", f"{second} {first}") for first, second in pairs]


def _ask(wordings: list[str], answers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((wording.format(it=it), answer) for wording in wordings for it, answer in answers.items())
