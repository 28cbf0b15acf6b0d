"""Grows, ends or fails when it is told to, in the very process of the test."""

from dataclasses import dataclass
from functools import partial
from queue import Queue

from engine.errors import JobCancelledError, JobFailedError
from engine.experiments import ExperimentParams

ORDERS: Queue[str] = Queue()


class Params(ExperimentParams):
    n: int = 7


@dataclass(frozen=True)
class Result:
    length: int
    whole: bool


def run(params, job):
    length = 0
    job.report(0, 9, grown=0)
    while (order := ORDERS.get()) != "return":
        if job.cancelled:
            raise JobCancelledError("The job was cancelled.")
        if order == "fail":
            raise JobFailedError("The worker died.")
        length += 1
        job.show(partial(Result, length, whole=False))
        job.report(length, 9, grown=length)
    return Result(length, whole=True)
