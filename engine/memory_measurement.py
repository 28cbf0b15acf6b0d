"""A plan of `engine.memory_budget` carried out: the model is built, takes steps, and is weighed meanwhile.

    model, optimizer = build(plan, "cuda")
    measure_step(plan, model, optimizer, "cuda").peak  # bytes

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.lora.injection import inject_lora
from engine.measure import peak_memory
from engine.model import Decoder
from engine.quantization.production import get_model_memory_mb, quantize_model_4bit, quantize_model_8bit
from engine.trainer import summed_loss
from engine.training_plan import Plan

_WARMUP = 2  # steps; the first makes the optimizer's state
_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class MeasuredStep:
    """What a training step held, in bytes.

    Args:
        peak: at most, with all that it begins with.
        model: weights, scales and adapters.
        optimizer: state on the device.
        paged: state that may leave it.
        gradients: after the backward pass.
        saved: what the forward pass left for the backward pass; None where that cannot be told from the rest.
        loss: in nats a token, to see that something was computed.
    """

    peak: int
    model: int
    optimizer: int
    paged: int
    gradients: int
    saved: int | None
    loss: float


def build(plan: Plan, device: str, seed: int = 0) -> tuple[Decoder, torch.optim.Optimizer]:
    """A random model of the plan's shape, ready to train, and the optimizer of what is trained.

    It takes `engine.memory_budget.building_bytes`.

    Args:
        plan: to train by.
        device: torch device.
        seed: of the weights.

    Raises:
        torch.cuda.OutOfMemoryError: the model does not fit.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if plan.width == 4 else torch.bfloat16)
    try:
        with torch.device("meta" if plan.is_quantized else device):
            model = Decoder(plan.config).train()
    finally:
        torch.set_default_dtype(before)
    if plan.is_quantized:
        _fill_in_few_bits(plan, model, device)
    if plan.method == "LoRA":
        inject_lora(model, plan.rank, targets=plan.targets, adapter_dtype=torch.float32)
    model.gradient_checkpointing = plan.checkpointing
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, _optimizer(plan, trained)


def measure_step(plan: Plan, model: Decoder, optimizer: torch.optim.Optimizer, device: str) -> MeasuredStep:
    """Take a few steps on random tokens of the plan's batch and length, and weigh the last two.

    Args:
        plan: as it was for `build`; batch and length may be others.
        model, optimizer: from `build`.
        device: where they are.

    Raises:
        torch.cuda.OutOfMemoryError: a step does not fit.
    """
    ids = torch.randint(plan.config.vocab_size, (plan.batch, plan.length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss_of() -> Tensor:
        return summed_loss(model, inputs, targets) / plan.tokens

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    try:
        for _ in range(_WARMUP):
            loss = step().item()
        on_card, paged = _state_bytes(optimizer)
        weights = round(1e6 * get_model_memory_mb(model))
        on_cuda = torch.device(device).type == "cuda"
        peak = (torch.cuda.memory_allocated(device) if on_cuda else weights + on_card) + peak_memory(step, device)
        saved, kept = _saved_bytes(plan, model, loss_of, device)
        kept.backward()
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    finally:
        optimizer.zero_grad()
    return MeasuredStep(peak, weights, on_card, paged, gradients, saved, loss)


def _fill_in_few_bits(plan: Plan, model: Decoder, device: str) -> None:
    """Give a model without memory its weights, block by block, each quantized before the next one is made."""

    def quantized(part: nn.Module) -> nn.Module:
        part.to_empty(device=device)
        model.reset_parameters()  # on the meta device it draws nothing: of all the model this part alone has memory
        four_bit = plan.weights != "int8"
        return quantize_model_4bit(part, "nf4", plan.weights != "nf4") if four_bit else quantize_model_8bit(part)

    parts = [f"layers.{index}" for index in range(plan.config.num_layers)] + ["lm_head"] * plan.head_is_quantized
    finished = {}
    for name in parts:
        finished[name] = quantized(model.get_submodule(name))
        model.set_submodule(name, nn.Identity())
    model.to_empty(device=device)
    if plan.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.reset_parameters()
    for name, part in finished.items():
        model.set_submodule(name, part)


def _optimizer(plan: Plan, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if plan.optimizer == "AdamW":
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)
    from bitsandbytes import optim

    kinds = {"AdamW 8-bit": optim.AdamW8bit, "paged AdamW": optim.PagedAdamW, "paged AdamW 8-bit": optim.PagedAdamW8bit}
    return kinds[plan.optimizer](trained, lr=_LEARNING_RATE)


def _saved_bytes(plan: Plan, model: nn.Module, loss_of: Callable[[], Tensor], device: str) -> tuple[int | None, Tensor]:
    """What is held after the forward pass and was not before, and the loss that holds it.

    CUDA's allocator knows. On the CPU the tensors that autograd saves are counted, each piece of memory once and
    without the parameters; checkpointing and bitsandbytes' int8 layers hide their own from that.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        loss = loss_of()
        return torch.cuda.memory_allocated(device) - before, loss
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            found[place] = tensor  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()
    counted = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    hidden = plan.checkpointing or plan.weights == "int8"
    return None if hidden else counted, loss


def _state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of an optimizer's state on the device, and of what is paged; tensors that several share count once."""
    tensors = {id(value): value for state in optimizer.state.values() for value in _tensors(state.values())}
    paged = sum(tensor.nbytes for tensor in tensors.values() if getattr(tensor, "is_paged", False))
    return sum(tensor.nbytes for tensor in tensors.values()) - paged, paged


def _tensors(values: Iterable[object]) -> Iterable[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
