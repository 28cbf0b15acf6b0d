"""Takes memory, more than it says if it is asked to."""

import time

import numpy as np
from pydantic import Field

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    claimed: int = Field(default=0, ge=0, description="MB that it says it takes.")
    taken: int = Field(default=0, ge=0, description="MB that it takes.")
    log: str = Field(default="", description="File that gets a line for every run.")

    def memory_bytes(self):
        return self.claimed * 10**6


def run(params, job):
    if params.log:
        with open(params.log, "a") as log:
            log.write("run\n")
    blocks = []
    for _ in range(params.taken // 10):
        blocks.append(np.ones(10 * 10**6, dtype=np.uint8))
        time.sleep(0.01)
    return sum(block.nbytes for block in blocks)
