"""Says which process it runs in."""

import os

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    cacheable = False


def run(params, job):
    return os.getpid()
