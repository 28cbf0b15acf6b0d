"""The shipped small model as the training lab sees it: its files, and how its own training went.

Legend: S steps, M checkups, B batch, T tokens of a sample.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

SHIPPED = Path(__file__).parents[1] / "storyteller"
"""The small model: its tokenizer, its held-out stories and the log of its training."""

SAID_TWICE = 2 * "kQ7fZw3XjB9vRy5G"
"""A text to see an induction head on: letters and digits that no tokenizer joins, so that each is a token, read twice.

A short run learns to look back on random tokens alone, on which it is scored; on a sentence said twice its heads hardly
do. On this text the head of the default run gives 90% to 95% of its second round's attention to the stripe with seeds
0, 1 and 2.
"""

_SEPARATOR = "<|endofstory|>"  # as in engine.pretraining.run, which needs torch


@dataclass(frozen=True)
class Recorded:
    """The training of the shipped model, as it was recorded.

    Args:
        step, loss: (S,), as in `engine.experiments.training.Result`.
        checked, held_out_loss, induction, previous_token: (M,), likewise.
        tokens_per_step: B·T.
        block_size: T.
        text_share: of the samples, those that are text and do not repeat themselves.
        probe: on what the heads were scored, in words.
        characters_per_token: of the held-out stories, which makes its losses comparable with those on other tokens.
        device: where it ran.
        date: when, as 2026-01-31; empty if that was not written down.
    """

    step: np.ndarray
    loss: np.ndarray
    checked: np.ndarray
    held_out_loss: np.ndarray
    induction: np.ndarray
    previous_token: np.ndarray
    tokens_per_step: int
    block_size: int
    text_share: float
    probe: str
    characters_per_token: float
    device: str
    date: str

    @property
    def provenance(self) -> str:
        """Where and when, in a few words."""
        return f"{self.device.removeprefix('NVIDIA ')}, recorded {self.date}".rstrip()


@lru_cache(maxsize=1)
def recorded_run() -> Recorded | None:
    """The run that made the shipped model; None where its files are missing."""
    try:
        log = json.loads((SHIPPED / "log.json").read_text(encoding="utf-8"))
        stories = (SHIPPED / "heldout.txt").read_text(encoding="utf-8").split(_SEPARATOR)
    except FileNotFoundError:
        return None
    recipe, checkups = log["recipe"], log["checkups"]
    options, longest = recipe["options"], recipe["probe_period"]
    averaged = "copied" in checkups[0]  # earlier runs wrote no such share and scored on the longest period alone
    return Recorded(
        step=np.arange(1, len(log["steps"]) + 1),
        loss=np.array([loss for loss, *_ in log["steps"]]),
        checked=np.array([checkup["step"] for checkup in checkups]),
        held_out_loss=np.array([checkup["held_out_loss"] for checkup in checkups]),
        induction=np.array([checkup["induction"]["score"] for checkup in checkups]),
        previous_token=np.array([checkup["previous_token"]["score"] for checkup in checkups]),
        tokens_per_step=options["batch_size"] * options["accumulate"] * recipe["block_size"],
        block_size=recipe["block_size"],
        text_share=1 - recipe["random_share"] - recipe["passage_share"],
        probe=f"random tokens of {f'three periods, up to {longest}' if averaged else f'one period, {longest}'}",
        characters_per_token=sum(len(story.strip()) for story in stories) / log["tokens"]["held out"],
        device=log["device"],
        date=log.get("date", ""),
    )
