"""What is to be trained, how, and on how many tokens at once: what `engine.memory_budget` counts the memory of.

Needs no torch.

Legend: N tokens, T tokens of one text, I inputs, O outputs, R rank, w bytes of a number that is computed with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from engine.architecture import ATTENTION, FEED_FORWARD, ModelConfig
from engine.errors import InputError

Method = Literal["full fine-tuning", "LoRA", "generation"]
Weights = Literal["float32", "bfloat16", "int8", "nf4", "nf4, double quantized"]
Optimizer = Literal["AdamW", "AdamW 8-bit", "paged AdamW", "paged AdamW 8-bit"]
ALL_PROJECTIONS = (*ATTENTION, *FEED_FORWARD)


@dataclass(frozen=True)
class Plan:
    """What is trained, how, and on how many tokens at once.

    Args:
        config: the model's shape.
        method: train all weights, or adapters beside frozen ones; or generate, which trains nothing.
        weights: the format of the (frozen) matrices. All but float32 compute in bfloat16.
        rank: R of the adapters.
        targets: names of the projections that are adapted.
        batch: texts at once.
        length: T, tokens of a text.
        optimizer: PyTorch's fused AdamW, whose state has the trained numbers' dtype, or bitsandbytes': in 8 bits with
            a float32 scale for 256 numbers, or paged, whose state of large tensors may leave the card.
        checkpointing: keep only the blocks' inputs and compute each block again in the backward pass.
        on_cuda: else the CPU, whose RMSNorm is not fused and keeps more, and which needs no workspace.
        quantizes_head: whether a head of its own is in the format of the other matrices. QLoRA and LLM.int8 leave it
            in 16 bits; a tied head is the embedding, which is never quantized.

    Raises:
        InputError: a name that does not exist, a number below 1, no matrix to adapt, or all weights to be trained in a
            format that cannot be.
    """

    config: ModelConfig
    method: Method = "LoRA"
    weights: Weights = "bfloat16"
    rank: int = 16
    targets: tuple[str, ...] = ALL_PROJECTIONS
    batch: int = 1
    length: int = 1024
    optimizer: Optimizer = "AdamW"
    checkpointing: bool = False
    on_cuda: bool = True
    quantizes_head: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("method", Method), ("weights", Weights), ("optimizer", Optimizer)):
            if (given := getattr(self, name)) not in get_args(choices):
                raise InputError(f"{name} is {given!r}: choose one of {', '.join(get_args(choices))}.")
        for name in ("batch", "length", "rank"):
            if (given := getattr(self, name)) < 1:
                raise InputError(f"{name} is {given}: give 1 or more.")
        if not set(self.targets) <= set(ALL_PROJECTIONS) or (self.method == "LoRA" and not self.targets):
            raise InputError(f"targets are {self.targets}: choose one or more of {', '.join(ALL_PROJECTIONS)}.")
        if self.method == "full fine-tuning" and self.is_quantized:
            raise InputError(
                f"Weights in {self.weights} cannot be trained, only adapters beside them: choose float32 or bfloat16."
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the matrices are in fewer bits than they are computed with."""
        return self.weights not in ("float32", "bfloat16")

    @property
    def head_is_quantized(self) -> bool:
        """Whether the head is, too."""
        return self.is_quantized and self.quantizes_head and not self.config.tie_embeddings

    @property
    def tokens(self) -> int:
        """N."""
        return self.batch * self.length

    @property
    def width(self) -> int:
        """w, bytes of an activation."""
        return 4 if self.weights == "float32" else 2

    @property
    def trains_everything(self) -> bool:
        """Whether every weight is trained."""
        return self.method == "full fine-tuning"

    def adapted(self) -> dict[str, tuple[int, int]]:
        """(I, O) of those of a block's matrices that have an adapter, by name."""
        chosen = self.targets if self.method == "LoRA" else ()
        return {name: sides for name, sides in self.config.projections.items() if name in chosen}

    def matrices(self) -> Counter[int]:
        """Of the matrices that are in the chosen format, every block's and a quantized head: how many of which size."""
        config = self.config
        sizes = Counter(inputs * outputs for inputs, outputs in self.config.projections.values())
        of_blocks = Counter({size: config.num_layers * count for size, count in sizes.items()})
        return of_blocks + Counter([config.vocab_size * config.d_model] * self.head_is_quantized)

    def trained(self) -> Counter[int]:
        """Of the tensors that are trained: how many of which size."""
        config = self.config
        if self.trains_everything:
            norms = Counter({config.d_model: 2 * config.num_layers + 1})
            embeddings = Counter({config.vocab_size * config.d_model: 1 if config.tie_embeddings else 2})
            return self.matrices() + embeddings + norms
        sizes = Counter(self.rank * side for sides in self.adapted().values() for side in sides)
        return Counter({size: config.num_layers * count for size, count in sizes.items()})
