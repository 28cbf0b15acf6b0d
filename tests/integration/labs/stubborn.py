"""Does not look whether it was cancelled."""

import time

from pydantic import Field

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    time_limit = 2.0
    stop_grace = 0.5

    seconds: float = Field(default=60.0, ge=0, le=600, description="How long to sleep.")


def run(params, job):
    job.report(0, 1)
    time.sleep(params.seconds)
    return params.seconds
