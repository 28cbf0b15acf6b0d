"""4 bits against their targets: how small a model gets, and how much worse.

Both say NF4 in blocks of 64 with double quantization, as `quantize_model_4bit` does it for production.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine import pretrained
from engine.data import TokenBlocks
from engine.errors import JobCancelledError
from engine.model import create_test_transformer, evaluating
from engine.pretraining.run import read_stories
from engine.quantization.perplexity import Perplexity, measure_perplexity, read_blocks
from engine.quantization.production import get_model_memory_mb, quantize_model_4bit
from engine.targets.target import Figure

if TYPE_CHECKING:
    from torch import nn

    from engine.runtime.jobs import Job

_STORIES = Path(pretrained.__file__).parent / "storyteller" / "heldout.txt"
_TENTH = 1.2816
"""Standard errors from the mean to the 10th or the 90th percentile, of what is normally distributed."""


def size_share(job: Job, layers: int, d_model: int) -> Figure:
    """Per cent of its memory that the test transformer still takes, embedding and norms included."""
    torch.manual_seed(0)
    model = create_test_transformer(layers, d_model).to(job.device)
    return Figure(100 * get_model_memory_mb(quantize_model_4bit(model)) / get_model_memory_mb(model))


def perplexity_increase(job: Job, tokens: int, block_size: int) -> Figure:
    """By how many per cent the storyteller's perplexity rises on stories that it was not trained on.

    Args:
        job: where to measure; it is asked between the two models whether to go on.
        tokens: of the text, as far as whole blocks reach.
        block_size: tokens that are read from the start at once.

    Returns:
        The increase; its spread is that of an estimate with so many blocks, 1.28 standard errors on either side.

    Raises:
        JobCancelledError: the job was stopped.
    """
    base = pretrained.load(device=job.device)
    blocks = read_blocks(read_stories(_STORIES), base.tokenizer, block_size)
    blocks = TokenBlocks(blocks.ids[: max(1, tokens // block_size)])
    before = _perplexity(base.model, blocks, job)
    job.report(1, 2)
    after = _perplexity(quantize_model_4bit(base.model), blocks, job)
    increase, error = after.increase_over(before)
    note = f"From {before.value:.4g} to {after.value:.4g}, over {before.tokens:,} tokens."
    reach = None if math.isnan(error) else 100 * _TENTH * error
    low, high = (None, None) if reach is None else (100 * increase - reach, 100 * increase + reach)
    return Figure(100 * increase, low, high, len(blocks), "blocks", note)


def output_error(job: Job, layers: int, d_model: int, batch: int, length: int, seeds: int) -> Figure:
    """The mean squared error of the test transformer's logits, in per cent of their variance, over models."""
    errors = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = create_test_transformer(layers, d_model).to(job.device).eval()
        ids = torch.randint(model.config.vocab_size, (batch, length), device=job.device)  # (B, T)
        small = quantize_model_4bit(model)
        with evaluating(model), evaluating(small):
            logits = model(ids)
            errors.append(100 * ((small(ids) - logits).square().mean() / logits.var()).item())
        job.report(seed + 1, seeds)
    return Figure.of_runs(errors, "seeds")


def _perplexity(model: nn.Module, blocks: TokenBlocks, job: Job) -> Perplexity:
    if job.cancelled:
        raise JobCancelledError("Cancelled.")
    return measure_perplexity(model, blocks)
