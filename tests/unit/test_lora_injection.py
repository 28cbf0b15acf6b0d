"""Adapters on whole models: what is chosen, what learns, what is merged, saved and refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from engine import Decoder, ModelConfig
from engine.errors import InputError
from engine.lora.injection import (
    PROJECTIONS,
    adapted_layers,
    inject_lora,
    load_lora_state_dict,
    lora_parameter_groups,
    lora_parameters,
    lora_state_dict,
    merge,
    unmerge,
)
from engine.lora.layer import rank_stabilized_scaling
from engine.lora.linear import DoRALinear, pissa_start

VARIANTS = [{}, {"scaling_rule": rank_stabilized_scaling}, {"layer": DoRALinear}, {"start": pissa_start}]


def decoder(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "vocab_size": 50}
    return Decoder(ModelConfig(**sizes | changes))


def transformers_llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))


def ids(seed=0):
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def learn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("build", [decoder, transformers_llama])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_model_starts_the_same_learns_in_its_adapters_only_and_round_trips(build, options):
    model = build().train()
    wanted = logits(model, ids())
    adapted = inject_lora(model, 4, 8, **options)
    assert len(adapted) == 14
    assert set(adapted) == set(adapted_layers(model))
    torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-5, rtol=1e-4)

    learned = {id(parameter) for parameter in lora_parameters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learned
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in learned}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits(model, ids())[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    given = logits(model, ids())
    merge(model)
    merge(model)
    torch.testing.assert_close(logits(model, ids()), given, atol=1e-4, rtol=1e-4)
    unmerge(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert torch.equal(logits(model, ids()), given)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "v_proj"], 4),
        ("*_proj", 14),
        ("layers.0.*", 7),
        ("mlp.*", 6),
        ("layers.1.mlp.up_proj", 1),
        ("*", 15),
        (PROJECTIONS, 14),
        ("lm_head", 1),
        (lambda name: "mlp" in name and name.endswith("up_proj"), 2),
    ],
)
def test_patterns_choose_by_whole_name_or_end(targets, count):
    assert len(inject_lora(decoder(), 2, targets=targets)) == count


@pytest.mark.parametrize("targets", ["qproj", [], ["proj", "embed_tokens"]])
def test_a_pattern_without_a_match_lists_what_there_is(targets):
    model = decoder()
    with pytest.raises(InputError, match=r"q_proj \(2\), k_proj \(2\), .*down_proj \(2\), lm_head \(1\)\.$"):
        inject_lora(model, 2, targets=targets)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(InputError, match="There are: none"):
        inject_lora(nn.Linear(3, 3), 2, targets="*")


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_out_of_range_names_the_layer_and_changes_nothing(rank):
    model = decoder()
    with pytest.raises(
        InputError, match=rf"rank is {rank} for layers.0.self_attn.\w_proj: it must be from 1 to (16|32),"
    ):
        inject_lora(model, rank)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"alpha": -1}])
def test_another_wrong_value_names_a_layer_and_changes_nothing(options):
    model = decoder()
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj: The dropout|layers.0.self_attn.q_proj: alpha"):
        inject_lora(model, 2, **options)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"start": pissa_start}, {"layer": DoRALinear}])
def test_an_error_on_the_way_gives_back_what_was_changed_before_it(options):
    class Quantized(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "quantized": Quantized(8, 8)})
    before = [(name, parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()]
    with pytest.raises(InputError, match="quantized: The adapted layer is a Quantized"):
        inject_lora(model, 2, targets="*", **options)
    assert type(model["plain"]) is nn.Linear
    for (_, now), (_, parameter, bits) in zip(model.named_parameters(), before, strict=True):
        assert now is parameter
        assert now.requires_grad
        assert torch.equal(now, bits)


def test_what_is_adapted_is_not_adapted_again_but_other_layers_are():
    model = decoder()
    inject_lora(model, 2, targets="q_proj")
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj has an adapter already"):
        inject_lora(model, 2)
    inject_lora(model, 3, targets="v_proj")
    assert len(adapted_layers(model)) == 4
    assert all(layer.adapter.A.requires_grad for layer in adapted_layers(model).values())


def test_layers_that_only_look_linear_are_refused_by_name():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50))
    with pytest.raises(InputError, match=r"transformer.h.0.attn.c_attn \(Conv1D\)"):
        inject_lora(gpt2, 2, targets="c_attn")
    assert list(inject_lora(gpt2, 2, targets="lm_head")) == ["lm_head"]
    attention = nn.MultiheadAttention(16, 2)  # reads its projection's weight and never calls it
    with pytest.raises(InputError, match="out_proj"):
        inject_lora(nn.ModuleDict({"attention": attention}), 2, targets="out_proj")


@pytest.mark.parametrize("targets", ["*.linear1", ["linear2", "head"], "*"])
def test_layers_whose_weights_are_read_past_the_adapter_are_refused(targets):
    """In eval mode nn.TransformerEncoderLayer never calls its linear layers."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(16, 4)})
    with pytest.raises(InputError, match=r"encoder.layers.0.linear[12] \(of a TransformerEncoderLayer\)"):
        inject_lora(model, 2, targets=targets)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(inject_lora(model, 2, targets="head")) == ["head"]


