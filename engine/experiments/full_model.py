"""What every technique is worth before anything runs: parameters, bytes, FLOPs and the memory of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.full_model_cost import Count, Flops, Model, Part, StoredPart, flops, model_bytes, parameters
from engine.full_model_memory import PARTS, Moment, Step, StepMemory, step_memory

if TYPE_CHECKING:
    from engine.runtime.jobs import Job

__all__ = ["OFF", "PARTS", "Moment", "Params", "Prediction", "Result", "compute", "predict", "run"]

OFF = "everything off"
"""The name of the model without any technique."""


class Params(SwitchParams):
    """A model, what is on it, and a batch."""


@dataclass(frozen=True)
class Prediction:
    """What one combination of switches comes to.

    Args:
        on: names of the switches that are on.
        parameters: numbers by part, all of them and those that learn.
        model_bytes: of the model as it is stored, by part.
        flops: of a token.
        memory: of a training step.
    """

    on: tuple[str, ...]
    parameters: dict[Part, Count]
    model_bytes: dict[StoredPart, int]
    flops: Flops
    memory: StepMemory

    @property
    def total(self) -> Count:
        """Numbers of all parts."""
        counts = self.parameters.values()
        return Count(sum(count.total for count in counts), sum(count.learning for count in counts))


@dataclass(frozen=True)
class Result:
    """The settings, and what each switch moves.

    Args:
        chosen: as the switches are set.
        flipped: with one switch the other way, by its name.
        off: without any technique.
    """

    chosen: Prediction
    flipped: dict[str, Prediction]
    off: Prediction

    def worth(self, switch: str) -> tuple[Prediction, Prediction]:
        """With a switch on and with it off, all others as they are set."""
        pair = (self.chosen, self.flipped[switch])
        return pair if switch in self.chosen.on else pair[::-1]


def run(params: Params, job: Job) -> Result:
    """The arithmetic of `engine.full_model_cost` and `engine.full_model_memory`; nothing is built."""
    return compute(params, on_cuda=job.device.startswith("cuda"))


def compute(params: SwitchParams, *, on_cuda: bool = False) -> Result:
    """What `run` gives, at once.

    Args:
        params: the settings.
        on_cuda: what the step is predicted for, a GPU or a CPU.
    """

    def made(**switches: bool) -> Prediction:
        return predict(params, on_cuda=on_cuda, **switches)

    flipped = {name: made(**{name: not getattr(params, name)}) for name in SWITCHES}
    return Result(made(), flipped, made(**dict.fromkeys(SWITCHES, False)))


def predict(params: SwitchParams, *, on_cuda: bool, **switches: bool) -> Prediction:
    """What the settings come to, but for `switches`."""
    config = params.architecture(**switches)
    model = Model(config, params.learning)
    step = Step(model, params.batch_size, params.length, on_cuda)
    on = {name: switches.get(name, getattr(params, name)) for name in SWITCHES}
    return Prediction(
        tuple(name for name in SWITCHES if on[name]),
        parameters(model),
        model_bytes(config),
        flops(model, params.length, step.tokens, on_cuda),
        step_memory(step),
    )
