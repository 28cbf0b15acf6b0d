"""The processes that train one model together, one for each GPU: this one alone, or those of a process group.

    processes = join(model, accelerator)
    learner = processes.wrap(model)                       # its backward pass averages the gradients of all processes
    mine = torch.arange(64)[processes.share]              # every process another part
    total, count = processes.sum(loss, scored)

Whatever waits for the others is called in every process, as often and in the same order. All begin with the weights of
the main process and take the same steps, so that each holds the whole model at any time.

Through Accelerate, which knows which process this is and on which device however the processes were started
(`accelerate launch`, `torchrun`, a group of one's own), wraps the model in PyTorch's DistributedDataParallel with what
its user asked for, and reduces on whatever backend there is. What it does to batches, optimizers and schedules beyond
that is not used: the trainer weighs gradients by scored tokens, which it does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from engine.errors import InputError, WorkbenchError
from engine.quantization.production import scales_of

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class OtherProcessError(WorkbenchError):
    """A process that trains the same model gave up, and so does this one."""

    def __init__(self) -> None:
        super().__init__("Another process of this run failed, and this one cannot go on alone: see its message.")


class OneProcess:
    """This process, which trains alone."""

    rank = 0
    count = 1

    @property
    def share(self) -> slice:
        """Of a sequence that is dealt out, what this process gets: every `count`-th, from `rank` on."""
        return slice(self.rank, None, self.count)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call instead of `model`, so that a backward pass averages the gradients of all processes."""
        return model

    def accumulating(self, learner: nn.Module) -> AbstractContextManager:
        """A context in which backward passes leave the gradients for a later one to average."""
        return nullcontext()

    def sum(self, *numbers: float | Tensor) -> list[float]:
        """Each of the numbers added up over the processes, in float64."""
        return [float(number) for number in numbers]

    def gather(self, one: Any) -> list[Any]:
        """What every process gives, by rank."""
        return [one]

    def any(self, asked: Callable[[], object]) -> bool:
        """Whether `asked()` is true in some process.

        Raises:
            Exception: what it raises here.
            OtherProcessError: it raises in another process and not here.
        """
        return bool(asked())

    def complete(self, task: Callable[[], T]) -> T:
        """What `task()` returns here, once it has ended in every process; raises as `any`."""
        ended: list[T] = []
        self.any(lambda: ended.append(task()))
        return ended[0]


class ProcessGroup(OneProcess):
    """The processes of a group, as Accelerate knows it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call instead of `model`; all processes' tensors become those of the main one."""
        for scales in scales_of(model).values():  # of all else DistributedDataParallel does it
            distributed.broadcast(scales.detach(), 0)
        return self._accelerator.prepare_model(model, device_placement=False)

    def accumulating(self, learner: nn.Module) -> AbstractContextManager:
        """A context in which backward passes leave the gradients for a later one to average."""
        return self._accelerator.no_sync(learner)

    def sum(self, *numbers: float | Tensor) -> list[float]:
        """Each of the numbers added up over the processes, in float64."""
        given = torch.stack([torch.as_tensor(number, dtype=torch.float64, device="cpu") for number in numbers])
        return self._accelerator.reduce(given.to(self._accelerator.device), "sum").tolist()

    def gather(self, one: Any) -> list[Any]:
        """What every process gives, by rank."""
        from accelerate.utils import gather_object

        return gather_object([one])

    def any(self, asked: Callable[[], object]) -> bool:
        """Whether `asked()` is true in some process; raises if it does in one."""
        said, error = False, None
        try:
            said = bool(asked())
        except Exception as raised:
            error = raised
        agreed, failed = self.sum(said, error is not None)
        if error is not None:
            raise error
        if failed:
            raise OtherProcessError
        return agreed > 0


def join(model: nn.Module, accelerator: Accelerator | None = None) -> OneProcess:
    """The processes that train `model`: those of `accelerator`, else of the process group, else this one.

    Raises:
        InputError: `accelerator` shards models or rounds them, which is not known here; it was made before the process
            group; or the model is on another device than it.
    """
    device = next(model.parameters()).device
    grouped = distributed.is_available() and distributed.is_initialized()
    count = distributed.get_world_size() if grouped else 1
    if accelerator is None:
        if count == 1:
            return OneProcess()
        accelerator = _accelerate(device)
    if accelerator.num_processes != count:
        raise InputError(
            f"Accelerate was started before the process group, and knows {accelerator.num_processes} of its {count} "
            "processes: start the group first, or leave it to Accelerate."
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InputError(f"Accelerate was told to train as {kind}: here every process holds the whole model, use DDP.")
    if accelerator.mixed_precision != "no":
        raise InputError(
            f"Accelerate was told to compute in {accelerator.mixed_precision}: leave it at no, and set the trainer's "
            "precision."
        )
    if count == 1:
        return OneProcess()
    if accelerator.device.type != device.type or (device.type == "cuda" and accelerator.device.index != device.index):
        raise InputError(f"The model is on {device}, this process trains on {accelerator.device}: move it there.")
    return ProcessGroup(accelerator)


def _accelerate(device: torch.device) -> Accelerator:
    """An accelerator for the process group that there is, which Accelerate looks for in the environment alone."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import patch_environment

    rank, count = distributed.get_rank(), distributed.get_world_size()
    local = {"LOCAL_RANK": rank if device.index is None else device.index, "LOCAL_WORLD_SIZE": count}
    found = {name: os.environ.get(name, value) for name, value in local.items()}
    # The number of threads is the caller's choice; without this Accelerate makes its own on the CPU.
    with patch_environment(rank=rank, world_size=count, omp_num_threads=torch.get_num_threads(), **found):
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            # Every weight that learns gets a gradient in every step, that of an expert without a token too (of 0).
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False, gradient_as_bucket_view=True)],
        )
