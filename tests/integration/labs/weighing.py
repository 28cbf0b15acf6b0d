"""Asks whether a model's weights fit, as loading one does."""

from pydantic import Field

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    megabytes: int = Field(default=1, ge=1, description="What the weights take.")


def run(params, job):
    import torch

    from engine.checkpoints import check_fits

    check_fits("m", params.megabytes * 10**6, job.device, torch.uint8)
    return params.megabytes
