"""Learns a step at a time; stopped, it takes its time and then returns what it has learned."""

import time
from dataclasses import dataclass

from pydantic import Field

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    returns_partial = True
    time_limit = 3.0
    stop_grace = 20.0

    farewell: float = Field(default=0.0, ge=0, le=10, description="Seconds that stopping takes.")


@dataclass(frozen=True)
class Result:
    steps: int
    timed_out: bool


def run(params, job):
    for step in range(400):
        if job.cancelled:
            time.sleep(params.farewell)
            return Result(step, job.timed_out)
        time.sleep(0.02)
        job.report(step + 1, 400)
    return Result(400, job.timed_out)
