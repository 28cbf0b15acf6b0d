"""What the experiments of the router lab share: a router on a real model's tokens, its knobs, and words.

Needs no torch at import.

Legend: N tokens, E experts, K chosen for a token, D model width, J sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from engine import catalogue, local_models
from engine.errors import InputError, JobCancelledError
from engine.experiments import ExperimentParams, Lane
from engine.moe.kinds import KINDS, Kind  # noqa: F401 - the page names the kinds

if TYPE_CHECKING:
    from torch import Tensor

    from engine.moe.routing import ExpertRouter, Routing
    from engine.pretrained import Pretrained
    from engine.runtime.jobs import Job

MAX_TOKENS = 256
"""Of all sources together: more rows make a heatmap in which nobody finds a token."""

MAX_EXPERTS = 64
_NAME_LENGTH = 24
_CLUSTER_ROUNDS = 20

DEFAULT_TEXT = """Lily found a small red ball in the park. She gave it to her friend Tom and they played all day.

def add(a, b): return a + b; for i in range(10): total = add(total, i); print(total)

12 + 7 = 19. 30 - 4 = 26. 8 * 5 = 40. 96 / 3 = 32. 41 + 17 = 58. 60 - 25 = 35.

Der kleine Hund lief in den Wald. Dort sah er einen großen Vogel und einen alten Baum."""
"""A story, a program, sums and German: a blank line begins another source."""


class RouterParams(ExperimentParams):
    """A router on the tokens of a text, as a pretrained model sees them. The time limit leaves room for a download."""

    time_limit: ClassVar[float] = 180.0

    text: str = Field(
        DEFAULT_TEXT,
        title="Your text",
        description=f"A blank line begins another source; each is read on its own. Up to {MAX_TOKENS} tokens in all.",
        max_length=20_000,
        json_schema_extra={"widget": "area"},
    )
    model: str = Field(
        catalogue.DEFAULT,
        title="Model",
        description="storyteller (our own, small), smollm2-135m, any Hugging Face id, a local folder with a "
        "config.json, or a .gguf file.",
        max_length=300,
    )
    layer: int = Field(
        3,
        ge=0,
        le=511,
        title="Layer",
        description="The router sees what this layer receives, scaled to unit mean square; 0 is the embedding.",
    )
    experts: int = Field(8, ge=1, le=MAX_EXPERTS, title="Experts", description="Feed-forward networks to choose from.")
    top_k: int = Field(
        2, ge=1, le=MAX_EXPERTS, title="Experts a token (K)", description="How many of them compute each token."
    )
    kind: Kind = Field(
        "softmax",
        title="Routing",
        description="Softmax: tokens take their K most probable. Sigmoid: scores that do not compete. Expert choice: "
        "experts take tokens. Noisy: noise before the choice. Random: the baseline.",
    )
    router: Literal["fresh", "clustered"] = Field(
        "fresh",
        title="Router",
        description="A dense model has none. Fresh: random directions, as before training. Clustered: the directions "
        "of k-means centres of these very tokens.",
    )
    noise: float = Field(
        1.0,
        ge=0,
        le=10,
        title="Noise",
        description="Standard deviation of what noisy routing adds to the logits; other kinds add none.",
        json_schema_extra={"step": 0.1},
    )
    capacity_factor: float | None = Field(
        None,
        ge=0.01,
        le=16,
        title="Capacity factor",
        description="An expert takes at most this many times its fair share and drops the rest. Empty: no limit, and 1 "
        "for expert choice, which needs one.",
        json_schema_extra={"step": 0.05},
    )
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of the router's weights, the noise and the dice.")

    @property
    def lane(self) -> Lane:
        """Short for the models that are on the disk from the start."""
        return "short" if self.model in catalogue.INSTALLED else "long"

    def cache_token(self) -> str:
        """When a local model changed last."""
        return str(local_models.modified(self.model))

    @field_validator("text")
    @classmethod
    def _something_to_read(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("The text is empty: type a few words.")
        return text

    @field_validator("model")
    @classmethod
    def _some_model(cls, model: str) -> str:
        if not model.strip():
            raise ValueError(f"No model is named: {catalogue.DEFAULT} is always there.")
        return model.strip()

    @model_validator(mode="after")
    def _enough_experts(self) -> RouterParams:
        check_top_k(self.top_k, self.experts)
        return self


class BiasedRouterParams(RouterParams):
    """A router, and a bias on one expert."""

    tilted: int = Field(0, ge=0, le=MAX_EXPERTS - 1, title="Biased expert", description="Which expert the bias is on.")
    tilt: float = Field(
        0.0,
        ge=-5,
        le=5,
        title="Selection bias",
        description="Added to this expert's score for the choice alone, as loss-free balancing does; the gates do not "
        "see it.",
        json_schema_extra={"step": 0.05},
    )

    @model_validator(mode="after")
    def _expert_exists(self) -> BiasedRouterParams:
        if self.tilted >= self.experts:
            raise ValueError(
                f"There is no expert {self.tilted} to bias: there are {self.experts}, 0 to {self.experts - 1}."
            )
        return self


def check_top_k(top_k: int, experts: int) -> None:
    """Raise ValueError if a token is to take more experts than there are."""
    if top_k > experts:
        raise ValueError(
            f"Each token is to take {top_k} experts of {experts}: choose at most {experts}, or have more experts."
        )


@dataclass(frozen=True)
class Reading:
    """The tokens of all sources as a layer of the model receives them.

    Args:
        model: that read them.
        tokens: N printable labels.
        token_source: (N,), index of the source of each.
        starts: index of the first token of each source.
        sources: J names, the first words of each.
        norms: (N,), lengths of the hidden states.
        x: (N, D) float32 on the CPU, the hidden states scaled to unit mean square, as a layer's norm would.
    """

    model: Pretrained
    tokens: list[str]
    token_source: np.ndarray
    starts: tuple[int, ...]
    sources: tuple[str, ...]
    norms: np.ndarray
    x: Tensor


def split_sources(text: str) -> list[str]:
    """The parts of `text` between blank lines."""
    return [part.strip("\n") for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def read(params: RouterParams, job: Job) -> Reading:
    """What the chosen layer receives for each token; every source is read on its own.

    Raises:
        InputError: the text is too long, the layer does not exist, or the model cannot be had.
    """
    import torch

    from engine import pretrained, tracing

    model = pretrained.load(params.model, job.device)
    if job.cancelled:
        raise JobCancelledError("The job was cancelled while its model was loaded.")
    if params.layer >= model.num_layers:
        raise InputError(
            f"There is no layer {params.layer}: {model.name} has {model.num_layers} of them, 0 to "
            f"{model.num_layers - 1}."
        )
    sources = split_sources(params.text)
    ids = [model.encode(source) for source in sources]
    lengths = [len(part) for part in ids]
    if sum(lengths) > MAX_TOKENS:
        raise InputError(f"The text has {sum(lengths)} tokens; the lab shows up to {MAX_TOKENS}: shorten it.")
    hidden = torch.cat(
        [tracing.fused_pass(model, part, last_logits=True).hidden_states[params.layer][0] for part in ids]
    )
    hidden = hidden.float().cpu()  # (N, D)
    return Reading(
        model=model,
        tokens=[label for part in ids for label in model.readable(part)],
        token_source=np.repeat(np.arange(len(ids)), lengths),
        starts=tuple(np.cumsum([0, *lengths[:-1]]).tolist()),
        sources=tuple(_name(source) for source in sources),
        norms=hidden.norm(dim=-1).numpy(),
        x=torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6),
    )


def make_router(params: RouterParams, x: Tensor) -> ExpertRouter:
    """The router that the parameters describe, for tokens x (N, D); in training mode, so that noise is noise."""
    import torch

    from engine.moe.routing import ExpertRouter

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        router = ExpertRouter(
            x.shape[-1],
            params.experts,
            params.top_k,
            kind=params.kind,
            noise=params.noise,
            capacity_factor=params.capacity_factor,
        )
        if params.router == "clustered":
            centres = find_centres(x, params.experts)  # (at most E, D)
            with torch.no_grad():
                router.weight[: len(centres)] = centres
    if isinstance(params, BiasedRouterParams):
        router.selection_bias[params.tilted] = params.tilt
    return router.requires_grad_(False)


def route(params: RouterParams, router: ExpertRouter, x: Tensor) -> Routing:
    """What `router` makes of x (N, D); the same parameters give the same noise and the same dice."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(params.seed + 1)
        return router.route(x)