def test_a_target_that_cannot_be_adapted_is_refused_although_another_can():
    model = nn.ModuleDict({"plain": nn.Linear(16, 16), "attention": nn.MultiheadAttention(16, 2)})
    with pytest.raises(InputError, match=r"attention.out_proj \(NonDynamicallyQuantizableLinear\)"):
        inject_lora(model, 2, targets=["plain", "out_proj"])
    assert not adapted_layers(model)


def test_a_layer_with_two_names_gets_one_adapter():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared})
    adapted = inject_lora(model, 2, targets="*")
    assert adapted["first"] is adapted["second"] is model["first"] is model["second"]
    assert len(list(lora_parameters(model))) == 2


@pytest.mark.parametrize("options", VARIANTS)
def test_a_tied_head_leaves_the_embedding_alone(options):
    model = decoder(tie_embeddings=True)
    embedding = model.embed_tokens.weight
    bits = embedding.detach().clone()
    wanted = logits(model, ids())
    inject_lora(model, 4, targets="lm_head", **options)
    torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-5, rtol=1e-4)
    given = logits(learn(model), ids())
    merge(model)
    assert model.embed_tokens.weight is embedding
    assert torch.equal(embedding, bits)
    torch.testing.assert_close(logits(model, ids()), given, atol=1e-4, rtol=1e-4)
    unmerge(model)
    assert (model.lm_head.base.weight is embedding) == ("start" not in options)
    assert torch.equal(logits(model, ids()), given)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_state_moves_to_another_model(options):
    one, other = decoder(), decoder()
    inject_lora(one, 4, **options)
    torch.manual_seed(9)
    inject_lora(other, 4, **options)
    state = copy.deepcopy(lora_state_dict(learn(one)))
    assert not any(".base." in name for name in state)
    load_lora_state_dict(other, state)
    torch.testing.assert_close(logits(other, ids()), logits(one, ids()), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, state[name]) for name, value in lora_state_dict(other).items())


@pytest.mark.parametrize("seed", range(2))
def test_a_state_brings_the_start_that_it_goes_with(seed):
    """Of two models with the same given weights and starts that differ, as PiSSA's do between two machines."""
    one, other = decoder(), decoder()
    generator = torch.Generator().manual_seed(seed)
    for model in (one, other):
        for layer in inject_lora(model, 4, start=pissa_start).values():
            shapes = layer.adapter.A.shape, layer.adapter.B.shape
            layer.start_from(*(0.3 * torch.randn(shape, generator=generator) for shape in shapes))
    state = copy.deepcopy(lora_state_dict(learn(one, seed)))
    load_lora_state_dict(other, state)
    torch.testing.assert_close(logits(other, ids()), logits(one, ids()), atol=1e-5, rtol=1e-4)
    for name, layer in adapted_layers(other).items():
        torch.testing.assert_close(layer.frozen_weight, adapted_layers(one)[name].frozen_weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", ["start_A", "adapter.A"])
def test_a_state_of_which_one_layer_does_not_fit_changes_none(key):
    model = decoder()
    inject_lora(model, 4, start=pissa_start)
    model.half()
    before = copy.deepcopy(model.state_dict())
    state = {name: 1.5 * value.float() for name, value in lora_state_dict(model).items()}
    last = [name for name in state if name.endswith(key)][-1]
    state[last] = 1e6 * state[last]
    with pytest.raises(InputError, match="too large"):
        load_lora_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_the_mode_of_the_model(training):
    model = decoder().train(training)
    inject_lora(model, 4, dropout=0.5)
    assert {module.training for module in model.modules()} == {training}
    learn(model)
    assert torch.equal(logits(model, ids()), logits(model, ids())) is not training


@pytest.mark.parametrize("targets", ["q_proj", "layers.0.mlp.up_proj", "layers.*"])
def test_a_model_of_which_a_part_is_compiled_is_adapted_under_its_own_names(targets):
    plain, compiled = decoder(), decoder()
    compiled.layers[0] = torch.compile(compiled.layers[0], backend="eager")
    wanted = list(inject_lora(plain, 4, targets=targets))
    assert list(inject_lora(compiled, 4, targets=targets)) == wanted
    assert list(adapted_layers(compiled)) == wanted
    load_lora_state_dict(compiled, lora_state_dict(learn(plain)))
    torch.testing.assert_close(logits(compiled, ids()), logits(plain, ids()), atol=1e-5, rtol=1e-4)


def test_a_state_of_other_adapters_is_refused_whole():
    model = decoder()
    inject_lora(model, 4, targets="q_proj")
    before = copy.deepcopy(lora_state_dict(model))
    missing = dict(list(before.items())[1:])
    reshaped = before | {"layers.0.self_attn.q_proj.adapter.A": torch.ones(32, 5)}
    strange = before | {"layers.7.adapter.A": torch.ones(1)}
    for state, name in (
        (missing, "0.self_attn.q_proj.adapter.A"),
        (reshaped, "q_proj.adapter.A"),
        (strange, "layers.7"),
    ):
        with pytest.raises(InputError, match=name):
            load_lora_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in lora_state_dict(model).items())
    merge(model)
    with pytest.raises(InputError, match="unmerge them"):
        load_lora_state_dict(model, before)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("seed", range(2))
