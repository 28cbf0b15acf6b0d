"""A job that is part of a longer one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


@dataclass(frozen=True)
class JobPart:
    """The job of a part: it stops with the whole, and shows nothing before it is complete.

    Args:
        whole: the job that it is part of.
        on_report: called with what the part reports, `step`, `total` and numbers by name; tells how far the whole is.
    """

    whole: Job
    on_report: Callable[..., None]

    @property
    def device(self) -> str:
        """Where to compute."""
        return self.whole.device

    @property
    def cancelled(self) -> bool:
        """Whether the whole is to stop."""
        return self.whole.cancelled

    @property
    def timed_out(self) -> bool:
        """Whether the whole has reached its limit."""
        return self.whole.timed_out

    def report(self, step: int, total: int, **numbers: float) -> None:
        """Tell how far the part is."""
        self.on_report(step, total, **numbers)

    def show(self, draft: Callable[[], Any]) -> None:
        """A part has no result of its own to show."""
