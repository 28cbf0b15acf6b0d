"""What is known about a pretraining run, and how it is written down beside the weights."""

from __future__ import annotations

import datetime
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.pretraining.recipe import Recipe


@dataclass(frozen=True)
class HeadScore:
    """The best head of the model at something: its score from 0 to 1, its layer and its index there."""

    score: float
    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.score:.2f}, layer {self.layer}, head {self.head}"


@dataclass(frozen=True)
class Checkup:
    """How the model was doing at a step.

    Args:
        step: steps done.
        held_out_loss: in nats a token.
        induction, previous_token: the best head of either kind, on random tokens that are said twice.
        copied: share of the tokens of the second round that the model thought the likeliest.
    """

    step: int
    held_out_loss: float
    induction: HeadScore
    previous_token: HeadScore
    copied: float

    def __str__(self) -> str:
        return (
            f"held out {self.held_out_loss:.3f}  induction {self.induction.score:.2f}  "
            f"previous token {self.previous_token.score:.2f}  copied {self.copied:.2f}"
        )


@dataclass
class Log:
    """A run of pretraining.

    Args:
        recipe: what was trained and how.
        text: the name of the file.
        stories: how many there were, by "training" and "held out".
        tokens: likewise.
        device: where it ran.
        versions: of what took part.
        date: when it began, as 2026-01-31.
        steps: one entry a step: [loss in nats a token, learning rate, gradient norm].
        checkups: over training.
        kept: the step whose weights were written.
        final: of these weights as they are in the file.
        sample: what they say to a prompt.
        seconds: of the training, the checkups included.
        stopped_early: whether the time was up before the last step.
    """

    recipe: Recipe
    text: str
    stories: dict[str, int]
    tokens: dict[str, int]
    device: str
    versions: dict[str, str]
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    steps: list[list[float]] = field(default_factory=list)
    checkups: list[Checkup] = field(default_factory=list)
    kept: int = 0
    final: Checkup | None = None
    sample: str = ""
    seconds: float = 0.0
    stopped_early: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Over the whole training."""
        options = self.recipe.options
        per_step = options.batch_size * options.accumulate * self.recipe.block_size
        return len(self.steps) * per_step / self.seconds

    def write(self, folder: Path) -> None:
        """Write log.json and the model card README.md."""
        plain = {**asdict(self), "recipe": self.recipe.model_dump(), "tokens_per_second": self.tokens_per_second}
        (folder / "log.json").write_text(json.dumps(plain, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(self), encoding="utf-8")


def _card(log: Log) -> str:
    rows = "\n".join(f"| {name} | {text} |" for name, text in _facts(log).items())
    quoted = "\n".join(f"> {line}".rstrip() for line in log.sample.splitlines())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# A small storyteller

A decoder of {log.recipe.model.num_parameters / 1e6:.1f} million parameters that tells simple stories in English and
answers at once on a CPU. It was trained to be looked into: its training data makes previous-token heads and induction
heads worth having, and how strong they became is said below.

| | |
| --- | --- |
{rows}

The losses of every step and the scores over training are in `log.json`, the held-out stories in `heldout.txt`.
The stories of both parts were sampled from one model with one kind of prompt, so the held-out loss says how well these
stories are modelled, not how well English is. They were sampled at a low temperature, and the model has learned just
that: draw from it at temperature 1, colder it goes round in circles. With top-k 40 it says:

{quoted}

To train it again: `python -m engine.pretraining --text {log.text} --out FOLDER`.
"""


def _facts(log: Log) -> dict[str, str]:
    recipe, model, options, final = log.recipe, log.recipe.model, log.recipe.options, log.final
    last = [loss for loss, *_ in log.steps[-100:]]
    software = ", ".join(f"{name} {version}" for name, version in log.versions.items())
    return {
        "architecture": (
            f"Llama: {model.num_layers} layers, width {model.d_model}, {model.num_heads} query heads and "
            f"{model.num_kv_heads} key/value heads of width {model.head_dim}, SwiGLU {model.ffn_dim}, RMSNorm, rotary "
            f"embedding (base {model.rope_theta:g}), {'tied' if model.tie_embeddings else 'untied'} head"
        ),
        "vocabulary": f"{model.vocab_size} byte-pair tokens on bytes, made for the same text",
        "context": f"{model.max_seq_len} tokens",
        "data": (
            f"{log.text}: {log.stories['training']:,} stories, {log.tokens['training']:,} tokens; "
            f"{log.stories['held out']:,} more stories were held out"
        ),
        "licence": "Apache-2.0; the stories were written by SmolLM2-135M-Instruct (Apache-2.0)",
        "samples": (
            f"{1 - recipe.random_share - recipe.passage_share:.0%} text, {recipe.passage_share:.0%} passages repeated "
            f"within the sample, {recipe.random_share:.0%} random tokens repeated (their first round is not scored)"
        ),
        "training": (
            f"{len(log.steps)} steps of {options.batch_size * options.accumulate} × {recipe.block_size} tokens, AdamW, "
            f"learning rate {options.learning_rate:g}, weight decay {options.weight_decay:g}, dropout "
            f"{model.dropout:g}, {options.precision}, seed {options.seed}; the weights of step {log.kept}, whose "
            "held-out loss was lowest, were kept"
        ),
        "training loss": f"{statistics.fmean(last):.3f} nats a token, mean of the last {len(last)} steps",
        "held-out loss": (
            f"{final.held_out_loss:.3f} nats a token on {log.tokens['held out']:,} tokens of held-out stories, with "
            "the weights as they are in the file, in float32"
        ),
        "induction score": f"{final.induction}, on up to {recipe.probe_period} random tokens, said twice",
        "previous-token score": f"{final.previous_token}, on the same",
        "device and time": (
            f"{log.device}, {log.date}, {log.seconds / 60:.1f} minutes, {log.tokens_per_second:,.0f} tokens/s"
        ),
        "software": software,
    }
