"""What is predicted of every combination of techniques, against the model that is built."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import ModelConfig, create_optimized_model, get_model_memory_mb, optimize
from engine.full_model_cost import Model, flops, model_bytes, parameters, takes_all_experts
from engine.lora.injection import lora_parameters
from engine.measure import exclusive
from engine.model import Decoder
from engine.moe.injection import moe_lora_layers
from engine.moe.lora import MoELoRALayer
from engine.trainer import summed_loss
from tests.combinations import SWITCHES, every_combination

pytestmark = pytest.mark.usefixtures("no_kernel_is_chosen")

SHAPES = [
    {"d_model": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "lora_rank": 4, "num_experts": 3, "top_k": 2},
    {"d_model": 96, "num_layers": 1, "num_heads": 3, "vocab_size": 50, "lora_rank": 7, "num_experts": 1},
    {"d_model": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 160, "vocab_size": 77,
     "lora_rank": 16, "num_experts": 8, "top_k": 1, "tie_embeddings": False},
    {"d_model": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 96, "vocab_size": 20, "lora_rank": 1, "num_experts": 5},
]  # fmt: skip


def build(config, learning, seed=0):
    torch.manual_seed(seed)
    return optimize(Decoder(config), config, learning)


def numbers(parameter):
    """Of a parameter; of one in 4 bits those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def counted(model):
    """Numbers by part, all and learning, from what was built."""
    routers = {id(p) for layer in moe_lora_layers(model).values() for p in layer.router.parameters()}
    adapters = {id(p) for layer in moe_lora_layers(model).values() for p in layer.parameters()} - routers
    adapters |= {id(p) for p in lora_parameters(model)}

    def part(name, parameter):
        if id(parameter) in routers:
            return "routers"
        if id(parameter) in adapters:
            return "adapters"
        if "embed_tokens" in name or "lm_head" in name:
            return "embeddings"
        return "norms" if "norm" in name else "base matrices"

    found = {}
    for name, parameter in model.named_parameters():
        total, learning = found.get(part(name, parameter), (0, 0))
        size = numbers(parameter)
        found[part(name, parameter)] = (total + size, learning + size * parameter.requires_grad)
    return found


@pytest.mark.parametrize(
    ("shape", "learning"), [(0, "everything"), (1, "everything"), (2, "everything"), (2, "adapters"), (3, "everything")]
)
@every_combination
def test_parameters_and_bytes_are_those_of_the_model_that_is_built(switches, shape, learning):
    config = ModelConfig(**SHAPES[shape] | switches)
    model = build(config, learning)
    predicted = {name: (count.total, count.learning) for name, count in parameters(Model(config, learning)).items()}
    assert {name: count for name, count in predicted.items() if count[0]} == counted(model)
    assert sum(model_bytes(config).values()) == round(1e6 * get_model_memory_mb(model))


@pytest.fixture
def looped(monkeypatch):
    """Grouped products one expert after the other: PyTorch counts no FLOPs of its fused kernel for them."""
    monkeypatch.setattr("engine.moe.grouped._fused", None)


def run_flops(model, ids):
    """FLOPs that PyTorch counts in a forward pass and in a whole step."""
    with exclusive("cpu"):  # so that FlashAttention measures nothing meanwhile
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(ids)
        with FlopCounterMode(display=False) as step:
            summed_loss(model, ids, ids).backward()
    return forward.get_total_flops(), step.get_total_flops()


@pytest.mark.parametrize(("shape", "learning"), [(0, "everything"), (2, "adapters")])
@every_combination
def test_flops_are_those_that_pytorch_counts(looped, switches, shape, learning):
    """PyTorch counts neither its flash kernel for CPUs nor bitsandbytes' product with 4 bits: they are left out."""
    config = ModelConfig(**SHAPES[shape] | switches)
    model, length = Model(config, learning), 24
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    forward, step = run_flops(build(config, learning), ids)
    found = flops(model, length, ids.numel())
    unseen = [2 * matrix.size for matrix in model.matrices if matrix.in_4_bits]
    unseen_forward = unseen_step = config.num_layers * sum(unseen)
    if config.use_flashattention:
        tiles = 2 * length * config.num_heads * config.head_dim
        still = learning == "adapters" and config.use_moe and not config.use_lora  # nothing learns before the first
        unseen_forward += config.num_layers * tiles
        unseen_step += tiles * (config.num_layers + 2.5 * (config.num_layers - still))
    assert ids.numel() * (found.forward - unseen_forward) == forward
    assert ids.numel() * (found.step - unseen_step) == step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mixture_takes_the_form_that_the_layer_takes(device):
    for experts, top_k, rank, tokens in itertools.product((1, 2, 4, 16), (1, 2), (1, 8, 64), (16, 1024, 65536)):
        if top_k > experts:
            continue
        config = ModelConfig(d_model=128, num_heads=4, lora_rank=rank, num_experts=experts, top_k=top_k, use_moe=True)
        for matrix in Model(config).named("gate_proj", "down_proj"):
            layer = MoELoRALayer(matrix.inputs, matrix.outputs, experts, rank, top_k)
            form = "concatenated" if takes_all_experts(config, matrix, tokens, device == "cuda") else "grouped"
            assert form == layer.cheaper_form(device, tokens)


def test_a_grouped_mixture_costs_what_its_tokens_choose(looped):
    config = ModelConfig(
        d_model=64, num_layers=1, num_heads=4, vocab_size=50, use_moe=True, num_experts=16, top_k=1, lora_rank=32
    )
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    assert not takes_all_experts(config, Model(config).named("gate_proj")[0], ids.numel(), False)
    found = flops(Model(config), 16, ids.numel())
    assert [ids.numel() * each for each in (found.forward, found.step)] == list(
        run_flops(build(config, "everything"), ids)
    )


def test_a_fresh_model_is_the_one_of_the_contract():
    config = ModelConfig(**SHAPES[0], **dict.fromkeys(SWITCHES, True))
    model = create_optimized_model(config)
    learning = sum(count.learning for count in parameters(Model(config)).values())
    assert learning == sum(p.numel() for p in model.parameters() if p.requires_grad)