def test_the_whole_state_of_a_merged_model_is_that_of_the_unmerged_one(options, seed):
    one, other = decoder(seed), decoder(seed + 5)
    inject_lora(one, 4, **options)
    inject_lora(other, 4, **options)
    wanted = logits(learn(one, seed), ids())
    state = copy.deepcopy(one.state_dict())
    merge(one)
    of_merged = one.state_dict()
    assert of_merged.keys() == state.keys()
    assert all(torch.equal(of_merged[name], state[name]) for name in state)
    kept = one.state_dict(keep_vars=True)
    assert all(isinstance(kept[name], nn.Parameter) for name, _ in one.named_parameters())
    merge(learn(other, seed + 5))
    other.load_state_dict(of_merged)  # what it held before must not come back
    for _ in range(2):
        torch.testing.assert_close(logits(other, ids()), wanted, atol=1e-5, rtol=1e-4)
        merge(other)
        torch.testing.assert_close(logits(other, ids()), wanted, atol=1e-4, rtol=1e-4)
        unmerge(other)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_merging_is_all_or_nothing():
    model = decoder()
    adapted = inject_lora(model, 4)
    with torch.no_grad():
        list(adapted.values())[5].adapter.B.fill_(torch.nan)
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj: .* not finite"):
        merge(model)
    assert not any(layer.merged for layer in adapted.values())


@pytest.mark.parametrize("call", [merge, unmerge, lambda model: lora_parameter_groups(model, 0.1)])
def test_a_model_without_adapters_is_an_error(call):
    with pytest.raises(InputError, match="no adapters"):
        call(decoder())
    assert lora_state_dict(decoder()) == {}


def test_lora_plus_gives_b_the_larger_rate():
    model = decoder()
    inject_lora(model, 4, targets="q_proj", layer=DoRALinear)
    slow, fast = lora_parameter_groups(model, lr=1e-3, ratio=8)
    layers = adapted_layers(model).values()
    assert {id(p) for p in fast["params"]} == {id(layer.adapter.B) for layer in layers}
    assert {id(p) for p in slow["params"]} == {id(p) for la in layers for p in (la.adapter.A, la.magnitude)}
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    torch.optim.AdamW([slow, fast])
    assert [group["lr"] for group in lora_parameter_groups(model, lr=1e-3)] == [1e-3, 16e-3]
    with pytest.raises(InputError, match="at least 1"):
        lora_parameter_groups(model, 1e-3, ratio=0.5)


def test_float32_adapters_beside_a_bfloat16_model():
    model = decoder().to(torch.bfloat16)
    inject_lora(model, 4, adapter_dtype=torch.float32)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    logits(model, ids()).float().sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model))


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model = decoder()
        inject_lora(model, 4)
        learn(model).train().gradient_checkpointing = checkpointing
        return torch.autograd.grad(logits(model, ids()).square().sum(), list(lora_parameters(model)))

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_keeps_its_names():
    torch._dynamo.reset()
    model = decoder()
    inject_lora(model, 4, dropout=0.0)
    learn(model)
    compiled = torch.compile(model, fullgraph=True)
    assert list(adapted_layers(compiled)) == list(adapted_layers(model))
    assert list(lora_state_dict(compiled)) == list(lora_state_dict(model))
    parameters = list(lora_parameters(model))
    found = torch.autograd.grad(compiled(ids()).square().sum(), parameters)
    wanted = torch.autograd.grad(model(ids()).square().sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
