"""How a model with any of the techniques on it learns, what it says meanwhile, and which experts its tokens go to.

Legend: B batch, T tokens of a text, N mixtures, E experts, d head width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from engine import llama, pretrained
from engine.data import TokenBlocks
from engine.errors import InputError
from engine.experiments._full_model_runs import RunParams, read_text
from engine.flash.attention import FlashAttention
from engine.full_model import create_optimized_model, optimize
from engine.generation import GREEDY, generate
from engine.model import Decoder, evaluating
from engine.moe.injection import moe_lora_layers
from engine.moe.observation import observing
from engine.pretraining.mixture import RepetitionMixture
from engine.pretraining.run import TELLING
from engine.trainer import DivergedError, StepReport, Trainer, TrainerOptions, evaluate

Done = TypeVar("Done")

SAMPLE_TOKENS = 40
_TESTED = 16
"""Blocks at most, evenly spread over the text that is held out: a checkup takes less than two steps."""


class Ground:
    """What runs that are compared have in common: the text, the batches, the start and what they are tested on.

    Args:
        params: of the runs.
        device: where they learn.

    Raises:
        InputError: the text is too short.
    """

    def __init__(self, params: RunParams, device: str) -> None:
        self.params, self.device = params, device
        self.corpus = read_text(params)
        self._published = pretrained.load("storyteller").model if params.begin == "storyteller" else None
        self._dataset = RepetitionMixture(
            self.corpus.learned.to(device),
            params.architecture().vocab_size,
            params.length,
            random_share=0.0,
            passage_share=0.0,
            min_period=1,
        )
        blocks = self.corpus.tested.unfold(0, params.length + 1, params.length)
        places = torch.linspace(0, len(blocks) - 1, min(_TESTED, len(blocks))).long()
        self.held_out = TokenBlocks(blocks[places].to(device))

    @property
    def batch_size(self) -> int:
        """B, fewer if the text has no more samples."""
        return min(self.params.batch_size, len(self._dataset))

    def build(self, seed: int, **switches: bool) -> Decoder:
        """A model at the start, with the switches as they are set but for `switches`.

        With one seed all of them start from the same weights.
        """
        torch.manual_seed(seed)
        config = self.params.architecture(**switches)
        if self._published is None:
            return create_optimized_model(config).to(self.device)
        return optimize(llama.from_transformers(self._published), config, "adapters").to(self.device)

    def trainer(
        self,
        model: Decoder,
        seed: int,
        *,
        rate: float,
        on_step: Callable[[StepReport], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Trainer:
        """What teaches `model`; with one seed all models read the same batches."""
        options = TrainerOptions(learning_rate=rate, batch_size=self.batch_size, seed=seed)
        return Trainer(model, self._dataset, options, held_out=self.held_out, on_step=on_step, cancelled=cancelled)

    def loss(self, model: Decoder) -> float:
        """Of the text that is never learned, in nats a token."""
        return evaluate(model, self.held_out, self.batch_size)

    def loads(self, model: Decoder) -> np.ndarray:
        """(N, E), the tokens that each expert gets over its fair share, on the text that is never learned."""
        if not moe_lora_layers(model):
            return np.zeros((0, 0))
        counts: dict[str, torch.Tensor] = {}
        for indices in torch.arange(len(self.held_out)).split(self.batch_size):
            with evaluating(model), observing(model) as seen:
                model.hidden(self.held_out.batch(indices).inputs)
            for name, routing in seen:
                counts[name] = counts.get(name, 0) + routing.wanted.double().cpu()
        table = torch.stack(list(counts.values()))  # (N, E)
        return (table / table.mean(1, keepdim=True)).numpy()

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that leaves no room for what is to follow.

        Raises:
            InputError: it does not fit the model's context.
        """
        tokens = len(self._ids(prompt))
        room = self.params.architecture().max_seq_len - SAMPLE_TOKENS
        if not 1 <= tokens <= room:
            raise InputError(
                f"The prompt has {tokens} tokens and {SAMPLE_TOKENS} are to follow: give 1 to {room}, so shorten it."
            )

    def speak(self, model: Decoder, prompt: str) -> str:
        """How the model goes on after `prompt`: with the same dice each time, or the likeliest word if it knows facts.

        Stories are drawn, since a small model's likeliest words go round in circles; of facts the likeliest is asked.
        """
        said = generate(
            model,
            torch.tensor([self._ids(prompt)], device=self.device),
            SAMPLE_TOKENS,
            TELLING if self._published is None else GREEDY,
            end_token=self.corpus.tokenizer.eos_token_id,
            generator=torch.Generator().manual_seed(0),
        )
        return self.corpus.tokenizer.decode(said[0].tolist(), skip_special_tokens=True)

    def settle_attention(self) -> None:
        """Have `FlashAttention` find its fastest kernel now for what the steps will ask for.

        It measures after some calls of a kind, which takes seconds and would fall into a step that is timed.
        """
        config = self.params.architecture()
        settle_attention(self.device, self.batch_size, self.params.length, config.num_heads, config.num_kv_heads,
                         config.head_dim, grad=True)  # fmt: skip

    def _ids(self, prompt: str) -> list[int]:
        return self.corpus.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids


def settle_attention(device: str, batch: int, length: int, heads: int, groups: int, width: int, *, grad: bool) -> None:
    """Have `FlashAttention` choose for causal attention of this kind, if it has not, instead of after some calls.

    Args:
        device: torch device.
        batch, length: B and T.
        heads, groups: of queries, and of keys and values.
        width: d.
        grad: whether gradients will be asked for.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((batch, count, length, width) for count in (heads, groups, groups))
    tensors = [torch.randn(shape, device=device, generator=generator, requires_grad=grad) for shape in shapes]
    with torch.set_grad_enabled(grad):
        FlashAttention(width, causal=True, calls_before_measuring=0)(*tensors)


def persevere(trainer: Trainer, go: Callable[[], Done]) -> Done:
    """What `go` returns, which has `trainer` take steps.

    Raises:
        DivergedError: as `Trainer.train_steps`, or a router was given numbers that are not finite.
    """
    try:
        return go()
    except InputError as error:
        total = trainer.total_steps
        step = min(trainer.step + 1, total)  # after the last one the model is examined once more
        raise DivergedError(f"Training diverged at step {step} of {total}. {error}", step) from error