def find_centres(x: Tensor, count: int) -> Tensor:
    """Unit centres of clusters of directions among x (N, D): min(count, N) rows.

    A router has no constant for each expert, so what all tokens share must not count: their mean's direction is
    taken out first, and the centres are orthogonal to it.

    Source: spherical k-means, Dhillon and Modha 2001; start: k-means++, Arthur and Vassilvitskii 2007.
    """
    import torch
    from torch.nn import functional as F

    mean = F.normalize(x.mean(0), dim=0)  # (D,)
    directions = F.normalize(x - (x @ mean)[:, None] * mean, dim=-1)  # (N, D)
    centres = directions[torch.randint(len(x), (1,))]
    while len(centres) < min(count, len(x)):
        distance = (1 - (directions @ centres.T).amax(1)).clamp(min=1e-9)  # (N,)
        centres = torch.cat([centres, directions[torch.multinomial(distance, 1)]])
    for _ in range(_CLUSTER_ROUNDS):
        nearest = F.one_hot((directions @ centres.T).argmax(1), len(centres)).to(x.dtype)  # (N, count)
        sums = nearest.T @ directions
        centres = torch.where(nearest.any(0)[:, None], F.normalize(sums, dim=-1), centres)
    return centres


def _name(source: str) -> str:
    words = " ".join(source.split())
    return words if len(words) <= _NAME_LENGTH else f"{words[: _NAME_LENGTH - 1].rstrip()}…"
