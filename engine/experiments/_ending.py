"""How a training ends that can be stopped on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from engine.experiments import ExperimentParams, duration

if TYPE_CHECKING:
    from engine.runtime.jobs import Job
    from engine.trainer import Trainer

Ending = Literal["running", "finished", "cancelled", "timed out", "diverged"]


def stopped(params: ExperimentParams, job: Job) -> tuple[Ending, str]:
    """Why a job ends early that was asked to stop, and the beginning of a sentence that says so."""
    if job.timed_out:
        return "timed out", f"Stopped at its limit of {duration(params.time_limit)},"
    return "cancelled", "Cancelled"


def see_through(
    train: Callable[[], object], trainer: Trainer, params: ExperimentParams, job: Job
) -> tuple[Ending, str]:
    """Have `train` take the steps of `trainer`, and say how that ended, for a page and in a sentence.

    Args:
        train: takes all steps, or as many as it is let.
        trainer: which it uses.
        params: of the experiment.
        job: that may be stopped.
    """
    from engine.trainer import DivergedError

    try:
        train()
    except DivergedError as error:
        return "diverged", f"{error} What was learned until then is shown."
    taken, total = trainer.step, trainer.total_steps
    if taken == total:
        return "finished", f"All {total} steps were taken."
    ended, words = stopped(params, job)
    return ended, f"{words} after step {taken} of {total}: what was learned until then is shown."
