"""Seeing what a model's routers decide, while it runs.

    with observing(model) as seen:
        logits = model(ids)
    loss = loss + 0.01 * sum(auxiliary_loss(routing) for _, routing in seen)

The model itself keeps nothing: what was seen lives as long as its list, graphs included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from engine.moe.routing import ExpertRouter, Routing

__all__ = ["observing"]


@contextmanager
def observing(model: nn.Module) -> Iterator[list[tuple[str, Routing]]]:
    """A list to which every router in `model` adds what it decides, in the order of the calls.

    What gradient checkpointing computes again in the backward pass is not seen twice.

    Args:
        model: any that contains an `ExpertRouter`, or is one.

    Yields:
        Pairs of the name of the layer that the router is part of, and its `Routing`.
    """
    seen: list[tuple[str, Routing]] = []
    observed = []
    for name, router in model.named_modules():
        if isinstance(router, ExpertRouter):

            def observe(routing: Routing, layer: str = name.rpartition(".")[0]) -> None:
                seen.append((layer, routing))

            router.observers.append(observe)
            observed.append((router, observe))
    try:
        yield seen
    finally:
        for router, observe in observed:
            router.observers.remove(observe)
