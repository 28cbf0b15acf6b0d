"""What an experiment sees of the place where it runs: its device, a way to report, a way to be stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Args:
        step: steps done, from 0 to `total`.
        total: steps in all, at least 1.
        numbers: what is worth showing while it runs, by name, e.g. ``{"loss": 2.31}``.
    """

    step: int
    total: int
    numbers: dict[str, float] = field(default_factory=dict)


class Job(Protocol):
    """The handle that `run(params, job)` of every experiment gets."""

    @property
    def device(self) -> str:
        """The torch device to compute on: ``"cpu"``, ``"cuda:0"``, …"""

    @property
    def cancelled(self) -> bool:
        """True once the job is to stop; look between steps and return or raise."""

    @property
    def timed_out(self) -> bool:
        """Whether it is to stop because of its time limit; False if somebody asked for it."""

    def report(self, step: int, total: int, **numbers: float) -> None:
        """Tell whoever waits that `step` of `total` steps are done, with numbers to show."""

    def show(self, draft: Callable[[], Any]) -> None:
        """Let whoever waits see the result so far.

        Call it as often as there is something new: `draft` is called at once or not at all, about once a second, and
        less often if it takes long.

        Args:
            draft: makes a partial result, of the type that the experiment returns; best without what only the end
                needs, such as weights.
        """


class LocalJob:
    """A job in this very process: the command line and the tests use it.

    Args:
        device: the torch device to compute on.
        on_progress: called with every `Progress`.
        on_show: called with every partial result; without it none is made.
    """

    def __init__(
        self,
        device: str = "cpu",
        on_progress: Callable[[Progress], None] | None = None,
        on_show: Callable[[Any], None] | None = None,
    ) -> None:
        self.device = device
        self.cancelled = self.timed_out = False
        self._on_progress = on_progress
        self._on_show = on_show

    def report(self, step: int, total: int, **numbers: float) -> None:
        """Hand the progress to `on_progress`."""
        if self._on_progress is not None:
            self._on_progress(Progress(step, total, numbers))

    def show(self, draft: Callable[[], Any]) -> None:
        """Hand the partial result to `on_show`."""
        if self._on_show is not None:
            self._on_show(draft())
