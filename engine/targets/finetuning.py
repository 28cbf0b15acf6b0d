"""LoRA against its targets: how few numbers, and how much of what full fine-tuning learns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine import llama, pretrained
from engine.errors import JobCancelledError, WorkbenchError
from engine.finetuning import Method, methods
from engine.finetuning.facts import read_facts
from engine.finetuning.lessons import Lessons, answered_rightly
from engine.lora.layer import LoRALayer
from engine.pretrained import Pretrained
from engine.targets.target import Figure
from engine.trainer import StepReport, TrainerOptions

if TYPE_CHECKING:
    from engine.runtime.jobs import Job


def parameter_share(job: Job, features: int, rank: int) -> Figure:
    """Per cent of a square dense layer's parameters that its `LoRALayer` has."""
    adapter = sum(parameter.numel() for parameter in LoRALayer(features, features, rank).parameters())
    return Figure(100 * adapter / features**2)


def relative_quality(
    job: Job,
    rank: int,
    alpha: float,
    rate: float,
    full_rate: float,
    steps: int,
    batch_size: int,
    seeds: Sequence[int],
    full_at_least: float,
) -> Figure:
    """What LoRA has learned of what full fine-tuning learns in as many steps, in per cent.

    Both teach the storyteller the sixty facts of the invented town, from the same questions in the same order, and are
    then asked the paraphrases that neither has seen. Quality is the share of those answered rightly:

        100 · LoRA's share / full fine-tuning's share,    one ratio a seed

    Args:
        job: where to train; it is asked after every step whether to go on.
        rank: R of the adapters, on every projection of every layer.
        alpha: α.
        rate, full_rate: highest learning rates of LoRA and of full fine-tuning. Each does best with its own; none may
            be chosen by the runs that are scored here.
        steps: of each run.
        batch_size: questions a step.
        seeds: of the runs of each method.
        full_at_least: share of right answers, in per cent, below which full fine-tuning is no measure of anything: a
            bad run of it would raise the ratio.

    Returns:
        The median of the ratios with their spread; the note gives both means and the lowest ratio.

    Raises:
        JobCancelledError: the job was stopped.
        DivergedError: a run diverged.
        WorkbenchError: a run of full fine-tuning answered less than `full_at_least`.
    """
    base = pretrained.load(device=job.device)
    facts = read_facts()
    learned = _lessons([(question, fact.answer) for fact in facts for question in fact.training], base)
    unseen = _lessons([(question, fact.answer) for fact in facts for question in fact.paraphrases], base)
    shares: dict[Method, list[float]] = {"LoRA": [], "full fine-tuning": []}
    done = 0

    def follow(_: StepReport) -> None:
        nonlocal done
        done += 1
        job.report(done, len(shares) * len(seeds) * steps)

    for seed in seeds:
        for method, highest in (("LoRA", rate), ("full fine-tuning", full_rate)):
            options = TrainerOptions(learning_rate=highest, batch_size=batch_size, weight_decay=0.0, seed=seed)
            torch.manual_seed(seed)
            model = methods.prepare(llama.from_transformers(base.model), method, rank, alpha, ["*_proj"])
            trainer = methods.make_trainer(
                model, method, learned, options, on_step=follow, cancelled=lambda: job.cancelled
            )
            trainer.train_steps(steps)
            if trainer.step < steps:
                raise JobCancelledError("Cancelled.")
            shares[method].append(100 * statistics.fmean(answered_rightly(model, unseen)))
    return _ratio(shares["LoRA"], shares["full fine-tuning"], full_at_least)


def _ratio(adapted: list[float], full: list[float], full_at_least: float) -> Figure:
    """The ratios of two lists of shares, in per cent."""
    if min(full) < full_at_least:
        raise WorkbenchError(
            f"Full fine-tuning answered only {min(full):.1f} % of the paraphrases rightly with one of the seeds: with "
            f"less than {full_at_least:g} % it is no measure for LoRA."
        )
    ratios = [100 * one / other for one, other in zip(adapted, full, strict=True)]
    note = (
        f"LoRA answers {statistics.fmean(adapted):.1f} % of the paraphrases rightly, full fine-tuning "
        f"{statistics.fmean(full):.1f} %, means of {len(ratios)} seeds; the lowest ratio is {min(ratios):.1f} %."
    )
    return Figure.of_runs(ratios, "seeds", note)


def _lessons(pairs: list[tuple[str, str]], base: Pretrained) -> Lessons:
    return Lessons(pairs, base.tokenizer, base.max_tokens)
