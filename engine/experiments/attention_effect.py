"""What your change to the attention does to the model's next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.experiments import _attention

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


_NOTHING = 1e-9
"""Bits of divergence below which two passes differ by rounding alone."""


class Params(_attention.HeadParams):
    """The same knobs as for one head: here they act inside the model."""


@dataclass(frozen=True)
class Candidate:
    """A next token with its probability in the untouched and in the changed model."""

    token: str
    before: float
    after: float


@dataclass(frozen=True)
class Result:
    """The next token before and after.

    Args:
        candidates: the ten most probable after the change, the most probable first; empty if the model predicts none.
        divergence: KL(before ‖ after) over the whole vocabulary, in bits; 0 when nothing changed.
        sentence: what happened, in words.
    """

    candidates: list[Candidate]
    divergence: float
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Run the model with the change inside it and compare the distributions of the next token.

    KL(p ‖ q) = Σ_v p_v log₂(p_v / q_v), p before, q after.
    """
    import torch

    from engine import tracing

    model, all_ids = _attention.read(params, job)
    original = _attention.trace(model, params.weights, all_ids)
    _attention.check_head(params, *original.attention.shape[:2], len(all_ids))
    if original.logits is None or model.kind == "encoder":
        what = "A lone attention layer" if params.weights == "untrained" else "An encoder"
        return Result([], 0.0, f"{what} predicts no next token, so there are no probabilities to show.")
    changed = _attention.changed_trace(model, params, _attention.without(all_ids, params.drop))
    before, after = (seen.logits[-1].double().log_softmax(-1) for seen in (original, changed))
    candidates = [
        Candidate(candidate.label, before[candidate.id].exp().item(), candidate.probability)
        for candidate in tracing.next_tokens(changed.logits[-1], model)
    ]
    divergence = max(0.0, torch.sum(before.exp() * (before - after)).item() / torch.log(torch.tensor(2.0)).item())
    was = tracing.next_tokens(original.logits[-1], model, 1)[0]
    return Result(candidates, divergence, _sentence(was, candidates, after[was.id].exp().item(), divergence))


def _sentence(was: tuple[str, int, float], candidates: list[Candidate], now: float, divergence: float) -> str:
    label, _, probability = was
    if divergence < _NOTHING:
        return f"The model expects “{label}” next, with {probability:.1%}."
    top = candidates[0]
    if top.token == label:
        said = f"The model still expects “{label}”: {probability:.1%} before your change, {now:.1%} now."
    else:
        said = f"The model expected “{label}” ({probability:.1%}); now it expects “{top.token}” ({top.after:.1%})."
    return f"{said} KL divergence: {divergence:.2g} bits."
