"""What every switch does to a training step, measured: as set, each of the four flipped alone, and all off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.experiments import full_model
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments.full_model_step import Step, check_time, needed_bytes

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

_CHOSEN = "as set"
_ROUNDS, _SECONDS = 5, 0.2  # in each of which steps of every one are timed for so long


class Params(SwitchParams):
    """A model, what is on it, and a batch."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 600.0
    stop_grace: ClassVar[float] = 30.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    def memory_bytes(self) -> int:
        """What is predicted of the largest of the steps, with a margin, beside the models of all and what they keep."""
        return needed_bytes(self) + 6 * 16 * self.architecture().num_parameters


@dataclass(frozen=True)
class Result:
    """The steps that were measured; nothing if it was stopped.

    Args:
        chosen: as the switches are set.
        flipped: with one switch the other way, by its name.
        off: without any technique.
    """

    chosen: Step | None
    flipped: dict[str, Step]
    off: Step | None

    @property
    def is_complete(self) -> bool:
        """Whether it was not stopped."""
        return self.chosen is not None

    def worth(self, switch: str) -> tuple[Step, Step]:
        """With a switch on and with it off, all others as they are set."""
        pair = (self.chosen, self.flipped[switch])
        return pair if switch in self.chosen.on else pair[::-1]


def run(params: Params, job: Job) -> Result:
    """Time them in turns, so that what else the machine does comes to all of them alike; then weigh one by one.

    Raises:
        DoesNotFitError: one of them would take a processor too long.
    """
    from engine.experiments._on_workers.full_model_step import Trial

    others = {name: {name: not getattr(params, name)} for name in SWITCHES}
    ways = {_CHOSEN: {}} | others | {full_model.OFF: dict.fromkeys(SWITCHES, False)}
    for switches in ways.values():
        check_time(params, job.device, **switches)
    parts, done = len(ways) * (1 + _ROUNDS), 0
    trials: dict[str, Trial] = {}
    for step in range(1 + _ROUNDS):
        for name, switches in ways.items():
            job.report(done, parts)
            if job.cancelled:
                return Result(None, {}, None)
            if step == 0:
                trials[name] = Trial(params, job.device, **switches)
            else:
                trials[name].time(_SECONDS)
            done += 1
    found = {name: trial.told() for name, trial in trials.items()}
    return Result(found.pop(_CHOSEN), {name: found[name] for name in SWITCHES}, found[full_model.OFF])
