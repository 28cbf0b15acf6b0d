"""What the runs of the full-model lab share: what is learned, how fast, and how much memory a step takes.

Needs no torch.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from engine.errors import InputError
from engine.experiments import _training_text, full_model
from engine.experiments._full_model import SWITCHES, VOCAB_SIZE, Beginning, SwitchParams
from engine.experiments._lora import read_facts

if TYPE_CHECKING:
    from engine.experiments._training_text import Corpus

LEARNING_RATES: dict[tuple[Beginning, bool], float] = {
    ("fresh", False): 3e-3,
    ("fresh", True): 1e-2,
    ("storyteller", False): 1e-3,
    ("storyteller", True): 3e-3,
}
"""The highest one, by where the model begins and whether adapters or 4 bits freeze matrices of its layers.

Of the storyteller in 4 bits alone the embedding learns, which takes small steps. Chosen by a few tries with one seed,
not by a search: held-out loss in nats a token after so many steps of 8 × 128.

    fresh, 40 steps, from 6.46               1e-3  4.59 · 3e-3  3.96 · 1e-2  4.30 · 3e-2  5.10   all weights learn
                                             1e-3  5.22 · 3e-3  4.74 · 1e-2  3.87 · 3e-2  5.12   all four switches on
                                             1e-3  5.14 · 3e-3  5.08 · 1e-2  4.97 · 2e-2  4.93   MoE-LoRA alone
    storyteller on the town, 30 steps, 5.44  1e-3  3.46 · 3e-3  4.46 · 1e-2  diverges            all weights learn
                                             1e-3  3.43 · 3e-3  3.01 · 1e-2  3.45                all four switches on

MoE-LoRA alone is slow on a fresh model at every rate, and so is one without adapters whose feed-forward matrices are
frozen (5.09 at 3e-3): attention learns whole beside random matrices that do not.
"""

_MARGIN = 1.2

MAX_TEXT = 20_000
"""Characters of a text to learn from."""

PROMPTS: dict[Beginning, str] = {
    "fresh": "One day, Lily and Tom went to the",
    "storyteller": "What color is Pip's door?",
}
"""Where samples of the text that is shipped begin if nothing else is asked for."""


class RunParams(SwitchParams):
    """A model, a text, and how it learns."""

    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        title="Learning rate",
        description="The highest one: it rises to it, then falls. Empty takes what suits what learns, adapters more "
        "than whole matrices.",
    )
    steps: int = Field(400, ge=1, le=2000, title="Steps", description="Updates of what learns.")
    text: str = Field(
        "",
        title="Your text",
        description="What to learn from. Empty takes stories for a fresh model, and sixty facts of an invented town "
        "for the storyteller, which knows the stories.",
        json_schema_extra={"widget": "area"},
    )

    @field_validator("text")
    @classmethod
    def _clean_text(cls, text: str) -> str:
        return cleaned(text, "Your text", MAX_TEXT)  # a last tenth of blanks would be nothing to be tested on

    @model_validator(mode="after")
    def _check_text(self) -> RunParams:
        _training_text.check_length(self.text, self.length)
        return self

    def rate(self, **switches: bool) -> float:
        """The learning rate that is meant, for the switches as they are set but for `switches`."""
        if self.learning_rate is not None:
            return self.learning_rate
        config = self.architecture(**switches)
        frozen = config.use_lora or config.use_moe or (self.begin == "fresh" and config.use_quantization)
        return LEARNING_RATES[self.begin, frozen]

    def memory_bytes(self) -> int:
        """What a step takes at its peak."""
        return self.step_bytes()

    def step_bytes(self, **switches: bool) -> int:
        """What a step takes at its peak by arithmetic, with a margin, with `switches` other than they are set.

        The plain model is there until the techniques are on it, and so is the storyteller as it is published.
        """
        predicted = full_model.predict(self, on_cuda=False, **switches)
        return round(_MARGIN * (predicted.memory.peak.total + 8 * self.architecture().num_parameters))

    def switched_on(self) -> list[str]:
        """Names of the switches that are set."""
        return [name for name in SWITCHES if getattr(self, name)]


def cleaned(text: str, title: str, longest: int) -> str:
    """What was typed, without blanks around it and without what ends a text for many a program.

    Raises:
        InputError: it is too long.
    """
    text = text.replace("\0", "").strip()
    if len(text) > longest:
        raise InputError(f"{title} has {len(text):,} characters: give {longest:,} at most.")
    return text


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two spreads, each from its low to its high end, do: what they are of cannot be told apart then."""
    return one[0] <= other[1] and other[0] <= one[1]


def read_text(params: RunParams) -> Corpus:
    """What is learned and what is tested, in the tokens of the model that learns it.

    Raises:
        InputError: the text is too short for one of them.
    """
    if params.begin == "fresh":
        return _training_text.read(params.text, VOCAB_SIZE, params.length)
    from engine import pretrained

    tokenizer = pretrained.load("storyteller").tokenizer
    if params.text:
        return _training_text.encode(*_training_text.split([params.text]), tokenizer, params.length)
    facts = read_facts()
    learned = [f"{question} {fact.answer}." for fact in facts for question in fact.training]
    tested = [f"{question} {fact.answer}." for fact in facts for question in fact.paraphrases]
    for part in (learned, tested):
        random.Random(0).shuffle(part)  # so that no answer stands just before a question like its own
    return _training_text.encode(learned, tested, tokenizer, params.length, PROMPTS["storyteller"])
