"""What a training step is predicted to keep and to hold, against the step that is taken."""

import dataclasses
import gc
import weakref

import pytest
import torch

from engine import ModelConfig, optimize
from engine.full_model_cost import Model, parameters
from engine.full_model_memory import PARTS, Step, optimizer_bytes, step_memory
from engine.measure import exclusive
from engine.model import Decoder
from engine.trainer import summed_loss
from tests.unit.test_full_model_cost import SHAPES, every_combination, named

pytestmark = pytest.mark.usefixtures("no_kernel_is_chosen")

BATCH, LENGTH = 2, 24


def build(config, learning):
    torch.manual_seed(0)
    return optimize(Decoder(config), config, learning).train()


def saved_bytes(model, ids):
    """What the graph of a forward pass holds at its end, each piece of memory once, without parameters and ids."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own.add(ids.untyped_storage().data_ptr())
    alive = weakref.WeakSet()

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def keep(tensor):
        held = Held(tensor)
        alive.add(held)
        return held

    with exclusive("cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        loss = summed_loss(model, ids, ids) / ids.numel()
    gc.collect()
    found = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in alive}
    loss.backward()
    return sum(size for place, size in found.items() if place not in own)


@pytest.mark.parametrize(("shape", "learning"), [(0, "everything"), (2, "adapters")])
@every_combination
def test_what_a_forward_pass_keeps_is_counted_tensor_by_tensor(switches, shape, learning):
    """Of a mixture all but two tables of its router, which autograd holds only because it is watched here."""
    config = ModelConfig(**SHAPES[shape] | switches)
    model, ids = build(config, learning), torch.randint(config.vocab_size, (BATCH, LENGTH))
    found = saved_bytes(model, ids)
    predicted = step_memory(Step(Model(config, learning), BATCH, LENGTH)).saved + 4  # and the sum of the loss
    table = 4 * ids.numel() * config.num_experts + 8 * config.num_experts
    watched = 3 * config.num_layers * 2 * table if switches["use_moe"] else 0
    assert found - watched <= predicted <= found


@pytest.mark.parametrize(("shape", "learning"), [(0, "everything"), (2, "adapters"), (3, "everything")])
@every_combination
def test_the_optimizers_state_is_counted_to_the_byte(switches, shape, learning):
    config = ModelConfig(**SHAPES[shape] | switches)
    model = build(config, learning)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    state = sum(value.nbytes for values in optimizer.state.values() for value in values.values())
    assert optimizer_bytes(Model(config, learning)) == state


@every_combination
def test_every_moment_holds_the_model_and_the_peak_is_the_largest(switches):
    model = Model(ModelConfig(**SHAPES[0] | switches))
    made = step_memory(Step(model, BATCH, LENGTH))
    assert made.peak.total == max(moment.total for moment in made.moments)
    learning = sum(count.learning for count in parameters(model).values())
    assert made.moments[-1].parts["gradients"] == 4 * learning
    for moment in made.moments:
        assert set(moment.parts) <= set(PARTS)
        assert ("scales" in moment.parts) == switches["use_quantization"]
        assert ("routers" in moment.parts) == switches["use_moe"]
        assert ("adapters" in moment.parts) == (switches["use_lora"] or switches["use_moe"])


@every_combination
def test_more_tokens_hold_more_and_no_moment_less(switches):
    step = Step(Model(ModelConfig(**SHAPES[2] | switches)), BATCH, LENGTH)
    for longer in (dataclasses.replace(step, batch=2 * BATCH), dataclasses.replace(step, length=2 * LENGTH)):
        pairs = zip(step_memory(step).moments, step_memory(longer).moments, strict=True)
        assert all(before.total <= after.total for before, after in pairs), named(switches)


def test_on_a_gpu_norms_keep_less_and_flashattention_more():
    for flash in (False, True):
        config = ModelConfig(**SHAPES[0], use_flashattention=flash)
        on_cpu, on_cuda = (step_memory(Step(Model(config), BATCH, LENGTH, on_cuda)).saved for on_cuda in (False, True))
        norms = 4 * BATCH * LENGTH * config.d_model * (2 * config.num_layers + 1)
        copies = 4 * BATCH * LENGTH * 2 * config.d_model * config.num_layers  # of four tensors, in half as many bytes
        assert on_cpu - on_cuda == norms - flash * copies
