"""A real text at a router: which expert gets which token, how full the experts are, and what they have in common.

Legend: N tokens, E experts, K chosen for a token, J sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.experiments import _router
from engine.experiments._router_sources import (
    Typical,
    describe_information,
    find_typical,
    list_experts,
    specialise,
)

if TYPE_CHECKING:
    from engine.moe.statistics import Load
    from engine.runtime.jobs import Job


class Params(_router.BiasedRouterParams):
    """A text of several sources, and a router."""


@dataclass(frozen=True)
class Result:
    """Every token with its experts, and every expert with its tokens.

    Args:
        model: name of the model.
        origin: where its weights come from, a sentence.
        layer, num_layers: the layer whose input is routed, of how many.
        tokens: N printable labels.
        token_source: (N,), index of the source that a token is from.
        sources: J names, the first words of each.
        probs: (N, E), what the router gives each expert; rows sum to 1, for which sigmoid's scores are divided by their
            sum.
        experts: (N, K) int, the experts that compute each token, the largest gate first; −1 where there is none,
            because capacity refused it or, with expert choice, no expert took it. With expert choice there are as many
            columns as the token has experts that is wanted by most.
        gates: (N, E), what each expert's output is multiplied by; 0 where it does not compute the token.
        dropped: (N, E) bool, wanted and refused.
        left_out: (N,) bool, tokens that no expert computes.
        load: of the experts: their load, load ÷ fair share, entropy, MaxVio, dead experts, dropped share, importance.
        capacity: tokens that an expert takes at most; None without a limit.
        counts: (J, E) assignments of each source to each expert.
        information: between source and expert in nats, less what chance gives (never below 0).
        information_raw, information_chance: as counted, and the mean over shuffled sources.
        typical: the most typical tokens of each expert.
        sentence: how even the load is, and what is dropped.
        information_sentence: what expert and source have in common.
        router_sentence: what kind of router this is, and what it can show.
    """

    model: str
    origin: str
    layer: int
    num_layers: int
    tokens: list[str]
    token_source: np.ndarray
    sources: tuple[str, ...]
    probs: np.ndarray
    experts: np.ndarray
    gates: np.ndarray
    dropped: np.ndarray
    left_out: np.ndarray
    load: Load
    capacity: int | None
    counts: np.ndarray
    information: float
    information_raw: float
    information_chance: float
    typical: tuple[Typical, ...]
    sentence: str
    information_sentence: str
    router_sentence: str


def run(params: Params, job: Job) -> Result:
    """Read each source once, and route all of their tokens as one batch."""
    import torch

    from engine.moe.statistics import load_of

    job.report(0, 2)
    reading = _router.read(params, job)
    job.report(1, 2)
    routing = _router.route(params, _router.make_router(params, reading.x), reading.x)
    load = load_of(routing)
    shape = routing.probs.shape  # (N, E)
    tokens, experts = routing.tokens.numpy(), routing.experts.numpy()
    taken = np.zeros(shape, bool)
    taken[tokens, experts] = True
    dropped = np.zeros(shape, bool)
    dropped[tuple(routing.dropped.T.numpy())] = True
    gates = routing.dense_gates().numpy()
    found = specialise(reading.token_source, tokens, experts, len(reading.sources), params.experts, params.seed)
    left_out = ~taken.any(1)
    capacity = _capacity(params, shape[0], int(routing.counts.max()))
    job.report(2, 2)
    return Result(
        model=reading.model.name,
        origin=reading.model.source,
        layer=params.layer,
        num_layers=reading.model.num_layers,
        tokens=reading.tokens,
        token_source=reading.token_source,
        sources=reading.sources,
        probs=routing.probs.to(torch.float32).numpy(),
        experts=_order(gates, taken),
        gates=gates,
        dropped=dropped,
        left_out=left_out,
        load=load,
        capacity=capacity,
        counts=found.counts,
        information=found.excess,
        information_raw=found.raw,
        information_chance=found.chance,
        typical=find_typical(reading.tokens, reading.token_source, tokens, experts, params.experts),
        sentence=describe_load(load, int(left_out.sum()), capacity, expert_choice=params.kind == "expert choice"),
        information_sentence=describe_information(found, len(reading.sources), params.experts),
        router_sentence=describe_router(params, shape[0]),
    )


def _capacity(params: Params, num_tokens: int, taken: int) -> int | None:
    """Tokens that an expert takes; with expert choice each takes exactly what the fullest takes."""
    from engine.moe.balance import capacity

    if params.kind == "expert choice":
        return taken
    if params.capacity_factor is None:
        return None
    return capacity(num_tokens, params.experts, params.top_k, params.capacity_factor)


def _order(gates: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The experts of each token, the largest gate first, filled up with −1."""
    width = max(1, int(taken.sum(1).max()))
    order = np.argsort(np.where(taken, -gates, np.inf), axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(taken, order, 1), order, -1)


