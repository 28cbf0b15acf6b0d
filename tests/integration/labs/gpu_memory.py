"""Takes memory of the GPU until it has what it was asked for, or violates an assertion on the GPU."""

from pydantic import Field

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    cacheable = False

    gigabytes: float = Field(default=1.0, ge=0)
    assertion: bool = False


def run(params, job):
    import torch

    before = torch.cuda.memory_allocated(job.device)
    if params.assertion:
        torch.arange(3, device=job.device)[torch.tensor([7], device=job.device)].cpu()
    blocks = [torch.empty(2**30, dtype=torch.uint8, device=job.device) for _ in range(int(params.gigabytes))]
    assert len(blocks) == int(params.gigabytes)
    return before
