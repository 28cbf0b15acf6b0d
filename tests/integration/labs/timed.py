"""Gives the time, which is different whenever it is asked."""

import time
from dataclasses import dataclass

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    cacheable = False


@dataclass(frozen=True)
class Result:
    nanoseconds: int


def run(params, job):
    return Result(time.monotonic_ns())
