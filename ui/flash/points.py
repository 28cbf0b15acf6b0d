"""From the measured points of an experiment to the lines of a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ui.charts.flash import Line


class Point(Protocol):
    """A backend at a length.

    Attributes:
        backend, label: its name in the registry, and in words.
        length: tokens.
    """

    backend: str
    label: str
    length: int


P = TypeVar("P", bound=Point)


def lines(
    points: Sequence[P],
    value: Callable[[P], tuple[float, float, float]],
    hover: Callable[[P], str],
    *,
    recorded: bool = False,
) -> list[Line]:
    """A line for every backend, shortest sequence first.

    Args:
        points: in any order.
        value: of a point: what is drawn, and the ends of its spread.
        hover: what is said of a point.
        recorded: whether they were measured elsewhere and before.
    """
    drawn = []
    for backend in dict.fromkeys(point.backend for point in points):
        members = sorted((point for point in points if point.backend == backend), key=lambda point: point.length)
        values, low, high = zip(*(value(point) for point in members), strict=True)
        lengths, said = [point.length for point in members], [hover(point) for point in members]
        drawn.append(Line(backend, members[0].label, lengths, values, said, low, high, recorded))
    return drawn


def inverse_spread(value: float, median_ms: float, low_ms: float, high_ms: float) -> tuple[float, float, float]:
    """A value that falls as the time rises, with the ends of its spread."""
    return value, value * median_ms / high_ms, value * median_ms / low_ms
