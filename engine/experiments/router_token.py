"""One token's way to its experts: logits, noise, probabilities, bias, choice, gates.

Legend: T tokens of the text, E experts, K chosen for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from engine.errors import InputError
from engine.experiments import _router
from engine.experiments._router_way import Stage, Way

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


class Params(_router.BiasedRouterParams):
    """A router, a bias on one expert, and a token of the text."""

    position: int = Field(
        3,
        ge=0,
        le=_router.MAX_TOKENS - 1,
        title="Token",
        description="Which one, counted from 0 through all sources.",
    )


@dataclass(frozen=True)
class Result:
    """The way of one token.

    Args:
        model: name of the model.
        source: where its weights come from, a sentence.
        layer, num_layers: the layer whose input is routed, of how many.
        tokens: T printable labels.
        starts: index of the first token of each source.
        position, token: the followed one, and its label.
        norm: length of its hidden state before it is scaled to unit mean square.
        stages: in the order of the computation; those that the kind of routing lacks are left out.
        chosen: indices of the experts that compute it, the first choice first; empty if none takes it.
        gates: of the chosen, in their order.
        refused: experts that it wanted and whose capacity was full.
        entropy: of its probabilities in nats; that of its normalised scores for sigmoid.
        sentence: the outcome in words.
    """

    model: str
    source: str
    layer: int
    num_layers: int
    tokens: list[str]
    starts: tuple[int, ...]
    position: int
    token: str
    norm: float
    stages: tuple[Stage, ...]
    chosen: tuple[int, ...]
    gates: tuple[float, ...]
    refused: tuple[int, ...]
    entropy: float
    sentence: str


def run(params: Params, job: Job) -> Result:
    """Route the whole text, and follow one token of it.

    Raises:
        InputError: the text has no such token.
    """
    import torch

    job.report(0, 2)
    reading = _router.read(params, job)
    if params.position >= len(reading.tokens):
        raise InputError(
            f"There is no token {params.position}: the text has {len(reading.tokens)} of them, 0 to "
            f"{len(reading.tokens) - 1}."
        )
    job.report(1, 2)
    router = _router.make_router(params, reading.x)
    routing = _router.route(params, router, reading.x)
    here = routing.tokens == params.position
    probs = routing.probs[params.position]
    logits = routing.logits[params.position]  # (E,)
    clean = reading.x[params.position] @ router.weight.T if params.kind == "noisy" else logits
    way = Way(
        params=params,
        position=params.position,
        clean=clean.double().numpy(),
        logits=logits.double().numpy(),
        probs=routing.probs.double().numpy(),
        taken=routing.experts[here].numpy(),
        gates=routing.gates[here].double().numpy(),
        wanted=None if routing.indices is None else routing.indices[params.position].numpy(),
        room=int(routing.counts.max()),
    )
    order = np.lexsort((way.taken, -way.gates))
    job.report(2, 2)
    return Result(
        model=reading.model.name,
        source=reading.model.source,
        layer=params.layer,
        num_layers=reading.model.num_layers,
        tokens=reading.tokens,
        starts=reading.starts,
        position=params.position,
        token=reading.tokens[params.position],
        norm=float(reading.norms[params.position]),
        stages=tuple(way.stages()),
        chosen=tuple(way.taken[order].tolist()),
        gates=tuple(way.gates[order].tolist()),
        refused=way.refused,
        entropy=torch.special.entr(probs).sum().item(),
        sentence=way.describe(reading.tokens[params.position]),
    )
