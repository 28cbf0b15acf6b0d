"""Mixtures of adapters for the linear layers of a whole model, and what is done with all of them at once.

inject_moe_lora(model, num_experts=4, rank=8, targets=["q_proj", "v_proj"])
with without_expert(model, 2):
    loss = …  # of the model with one expert switched off
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.errors import InputError
from engine.lora.injection import PROJECTIONS, Targets, select_linear_layers, uncompiled_name
from engine.lora.layer import check_rank
from engine.lora.linear import own_dtype
from engine.moe.cost import Form
from engine.moe.kinds import Kind, Unit
from engine.moe.lora import MoELoRALayer, MoELoRALinear


def inject_moe_lora(
    model: nn.Module,
    num_experts: int,
    rank: int,
    top_k: int = 1,
    targets: Targets = PROJECTIONS,
    *,
    alpha: float | None = None,
    shared_a: bool = False,
    kind: Kind = "sigmoid",
    bias_rate: float = 0.02,
    temperature: float = 32.0,
    balance: Unit = "texts",
    form: Form | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> dict[str, MoELoRALinear]:
    """Put a mixture of adapters on every linear layer whose name matches, and freeze everything else, in place.

    The model gives what it gave before, until the adapters learn. A layer that several names lead to gets one mixture.
    Routers are kept in float32 (Switch, section 2.4). Either all layers are adapted or, after an error, none.

    Args:
        model: ours, or one of transformers': anything with `nn.Linear` layers.
        num_experts: E of each layer.
        rank: R of each expert.
        top_k: K.
        targets: which layers, as `engine.inject_lora`'s.
        alpha: α, R when left out.
        shared_a: one A for all experts of a layer.
        kind: of routing.
        bias_rate: first step of the selection bias.
        temperature: of the routers' logits.
        balance: what it balances, "texts" or "tokens".
        form: how the products are computed; the cheaper one when left out.
        adapter_dtype: of A and B; each layer's own when left out.

    Returns:
        The adapted layers by the names of those that they took the place of, in a model that is not compiled.

    Raises:
        InputError: nothing matches, a layer cannot be adapted, the model has such adapters, or a value is out of range.
    """
    if moe_lora_layers(model):
        raise InputError("The model has mixtures of adapters already: load it anew to put others on it.")
    chosen = select_linear_layers(model, targets)
    for name, linear in chosen.items():
        check_rank(rank, linear.in_features, linear.out_features, name)
    mixtures: dict[int, MoELoRALayer] = {}
    for linear in chosen.values():
        if id(linear) not in mixtures:
            mixture = MoELoRALayer(
                linear.in_features, linear.out_features, num_experts, rank, top_k, alpha=alpha, shared_a=shared_a,
                kind=kind, bias_rate=bias_rate, temperature=temperature, balance=balance, form=form,
            )  # fmt: skip
            mixture.to(linear.weight.device, adapter_dtype or own_dtype(linear)).router.float()
            mixtures[id(linear)] = mixture
    model.requires_grad_(False)
    adapted = {id(linear): linear for linear in chosen.values()}
    adapted = {key: MoELoRALinear(linear, mixtures[key]) for key, linear in adapted.items()}
    for name, linear in chosen.items():
        model.set_submodule(name, adapted[id(linear)])
    return {uncompiled_name(name): adapted[id(linear)] for name, linear in chosen.items()}


def moe_lora_layers(model: nn.Module) -> dict[str, MoELoRALayer]:
    """The mixtures of adapters in `model` by name, each once; names are those before it was compiled."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELoRALayer)}
    return {uncompiled_name(name).removesuffix(".layer"): layer for name, layer in layers.items()}


@contextmanager
def without_expert(model: nn.Module, index: int) -> Iterator[None]:
    """With expert `index` of every layer switched off: its gate is 0, the others' gates stay as they are.

    Nothing is divided anew, so that what is missing is what this expert gave, and nothing else changes.

    Raises:
        InputError: a layer has no such expert, or there are none.
    """
    layers = moe_lora_layers(model)
    most = min((layer.num_experts for layer in layers.values()), default=0)
    if not 0 <= index < most:
        raise InputError(f"There is no expert {index} to switch off: the model has {most} in each layer, from 0 up.")
    before = {layer: layer.silenced for layer in layers.values()}
    for layer in before:
        layer.silenced = index
    try:
        yield
    finally:
        for layer, silenced in before.items():
            layer.silenced = silenced
