"""Shows what it has so far, and ends as it is told."""

import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from engine.errors import JobCancelledError
from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    lane = "long"
    cacheable = False

    steps: int = Field(default=40, ge=1)
    pause: float = Field(default=0.1, ge=0)
    end: Literal["return", "die", "cancel"] = "return"


@dataclass(frozen=True)
class Result:
    numbers: np.ndarray


def run(params, job):
    for step in range(1, params.steps + 1):
        if job.cancelled:
            raise JobCancelledError("The job was cancelled.")
        time.sleep(params.pause)
        job.show(lambda step=step: Result(np.arange(step)))
        job.report(step, params.steps)
    if params.end == "die":
        os._exit(3)
    return Result(np.arange(params.steps))
