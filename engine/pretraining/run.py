"""From a text to a trained model in a folder."""

from __future__ import annotations

import copy
import importlib.metadata
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine import llama
from engine.data import TokenBlocks, pack, stream, train_tokenizer
from engine.errors import InputError
from engine.generation import Sampling, generate
from engine.head_statistics import induction_score, previous_token_score, probe_periods, repeated_random_tokens
from engine.measure import device_name, versions
from engine.model import Decoder, evaluating
from engine.pretraining.mixture import RepetitionMixture
from engine.pretraining.recipe import Recipe
from engine.pretraining.record import Checkup, HeadScore, Log
from engine.trainer import StepReport, Trainer, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEPARATOR = "<|endofstory|>"
"""Stands on a line of its own between two stories."""

PROMPT = "One day, Lily and Tom went to the"

TELLING = Sampling(temperature=1.0, top_k=40)
"""How stories are drawn. The text was itself sampled cold: a model of it that is cooled again goes round in circles."""

_PROBES = 8


def pretrain(
    recipe: Recipe,
    text: Path,
    out: Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Log:
    """Train a tokenizer and a model on `text` and write them to `out`, with all that is known about the run.

    The weights that are kept are those with the lowest held-out loss: with little text, later ones know it by heart.

    Args:
        recipe: what and how.
        text: stories, separated by lines of `SEPARATOR`; an .xz file is fine.
        out: the folder; gets config.json, model.safetensors, the tokenizer's files, log.json, README.md, heldout.txt.
        device: torch device.
        minutes: training stops after so long, at the earliest after one step; by default after the recipe's last.
        say: takes a line of progress now and then.

    Raises:
        InputError: the text, the device or the time cannot be used, or the recipe does not fit the text.
        DivergedError: training diverged.
    """
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes is {minutes:g}: give more than 0, or leave it out.")
    _check_device(device)
    training, held_out = split_stories(read_stories(text), recipe.held_out_share, recipe.options.seed)
    tokenizer = train_tokenizer(training, recipe.model.vocab_size, recipe.model.max_seq_len)
    tokens = stream(training, tokenizer).to(device)
    blocks = TokenBlocks(pack(held_out, tokenizer, recipe.block_size).ids.to(device))
    log = Log(
        recipe=recipe,
        text=text.name,
        stories={"training": len(training), "held out": len(held_out)},
        tokens={"training": len(tokens), "held out": len(blocks) * blocks.block_size},
        device=device_name(device),
        versions=versions() | {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    )
    say(
        f"{recipe.model.num_parameters / 1e6:.2f} million parameters, {log.tokens['training']:,} tokens on {log.device}"
    )
    torch.manual_seed(recipe.options.seed)
    model = Decoder(recipe.model).to(device)
    _train(model, tokens, blocks, log, minutes, say)
    llama.write(model, tokenizer, out)
    written = llama.read(out).to(device)
    log.final = examine(written, blocks, recipe, log.kept)
    log.sample = tell(written, tokenizer, PROMPT)
    log.write(out)
    (out / "heldout.txt").write_text(f"\n{SEPARATOR}\n".join(held_out) + "\n", encoding="utf-8")
    say(f"{out}: {log.final}\n{log.sample}")
    return log


def read_stories(path: Path) -> list[str]:
    """The stories in a text file, or in an .xz file of one.

    Raises:
        InputError: it cannot be read, or has fewer than two stories.
    """
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"The text {path} cannot be read: give a UTF-8 text file, or an .xz file of one.") from error
    stories = [stripped for story in text.split(SEPARATOR) if (stripped := story.strip())]
    if len(stories) < 2:
        raise InputError(f"{path} has {len(stories)} stories, give 2 or more with a line {SEPARATOR} between them.")
    return stories


def split_stories(stories: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """The stories to train on, and a random `share` of them, at least one, to hold out; both in their order."""
    order = torch.randperm(len(stories), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[: min(max(1, round(share * len(stories))), len(stories) - 1)])
    return (
        [story for index, story in enumerate(stories) if index not in held_out],
        [story for index, story in enumerate(stories) if index in held_out],
    )


def examine(model: Decoder, held_out: TokenBlocks, recipe: Recipe, step: int) -> Checkup:
    """Held-out loss, in float32, and what `model` does on random tokens, said twice, as it is after `step`."""
    induction, previous_token, copied = [], [], []
    for period in probe_periods(recipe.probe_period):
        probe = repeated_random_tokens(recipe.model.vocab_size, period, _PROBES, seed=1)  # (8, 2P)
        maps = model.attention_maps(probe).mean(1)  # (L, H, 2P, 2P)
        induction.append(induction_score(maps, period))
        previous_token.append(previous_token_score(maps))
        with evaluating(model):
            said = model(probe)[:, period:-1].argmax(-1).cpu()  # (8, P − 1)
        copied.append((said == probe[:, period + 1 :]).float().mean())
    return Checkup(
        step=step,
        held_out_loss=evaluate(model, held_out, recipe.options.batch_size),
        induction=_best(torch.stack(induction).mean(0)),
        previous_token=_best(torch.stack(previous_token).mean(0)),
        copied=torch.stack(copied).mean().item(),
    )


def tell(model: Decoder, tokenizer: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int = 120) -> str:
    """What the model makes of `prompt`, drawn as `TELLING` says with a fixed seed."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    told = generate(
        model,
        ids,
        min(max_new_tokens, model.config.max_seq_len - ids.shape[1]),
        TELLING,
        end_token=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(0),
    )
    return tokenizer.decode(told[0].tolist(), skip_special_tokens=True)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {device} cannot be used here: give cpu, or cuda where there is a GPU.") from error


def _train(
    model: Decoder,
    tokens: torch.Tensor,
    held_out: TokenBlocks,
    log: Log,
    minutes: float | None,
    say: Callable[[str], None],
) -> None:
    """Train `model` in place and leave it with its best weights; what happens goes to `log`."""
    recipe, began = log.recipe, time.monotonic()
    deadline = began + (math.inf if minutes is None else 60 * minutes)
    lowest, best = math.inf, model.state_dict()

    def check(step: int) -> None:
        nonlocal lowest, best
        checkup = examine(model, held_out, recipe, step)
        log.checkups.append(checkup)
        if checkup.held_out_loss < lowest:
            lowest, best, log.kept = checkup.held_out_loss, copy.deepcopy(model.state_dict()), step

    def follow(report: StepReport) -> None:
        log.steps.append([float(f"{value:.4g}") for value in (report.loss, report.learning_rate, report.grad_norm)])
        if report.step % recipe.evaluate_every == 0 or report.step == report.total:
            check(report.step)
            say(
                f"step {report.step}/{report.total}  loss {report.loss:.3f}  {log.checkups[-1]}  "
                f"{report.tokens_per_second:,.0f} tokens/s  {time.monotonic() - began:.0f} s"
            )

    trainer = Trainer(
        model,
        RepetitionMixture(
            tokens,
            recipe.model.vocab_size,
            recipe.block_size,
            random_share=recipe.random_share,
            passage_share=recipe.passage_share,
            min_period=recipe.min_period,
        ),
        recipe.options,
        held_out=held_out,
        on_step=follow,
        cancelled=lambda: bool(log.steps) and time.monotonic() > deadline,
    )
    check(0)
    trainer.train_steps(recipe.steps)
    log.stopped_early = trainer.step < recipe.steps
    if log.stopped_early:
        check(trainer.step)
    log.seconds = time.monotonic() - began
    model.load_state_dict(best)


def _best(scores: torch.Tensor) -> HeadScore:
    """The highest of scores (L, H)."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return HeadScore(scores.max().item(), layer, head)
