"""All that decides what comes out of pretraining, besides the text."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from engine.architecture import ModelConfig
from engine.data import VOCAB_SIZE
from engine.settings import Settings
from engine.trainer import TrainerOptions


class Recipe(Settings):
    """Shape, text and training of a small model.

    Raises:
        InputError: a value is out of bounds.
    """

    model: ModelConfig = Field(
        default_factory=lambda: ModelConfig(
            d_model=256,
            num_layers=6,
            num_heads=8,
            num_kv_heads=4,
            ffn_dim=768,
            vocab_size=VOCAB_SIZE,
            max_seq_len=512,
            dropout=0.2,
        )
    )
    options: TrainerOptions = Field(
        default_factory=lambda: TrainerOptions(
            learning_rate=3e-3,
            weight_decay=0.3,
            batch_size=32,
            precision="bfloat16",
            compile=True,
            warmup=0.03,
            final_rate=0.05,
        )
    )
    steps: int = Field(12000, ge=1, description="Optimizer steps.")
    block_size: int = Field(512, ge=32, description="T, tokens of a training sample.")
    random_share: float = Field(0.1, ge=0, le=1, description="Share of samples that are random tokens, repeated.")
    passage_share: float = Field(0.1, ge=0, le=1, description="Share of samples that are a passage, repeated.")
    min_period: int = Field(8, ge=2, description="Shortest repeated piece in tokens; the longest is T / 2.")
    held_out_share: float = Field(0.012, gt=0, lt=1, description="Share of the stories that is never trained on.")
    evaluate_every: int = Field(100, ge=1, description="Steps between two looks at the held-out loss and the heads.")
    probe_period: int = Field(50, ge=4, description="Longest random sequence that the heads are scored on, in tokens.")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        context, vocabulary = self.model.max_seq_len, self.model.vocab_size
        if self.block_size > context:
            raise ValueError(f"block_size is {self.block_size}: it must be at most max_seq_len, which is {context}.")
        if 2 * self.probe_period > context:
            raise ValueError(
                f"probe_period is {self.probe_period}: twice of it must be at most max_seq_len, which is {context}."
            )
        if self.probe_period > vocabulary:
            raise ValueError(
                f"probe_period is {self.probe_period}: it must be at most vocab_size, which is {vocabulary}."
            )
        return self
