"""The paged optimizer against its target on a GPU: it goes on where plain AdamW runs out of memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from engine.errors import WorkbenchError
from engine.measure import exclusive
from engine.optim import PagedAdamW, create_large_test_model, simulate_training_step
from engine.targets.target import Figure

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


def paged_steps(job: Job, steps: int) -> Figure:
    """Steps that `PagedAdamW` takes on a model with which plain AdamW runs out in its first.

    Raises:
        WorkbenchError: plain AdamW does not run out, so that nothing is shown, or a paged step's loss is no number.
        torch.cuda.OutOfMemoryError: the paged one does.
    """
    with exclusive(job.device), torch.cuda.device_of(torch.empty(0, device=job.device)):
        model = create_large_test_model()
        try:
            simulate_training_step(model, torch.optim.AdamW(model.parameters()))
        except torch.cuda.OutOfMemoryError:
            pass
        else:
            raise WorkbenchError("Plain AdamW did not run out of memory: there is nothing for paging to show.")
        paged = PagedAdamW(model.parameters())
        losses = [simulate_training_step(model, paged) for _ in range(steps)]
    if not all(map(math.isfinite, losses)):
        raise WorkbenchError("The paged optimizer took its steps, but a loss is no finite number.")
    return Figure(len(losses), note=f"Plain AdamW ran out within {model.budget / 1e9:.3g} GB.")
