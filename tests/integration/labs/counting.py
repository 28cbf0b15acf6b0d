"""Counts, reports every step, and stops when it is told to."""

import time
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from engine.errors import JobCancelledError
from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    time_limit = 20.0

    steps: int = Field(default=3, ge=1, le=10_000, description="How far to count.")
    pause: float = Field(default=0.0, ge=0, le=10, description="Seconds between two steps.")
    log: str = Field(default="", description="File that gets a line for every run.")


@dataclass(frozen=True)
class Result:
    numbers: np.ndarray  # (steps,)


def run(params, job):
    if params.log:
        with open(params.log, "a") as log:
            log.write(f"{params.steps}\n")
    for step in range(params.steps):
        if job.cancelled:
            raise JobCancelledError("The counting was stopped.")
        time.sleep(params.pause)
        job.report(step + 1, params.steps, square=(step + 1) ** 2)
    return Result(np.arange(params.steps, dtype=np.float64))
