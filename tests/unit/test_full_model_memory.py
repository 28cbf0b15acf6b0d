"""What a training step is predicted to keep and to hold, against the step that is taken.

What CUDA's functions keep is checked through Triton's interpreter where there is no GPU:
`python -m tests.unit.test_full_model_memory`.
"""

import dataclasses
import gc
import weakref
from unittest.mock import patch

import pytest
import torch

from engine import ModelConfig, optimize
from engine.full_model_cost import Model, parameters
from engine.full_model_memory import PARTS, Step, optimizer_bytes, step_memory
from engine.measure import exclusive, peak_memory
from engine.model import Decoder
from engine.moe.injection import moe_lora_layers
from engine.trainer import summed_loss
from tests.combinations import SWITCHES, every_combination, named
from tests.interpreter import report, run_in_interpreter
from tests.unit.test_full_model_cost import SHAPES

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
    del loss  # until here it has held the graph
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


@pytest.fixture(scope="module")
def interpreted():
    return run_in_interpreter(__name__)


def check_what_a_mixture_keeps_on_cuda(device):
    """Only adapters learn, with standard attention: on CUDA the rest keeps the same then."""
    used = lambda like, num_experts: True  # noqa: E731
    for experts, top_k, rank in ((3, 2, 4), (8, 1, 2), (1, 1, 3)):
        for quantized in (False, True):
            config = ModelConfig(
                d_model=32, num_layers=2, num_heads=2, vocab_size=20, use_moe=True, use_quantization=quantized,
                num_experts=experts, top_k=top_k, lora_rank=rank,
            )  # fmt: skip
            model, ids = build(config, "adapters").to(device), torch.randint(20, (BATCH, LENGTH), device=device)
            for layer in moe_lora_layers(model).values():
                layer.form = "concatenated"  # as the layer chooses on CUDA
            with patch("engine.moe.routing.has_kernels", used), patch("engine.moe.gating.has_kernels", used):
                found = saved_bytes(model, ids)
            assert found == step_memory(Step(Model(config, "adapters"), BATCH, LENGTH, on_cuda=True)).saved + 4


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(interpreted, name):
    assert not interpreted[name], interpreted[name]


def step_bytes(config, learning, batch, length):
    """What a training step on a GPU holds at its peak; CUDA's libraries have what they keep for good already."""
    before = torch.cuda.memory_allocated()
    model = build(config, learning).cuda()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5, fused=True)
    ids = torch.randint(config.vocab_size, (2, batch, length), device="cuda")

    def step():
        (summed_loss(model, *ids) / ids[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with exclusive("cuda"):
        step()  # it makes the optimizer's state
        gc.collect()
        return torch.cuda.memory_allocated() - before + peak_memory(step, "cuda")


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("switches", "changes", "learning"),
    [
        ({}, {}, "everything"),
        ({"use_moe": True}, {}, "everything"),
        ({"use_moe": True, "use_flashattention": True}, {"num_experts": 16, "lora_rank": 32}, "everything"),
        ({"use_moe": True}, {"num_experts": 16, "lora_rank": 64}, "adapters"),
        (dict.fromkeys(SWITCHES, True), {}, "everything"),
        (dict.fromkeys(SWITCHES, True), {"num_experts": 16, "lora_rank": 32}, "everything"),
        (dict.fromkeys(SWITCHES, True), {"num_experts": 16, "lora_rank": 32}, "adapters"),
        (dict.fromkeys(SWITCHES, True), {"num_experts": 16, "lora_rank": 64}, "everything"),
    ],
)
def test_on_a_gpu_the_peak_is_the_predicted_one(switches, changes, learning):
    config = ModelConfig(d_model=512, num_layers=4, num_heads=8, **switches | changes)
    batch, length = 8, 256
    step_bytes(config.changed(d_model=64, num_layers=1, lora_rank=2), learning, 2, 8)
    gc.collect()
    found = step_bytes(config, learning, batch, length)
    predicted = step_memory(Step(Model(config, learning), batch, length, on_cuda=True)).peak
    assert predicted.total == pytest.approx(found, rel=0.1), predicted.name


if __name__ == "__main__":
    report(CHECKS)
