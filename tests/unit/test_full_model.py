"""Every technique on and off in any combination: the same model at first, and one that learns and generates."""

import copy
import math

import pytest
import torch

from engine import (
    FlashAttention,
    LoRALinear,
    ModelConfig,
    StandardAttention,
    Trainer,
    TrainerOptions,
    create_optimized_model,
    create_test_dataset,
    generate,
    get_model_memory_mb,
    optimize,
    production_config,
)
from engine.errors import InputError
from engine.lora.injection import lora_parameters
from engine.model import Decoder, evaluating
from engine.moe.injection import moe_lora_layers
from engine.moe.lora import MoELoRALinear
from engine.trainer import summed_loss
from tests.combinations import COMBINATIONS, SWITCHES, every_combination, named

SMALL = {"d_model": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1000, "max_seq_len": 64, "lora_rank": 4}


def small(switches, seed=0, **changes):
    torch.manual_seed(seed)
    return create_optimized_model(ModelConfig(**SMALL | switches | changes))


def tokens(seed, *shape):
    return torch.randint(1000, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with evaluating(model):
        return model(ids)


def perturbed(model, seed=0):
    """The model with nothing of what learns at 0, so that each technique takes part in every gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learning(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model, run, ids):
    """Of a mean over all logits, as one vector."""
    model.zero_grad()
    run(ids).float().logsumexp(-1).mean().backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in learning(model).values()])


def learning(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_combination
def test_all_that_learns_moves_and_all_that_is_frozen_stays(switches):
    model = small(switches)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = before.keys() - learning(model).keys()
    trainer = Trainer(model, create_test_dataset(160), TrainerOptions(learning_rate=0.02, batch_size=16))
    start = trainer.evaluate()
    trainer.train_steps(8)
    assert trainer.evaluate() < 0.9 * start
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    unmoved = [name for name in learning(model) if torch.equal(before[name], after[name])]
    assert not unmoved


@every_combination
def test_in_bfloat16_a_step_is_nearly_that_in_float32(switches):
    batch = create_test_dataset(8).batch(torch.arange(8))
    found = {}
    for precision in ("float32", "bfloat16"):
        model = small(switches)
        loss = summed_loss(model, *batch, precision)
        loss.backward()
        gradients = [parameter.grad.flatten().double() for parameter in learning(model).values()]
        found[precision] = loss.item(), torch.cat(gradients)
    (exact, wanted), (rounded, given) = found.values()
    assert rounded == pytest.approx(exact, rel=2e-3)
    assert 0.99 < torch.cosine_similarity(given, wanted, dim=0) < 1 - 1e-6  # and it is rounded


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@every_combination
def test_on_a_gpu_every_combination_learns_and_generates(switches, precision):
    model = small(switches).cuda()
    options = TrainerOptions(learning_rate=0.02, batch_size=16, precision=precision)
    trainer = Trainer(model, create_test_dataset(160), options)
    start = trainer.evaluate()
    trainer.train_steps(8)
    assert trainer.evaluate() < 0.95 * start
    prompt = tokens(0, 2, 5)
    text = generate(model, prompt, 6)
    uncached = logits(model, text)[:, 4:-1]
    chosen = uncached.gather(2, text[:, 5:, None].to(uncached.device))[..., 0]
    assert (uncached.amax(-1) - chosen).max() < 0.05  # of equally good tokens half precision may take another


def check_compiled(model, ids, backend, tolerance):
    """That a compiled model gives the logits and the gradients of an eager one, evaluating and in training.

    Each has a model of its own, for a backward pass moves the selection bias of the experts.
    """
    torch._dynamo.reset()
    eager, compiled = model, copy.deepcopy(model)
    run = torch.compile(compiled, backend=backend)
    wanted = logits(eager, ids)
    with evaluating(compiled):
        torch.testing.assert_close(run(ids), wanted, atol=tolerance * wanted.std().item(), rtol=tolerance)
    wanted, given = gradients(eager.train(), eager, ids), gradients(compiled.train(), run, ids)
    assert (given - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_it_is_the_same_model(on):
    model = small(dict.fromkeys(SWITCHES, on), num_layers=1, vocab_size=50, num_experts=3)
    check_compiled(perturbed(model), tokens(0, 2, 12) % 50, "aot_eager", 1e-5)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_kernel_is_chosen")
@pytest.mark.parametrize("on", [False, True])
def test_compiled_on_a_gpu_it_is_the_same_model(on):
    """Compiled, FlashAttention stays in float32; both experts are taken, or a rounding error may take another."""
    model = small(dict.fromkeys(SWITCHES, on), vocab_size=50, num_experts=2, top_k=2)
    check_compiled(perturbed(model).cuda(), tokens(0, 2, 32) % 50, "inductor", 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("on", [False, True])
def test_what_is_finite_stays_finite(on, scale, dtype):
    """With embeddings of this size, one token, one expert and adapters as wide as the model."""
    model = perturbed(small(dict.fromkeys(SWITCHES, on), num_experts=1, lora_rank=64, tie_embeddings=False))
    with torch.no_grad():
        model.embed_tokens.weight.uniform_(-scale, scale)
    model = model.to(dtype)
    for shape in ((1, 1), (2, 7)):
        ids = tokens(0, *shape)
        found = model(ids)
        loss = summed_loss(model, ids, ids) / ids.numel()
        model.zero_grad()
        loss.backward()
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in learning(model).values())


@pytest.mark.gpu
@pytest.mark.usefixtures("no_kernel_is_chosen")
@pytest.mark.parametrize("places", [("cpu", "cuda"), ("cuda", "cpu")], ids=" to ".join)
def test_ids_may_be_on_any_device(places):
    given, model_place = places
    model, ids = small(dict.fromkeys(SWITCHES, True)).to(model_place), tokens(0, 2, 8)
    found = logits(model, ids.to(given))
    assert found.device.type == model_place
    torch.testing.assert_close(found, logits(model, ids.to(model_place)))


@every_combination
def test_who_learns_follows_from_who_is_adapted(switches):
    model = small(switches)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear | MoELoRALinear)]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    matrices = {
        name
        for name, _ in model.named_parameters()
        if "_proj" in name and name.endswith(("proj.weight", "base.weight"))
    }
    if switches["use_quantization"]:
        assert frozen == matrices
    else:
        assert frozen == {f"{name}.base.weight" for name in adapted}
    assert len(adapted) == 2 * (4 * switches["use_lora"] + 3 * (switches["use_lora"] or switches["use_moe"]))


@pytest.mark.parametrize("seed", range(3))
@every_combination
def test_every_combination_starts_as_the_plain_model(switches, seed):
    ids = tokens(seed, 2, 24)
    plain, model = logits(small({}, seed), ids), logits(small(switches, seed), ids)
    if switches["use_quantization"]:
        off = logits(small({"use_quantization": True}, seed), ids)
        torch.testing.assert_close(model, off, atol=2e-5, rtol=1e-5)  # the others add nothing to its error,
        assert 0 < (model - plain).var() < 0.1 * plain.var()  # which is small
    else:
        torch.testing.assert_close(model, plain, atol=2e-5, rtol=1e-5)


@every_combination
def test_generation_with_a_cache_is_that_without(switches):
    model = small(switches)
    Trainer(model, create_test_dataset(64), TrainerOptions(learning_rate=0.01, batch_size=8)).train_steps(
        2
    )  # no zeros left
    for seed in range(3):
        prompt = tokens(seed, 2, 5)
        cached = generate(model, prompt, 6)
        text = prompt
        for _ in range(6):
            text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(cached, text)


def test_attention_is_what_the_configuration_says():
    for on, kind in ((True, FlashAttention), (False, StandardAttention)):
        blocks = small({"use_flashattention": on}).layers
        assert all(type(block.attention) is kind and block.attention.causal for block in blocks)


def test_mixtures_are_on_the_feed_forward_network_alone():
    mixtures = moe_lora_layers(small({"use_moe": True, "use_lora": True}, num_experts=3, top_k=1))
    assert {name.split(".", 2)[2] for name in mixtures} == {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert all((layer.num_experts, layer.top_k, layer.rank) == (3, 1, 4) for layer in mixtures.values())
    assert all(layer.router.balance == "tokens" for layer in mixtures.values())


def test_grouped_keys_bound_the_rank_only_where_attention_is_adapted():
    grouped = {"num_heads": 8, "num_kv_heads": 1, "lora_rank": 16}  # k and v have 8 outputs
    assert small({"use_moe": True}, **grouped).config.lora_rank == 16
    with pytest.raises(InputError, match="at most 8"):
        small({"use_moe": True, "use_lora": True}, **grouped)


def test_four_bits_take_less_memory():
    whole = small({}, d_model=256, vocab_size=100)
    assert get_model_memory_mb(
        small({"use_quantization": True}, d_model=256, vocab_size=100)
    ) < 0.25 * get_model_memory_mb(whole)


def test_scales_are_quantized_as_well():
    model = small({"use_quantization": True}, d_model=256)
    assert all(layer.bits_per_weight < 4.3 for layer in model.layers.quantization.quantized)  # 4.5 without
    assert len(model.layers.quantization.quantized) == 2 * 7


def test_a_head_of_its_own_keeps_its_precision():
    model = small({"use_quantization": True}, tie_embeddings=False)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "switches", [combination for combination in COMBINATIONS if any(combination.values())], ids=named
)
def test_a_model_that_knows_something_lets_only_its_adapters_learn(switches):
    torch.manual_seed(0)
    plain = Decoder(ModelConfig(**SMALL))
    before = get_model_memory_mb(plain)
    model = optimize(plain, ModelConfig(d_model=32, num_heads=1, lora_rank=2, **switches))  # its shape is not read
    assert model.config == ModelConfig(**SMALL | switches | {"lora_rank": 2})
    adapters = {id(parameter) for parameter in lora_parameters(model)}
    adapters |= {id(p) for layer in moe_lora_layers(model).values() for p in layer.parameters()}
    if adapters:
        assert {id(parameter) for parameter in learning(model).values()} == adapters
    elif switches["use_quantization"]:
        assert not any("_proj" in name for name in learning(model))
        assert "embed_tokens.weight" in learning(model)
        assert get_model_memory_mb(model) < before
    else:
        assert len(learning(model)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_rank": 0}, ["lora_rank is 0", "greater than or equal to 1"]),
        ({"lora_rank": 65, "use_lora": True}, ["lora_rank is 65", "at most 64"]),
        ({"lora_rank": 65, "use_moe": True}, ["lora_rank is 65", "at most 64"]),
        ({"num_experts": 0}, ["num_experts is 0"]),
        ({"num_experts": 4, "top_k": 5}, ["top_k is 5", "at most num_experts, which is 4"]),
        ({"top_k": 0}, ["top_k is 0"]),
        ({"use_moe": "perhaps"}, ["use_moe is 'perhaps'"]),
        ({"use_quantization": True, "d_model": 48}, ["use_quantization is True", "multiple of 32", "q_proj has 48"]),
        ({"num_heads": 5}, ["num_heads is 5", "d_model, which is 64"]),
    ],
)
def test_a_wrong_value_names_the_field_the_value_and_what_is_allowed(values, words):
    with pytest.raises(InputError) as error:
        ModelConfig(**SMALL | values)
    assert all(word in str(error.value) for word in words)


def test_one_expert_is_taken_once():
    assert ModelConfig(num_experts=1).top_k == 1
    assert ModelConfig(num_experts=8).top_k == 2


def test_a_changed_configuration_is_checked_anew():
    with pytest.raises(InputError, match="top_k is 9"):
        ModelConfig().changed(top_k=9)


def test_techniques_are_not_put_on_twice():
    for switches in ({"use_lora": True}, {"use_moe": True}, {"use_quantization": True}):
        model = small(switches)
        with pytest.raises(InputError, match="already: give a plain model"):
            optimize(model, model.config)


def test_no_other_way_to_learn():
    with pytest.raises(InputError, match="everything or adapters"):
        optimize(Decoder(ModelConfig(**SMALL)), ModelConfig(), "nothing")


def test_production_is_every_technique():
    config = production_config()
    assert all(getattr(config, switch) for switch in SWITCHES)
    assert config.max_seq_len >= 1024


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_everything_on_learns_the_synthetic_language(device):
    config = ModelConfig(
        d_model=256, num_layers=4, num_heads=8, lora_rank=16, num_experts=4, **dict.fromkeys(SWITCHES, True)
    )
    torch.manual_seed(0)
    trainer = Trainer(create_optimized_model(config).to(device), create_test_dataset(1000))
    start = trainer.evaluate()
    assert start == pytest.approx(math.log(1000), rel=0.1)
    losses = trainer.train(5)
    assert len(losses) == 5
    assert trainer.evaluate() < 0.8 * start