def describe_load(load: Load, left_out: int, capacity: int | None, *, expert_choice: bool = False) -> str:
    """How even the load is, and what is dropped.

    Args:
        load: of the experts.
        left_out: tokens that no expert computes.
        capacity: tokens that an expert takes at most, or None.
        expert_choice: whether the experts choose; capacity then refuses nothing, but tokens are left.
    """
    experts, total = len(load.load), int(load.load.sum())
    if not total:
        return (
            f"An expert may take {capacity} tokens, so all {int(load.wanted.sum())} choices are refused: no expert "
            "computes anything, and what the layer adds is exactly 0."
        )
    if experts == 1:
        said = f"There is one expert, which gets {_tokens(total)}: there is nothing to choose."
    elif load.max_violation == 0:
        said = f"Every expert gets exactly its fair share, {_tokens(total // experts)}."
    else:
        most = load.relative.max()
        busiest = tuple(np.flatnonzero(load.relative == most).tolist())
        verb, each = ("is", "") if len(busiest) == 1 else ("are", " each")
        said = (
            f"{list_experts(busiest).capitalize()} {verb} wanted by {_tokens(int(load.wanted.max()))}{each}, "
            f"{most:.2f} times the fair share (MaxVio {load.max_violation:.2f})"
        )
        said += f"; {list_experts(load.dead)} by none." if load.dead else "."
    refused = int(load.wanted.sum()) - total
    if expert_choice:
        said += (
            f" {_tokens(left_out)} {_be(left_out)} left over: no expert chose {_it(left_out)}."
            if left_out
            else " Every token has at least one expert."
        )
    elif refused:
        said += (
            f" {refused} of {int(load.wanted.sum())} choices ({load.dropped_share:.0%}) are refused, as an expert "
            f"takes at most {_tokens(capacity)}: it serves first choices before second ones, and earlier tokens before "
            f"later ones. {_tokens(left_out).capitalize()} {_be(left_out)} computed by no expert at all."
        )
    elif capacity is not None:
        said += f" An expert takes at most {_tokens(capacity)}: nothing is refused."
    return said


def describe_router(params: _router.RouterParams, num_tokens: int) -> str:
    """What kind of router this is and what it can show; the model itself has none."""
    if params.kind == "random":
        return "The experts are drawn by lot, whatever the token is: the baseline that a router must beat."
    if params.router == "fresh":
        return (
            "The model is dense and has no router: this one is fresh, with random directions. Where its experts "
            "differ, it is because the hidden states do; nothing was learned for it."
        )
    said = (
        "The model is dense and has no router: the directions of this one are the centres of clusters among these very "
        "tokens, less what all of them share. It shows what the hidden states have to offer, not what training finds."
    )
    if num_tokens < params.experts:
        said += (
            f" There {_be(num_tokens)} only {_tokens(num_tokens)} to find centres in: the other experts keep random "
        )
        said += "directions."
    return said


def _tokens(count: int | None) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _it(count: int) -> str:
    return "it" if count == 1 else "them"
