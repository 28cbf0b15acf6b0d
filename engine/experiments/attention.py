"""Every head of a real model on your text, and what each of them does.

Legend: L layers, H heads, T tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from engine import catalogue
from engine.experiments import Lane, _attention

if TYPE_CHECKING:
    from torch import Tensor

    from engine.pretrained import Pretrained
    from engine.runtime.jobs import Job
    from engine.tracing import Trace


ROLE_SHARE = 0.5
"""A head rests on the first token if it gives it more than half of its mass."""


class Params(_attention.TextParams):
    """A model and a text. A model that may have to be fetched first waits in the long lane, in nobody's way."""

    time_limit: ClassVar[float] = 900.0

    @property
    def lane(self) -> Lane:
        """Short for the models that are on the disk from the start."""
        return "short" if self.model in catalogue.INSTALLED else "long"


@dataclass(frozen=True)
class Result:
    """All maps of one pass.

    Args:
        model: name of the model.
        source: where its weights come from, a sentence.
        kind: "decoder" or "encoder".
        tokens: T printable labels.
        attention: (L, H, T, T) weights, query × key, float16.
        on_text: statistics of every head on the text, each (L, H): "entropy" in nats, "mean distance" in tokens,
            "previous token" and "first token" as shares of the mass.
        on_probe: statistics on random tokens said twice, each (L, H): "induction", "previous token", "first token".
        roles: [L][H] names that follow from `on_probe`: "induction", "previous token", "sink" or "".
        sentence: what is seen, in words.
        fused_sentence: that fused kernels hold no such maps, and how far their output is from the one drawn here.
    """

    model: str
    source: str
    kind: str
    tokens: list[str]
    attention: np.ndarray
    on_text: dict[str, np.ndarray]
    on_probe: dict[str, np.ndarray]
    roles: list[list[str]]
    sentence: str
    fused_sentence: str


def run(params: Params, job: Job) -> Result:
    """Trace the text once and the probe once per model; all statistics come from `engine.head_statistics`."""
    from engine import head_statistics as heads

    job.report(0, 3)
    model, ids = _attention.read(params, job)
    job.report(1, 3)
    seen = _attention.trace(model, params.weights, ids)
    job.report(2, 3)
    probed, period = _attention.probe(model, params.weights)
    on_text = {
        "entropy": heads.entropy(seen.attention),
        "mean distance": heads.mean_distance(seen.attention),
        "previous token": heads.previous_token_score(seen.attention),
        "first token": heads.first_token_mass(seen.attention),
    }
    on_probe = {
        "induction": heads.induction_score(probed, period),
        "previous token": heads.previous_token_score(probed),
        "first token": heads.first_token_mass(probed),
    }
    roles = heads.head_roles(probed, period)
    induction = on_probe["induction"].cpu().numpy()
    job.report(3, 3)
    return Result(
        model=model.name,
        source=model.source,
        kind=model.kind,
        tokens=seen.tokens,
        attention=seen.attention.half().cpu().numpy(),
        on_text={name: values.float().cpu().numpy() for name, values in on_text.items()},
        on_probe={name: values.float().cpu().numpy() for name, values in on_probe.items()},
        roles=roles,
        sentence=_sentence(roles, induction, on_text["first token"], params.weights),
        fused_sentence=_fused_sentence(model, seen, params.weights),
    )


def _fused_sentence(model: Pretrained, seen: Trace, weights: str) -> str:
    from engine import tracing

    if weights == "untrained":
        return "Fused kernels never hold these maps; here one plain layer computes them."
    apart = tracing.fused_difference(model, seen)
    return (
        "Fused kernels never hold these maps, so they are recomputed here: the hidden states of the two ways differ by "
        f"at most {apart.hidden:.1g}, where the largest is {seen.hidden.abs().max():,.0f}."
    )


def _sentence(roles: list[list[str]], induction: np.ndarray, resting: Tensor, weights: str) -> str:
    counts = Counter(role for row in roles for role in row)
    total = sum(counts.values())
    layer, head = np.unravel_index(induction.argmax(), induction.shape)
    best = f"layer {layer}, head {head}"
    here = int((resting > ROLE_SHARE).sum())
    if weights == "untrained":
        return (
            f"Before training: heads with a role: {total - counts['']} of {total}; the best induction score is "
            f"{induction.max():.0%}."
        )
    return (
        f"Of {total} heads, tried on random tokens said twice: {counts['previous token']} on the previous token, "
        f"{counts['induction']} induction (the strongest is {best}, with {induction.max():.0%}), {counts['sink']} "
        f"resting on the first token. On your text, {here} rest on the first token."
    )
