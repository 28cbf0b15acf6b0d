"""What the experiments of the full-model lab share: the switches, the sizes, and the model that they make.

Needs no torch.

Legend: L layers, D model width, H heads, R rank, E experts, K chosen per token, B batch, T tokens of a text.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.architecture import ModelConfig
from engine.errors import InputError
from engine.experiments import ExperimentParams, _lora, _router

Beginning = Literal["fresh", "storyteller"]
"""A model that has learned nothing yet, in the sizes that are set, or our own pretrained one, in its own."""

SWITCHES = {
    "lora": "LoRA",
    "quantization": "4-bit base",
    "flash": "FlashAttention",
    "moe": "MoE-LoRA",
}
"""Names of the switches and of what they turn on, in the order of every table."""

VOCAB_SIZE, MAX_LENGTH = 512, 256


class SwitchParams(ExperimentParams):
    """A model, and what of the techniques is on it."""

    lora: bool = Field(True, title="LoRA", description="Adapters of low rank learn; the matrices beside them do not.")
    quantization: bool = Field(
        True,
        title="4-bit base",
        description="The layers' matrices are frozen in 4 bits (NF4, double quantization). Without adapters "
        "only embeddings and norms learn then.",
    )
    flash: bool = Field(
        True, title="FlashAttention", description="Attention in tiles, without the matrix of its weights."
    )
    moe: bool = Field(
        True, title="MoE-LoRA", description="Mixtures of adapters on the feed-forward networks, in place of one."
    )
    begin: Beginning = Field(
        "fresh",
        title="Model",
        description="fresh: random weights in the sizes below. storyteller: our own pretrained one, 5.8 M parameters.",
    )
    d_model: int = Field(
        128,
        ge=32,
        le=512,
        title="Width",
        description="Numbers that stand for a token between the layers.",
        json_schema_extra={"step": 32},
    )
    num_layers: int = Field(2, ge=1, le=12, title="Depth", description="Layers of the model.")
    num_heads: int = Field(4, ge=1, le=16, title="Heads", description="Attention heads of a layer; divides the width.")
    rank: int = Field(8, ge=1, le=64, title="Rank", description="Of every adapter, those of experts included.")
    experts: int = Field(4, ge=1, le=16, title="Experts", description="Adapters of one mixture.")
    top_k: int = Field(2, ge=1, le=16, title="Experts a token (K)", description="How many of them adapt each token.")
    batch_size: int = Field(8, ge=1, le=64, title="Batch", description="Texts a step.")
    length: int = Field(
        128, ge=16, le=MAX_LENGTH, title="Length", description="Tokens of a text.", json_schema_extra={"step": 16}
    )
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of the first weights and of the samples' order.")

    @model_validator(mode="after")
    def _check_sizes(self) -> SwitchParams:
        if self.begin == "fresh" and self.d_model % self.num_heads:
            raise InputError(f"Heads is {self.num_heads}: it must divide Width, which is {self.d_model}.")
        if self.moe:
            _router.check_top_k(self.top_k, self.experts)
        _ = self.architecture()  # raises a sentence if the numbers do not fit together
        return self

    @property
    def learning(self) -> Literal["everything", "adapters"]:
        """What learns beside the adapters: all of a fresh model, nothing of one that knows something."""
        return "everything" if self.begin == "fresh" else "adapters"

    def architecture(self, **switches: bool) -> ModelConfig:
        """Shape and techniques of the model.

        Args:
            switches: names of `SWITCHES` that are to be other than they are set.
        """
        on = {name: getattr(self, name) for name in SWITCHES} | switches
        techniques = {
            "use_lora": on["lora"],
            "use_quantization": on["quantization"],
            "use_flashattention": on["flash"],
            "use_moe": on["moe"],
            "lora_rank": self.rank,
            "num_experts": self.experts,
            "top_k": min(self.top_k, self.experts),
        }
        if self.begin == "storyteller":
            return _lora.shape_of("storyteller").config.changed(**techniques)
        return ModelConfig(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            vocab_size=VOCAB_SIZE,
            max_seq_len=MAX_LENGTH,
            **techniques,
        )
