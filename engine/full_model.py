"""Every technique together: a decoder whose layers are quantized, adapted and routed as its configuration says.

    config = ModelConfig(d_model=256, num_layers=4, num_heads=8, use_lora=True, use_quantization=True,
                         use_flashattention=True, use_moe=True, num_experts=4)
    model = create_optimized_model(config)              # a fresh one
    model = optimize(read_pretrained(), config, "adapters")  # or one that knows something already

The parts are those of the rest of the engine; what is here is their order, and who learns.

Legend: L layers, D model width, R rank, E experts, K chosen per token.
"""

from __future__ import annotations

from typing import get_args

from torch import nn

from engine.architecture import ATTENTION, FEED_FORWARD, ModelConfig
from engine.errors import InputError
from engine.flash.attention import FlashAttention, StandardAttention
from engine.full_model_cost import Learning
from engine.lora.injection import inject_lora, lora_parameters
from engine.lora.linear import LoRALinear
from engine.model import Decoder
from engine.moe.injection import inject_moe_lora, moe_lora_layers
from engine.moe.lora import MoELoRALinear
from engine.quantization.production import quantize_model_4bit


def create_optimized_model(config: ModelConfig) -> Decoder:
    """A fresh decoder with what `config` turns on, on the CPU.

    As it has learned nothing yet, all of it learns but the matrices that are adapted or in 4 bits: embeddings, norms,
    adapters and routers always do. With the same seed every combination starts from the same matrices, and gives the
    same logits at first; 4 bits alone change them.

    Args:
        config: shape and techniques; see `optimize` for what each of them does.

    Returns:
        ids (B, T) on any device → logits (B, T, vocab_size).
    """
    return optimize(Decoder(config), config, "everything")


def optimize(model: Decoder, config: ModelConfig, learning: Learning = "adapters") -> Decoder:
    """Put the techniques that `config` turns on onto `model`, in place.

    - `use_quantization`: the layers' matrices become NF4 with double quantization (`quantize_model_4bit`) and are
      frozen. Embeddings, head and norms keep their precision, as in QLoRA.
    - `use_lora`: an adapter (`inject_lora`) on each of the layers' matrices, which is frozen.
    - `use_moe`: on the feed-forward network's matrices a mixture of adapters (`inject_moe_lora`) in place of one, and
      only there: attention is common to all tokens, as in MixLoRA. Its selection bias balances tokens, since all texts
      are of one kind here.
    - `use_flashattention`: `FlashAttention`; `StandardAttention`, which holds all weights, otherwise.

    Args:
        model: a plain decoder, fresh or with weights that know something.
        config: of which the techniques are read; the shape stays `model`'s.
        learning: "everything" that is neither adapted nor quantized, as for a fresh model; or the "adapters" alone, if
            there are any, as for one that knows something already.

    Returns:
        `model`, whose `config` now says what is on.

    Raises:
        InputError: the model is adapted or quantized already, a rank is too large for it, or another `learning`.

    Source: Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314; Li et al. 2024, MixLoRA,
    https://arxiv.org/abs/2404.15159.
    """
    if learning not in get_args(Learning):
        raise InputError(f"What learns is {learning!r}: choose {' or '.join(get_args(Learning))}.")
    techniques = ("use_lora", "lora_rank", "use_quantization", "use_flashattention", "use_moe", "num_experts", "top_k")
    config = model.config.changed(**{name: getattr(config, name) for name in techniques})
    _check_plain(model)
    attention = FlashAttention if config.use_flashattention else StandardAttention
    for block in model.layers:
        block.attention = attention(config.head_dim, causal=True)
    if config.use_quantization:
        model.layers = quantize_model_4bit(model.layers)
    if config.use_moe:
        inject_moe_lora(model, config.num_experts, config.lora_rank, config.top_k, FEED_FORWARD, balance="tokens")
    if config.use_lora:
        inject_lora(model, config.lora_rank, targets=ATTENTION if config.use_moe else (*ATTENTION, *FEED_FORWARD))
    model.config = config
    _choose_who_learns(model, learning)
    return model


def production_config() -> ModelConfig:
    """All techniques at a size of use: 12 layers, 1024 wide, 32000 words, 2048 tokens, 8 experts of which 2 are taken.

    On one GPU it reads 512 tokens in less than 100 ms, and a step of training on (2, 1024) stays below 8 GB.
    """
    return ModelConfig(
        d_model=1024,
        num_layers=12,
        num_heads=16,
        vocab_size=32000,
        max_seq_len=2048,
        use_lora=True,
        lora_rank=16,
        use_quantization=True,
        use_flashattention=True,
        use_moe=True,
        num_experts=8,
        top_k=2,
    )


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | MoELoRALinear):
            raise InputError(f"{name} has an adapter already: give a plain model.")
        if hasattr(getattr(module, "weight", None), "quant_state"):
            raise InputError(f"{name} is in 4 bits already: give a plain model.")


def _choose_who_learns(model: nn.Module, learning: Learning) -> None:
    adapters = {id(parameter) for parameter in lora_parameters(model)}
    adapters |= {id(parameter) for layer in moe_lora_layers(model).values() for parameter in layer.parameters()}
    adapted = [module.base for module in model.modules() if isinstance(module, LoRALinear | MoELoRALinear)]
    bases = {id(parameter) for base in adapted for parameter in base.parameters()}
    for parameter in model.parameters():
        spared = learning == "adapters" and adapters
        free = parameter.is_floating_point() and id(parameter) not in bases and not spared
        parameter.requires_grad_(free or id(parameter) in adapters)
