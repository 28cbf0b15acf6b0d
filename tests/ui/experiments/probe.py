"""A small experiment for the frame's own tests: it answers quickly, slowly or not at all, as it is told."""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from engine.errors import JobCancelledError, JobFailedError
from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    text: str = Field("When Mary and John", description="What is read.", json_schema_extra={"widget": "area"})
    layer: int = Field(3, ge=0, le=29, title="Layer", description="Counted from 0.")
    temperature: float = Field(1.0, gt=0, le=4, json_schema_extra={"step": 0.1})
    mask: Literal["causal", "none"] = "causal"
    scale: Literal["a", "b", "c", "d", "e", "f"] = "a"
    average: bool = False
    window: int = Field(8, ge=1)
    drop: int | None = Field(None, ge=0)
    seconds: float = Field(0.0, ge=0, le=60)
    fail: bool = False

    @field_validator("text")
    @classmethod
    def _not_empty(cls, text):
        if not text.strip():
            raise ValueError("The text is empty: type a few words.")
        return text


@dataclass(frozen=True)
class Check:
    name: str
    must: str
    measured: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class Result:
    layer: int
    weights: np.ndarray
    checks: list[Check]


def run(params, job):
    steps = max(1, round(params.seconds / 0.05))
    for step in range(steps):
        if job.cancelled:
            raise JobCancelledError("The job was cancelled.")
        job.report(step, steps, loss=1.0 / (step + 1))
        if params.seconds:
            time.sleep(0.05)
    if params.fail:
        raise JobFailedError("The worker ran out of memory: choose a shorter text.")
    weights = np.tril(np.random.default_rng(params.layer).random((32, 32)))
    weights /= weights.sum(-1, keepdims=True)
    off = abs(weights.sum(-1) - 1).max()
    return Result(
        params.layer,
        weights,
        [
            Check("Rows sum to 1", "Every query's weights sum to 1.", off, 1e-6, bool(off < 1e-6)),
            Check("A layer is drawn", "The layer is below 20.", params.layer, 20, params.layer < 20),
        ],
    )
