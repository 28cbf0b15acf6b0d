"""Models in 4 and 8 bits: the copy is small and close, the original as it was, what is left alone is said."""

import copy
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from engine import (
    ModelConfig,
    create_optimized_model,
    create_test_transformer,
    get_model_memory_mb,
    quantize_model_4bit,
)
from engine.errors import InputError
from engine.lora.injection import inject_lora, lora_parameters
from engine.model import Decoder
from engine.quantization.grouping import per_block
from engine.quantization.methods import quantize_layers
from engine.quantization.production import quantize_model_8bit
from engine.quantization.tensor import quantize

SEEDS = range(5)


def ids(seed=0, vocab=1000):
    return torch.randint(vocab, (2, 24), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def decoder(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return Decoder(ModelConfig(**sizes | changes)).eval()


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes | changes)).eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def reasons(model):
    return {entry.name: entry.reason for entry in model.quantization.left}


@pytest.mark.parametrize("seed", SEEDS)
def test_two_layers_of_256_take_less_than_half(seed):
    torch.manual_seed(seed)
    model = create_test_transformer(2, 256)
    small = quantize_model_4bit(model)
    assert get_model_memory_mb(model) == sum(p.numel() for p in model.parameters()) * 4 / 1e6
    assert get_model_memory_mb(small) < 0.3 * get_model_memory_mb(model)
    sizes = [layer.shape[0] * layer.shape[1] for layer in small.quantization.quantized]
    kept = get_model_memory_mb(model) - 4 * sum(sizes) / 1e6
    codebooks = 4 * (16 + 256 + 1)  # and the scales' mean
    expected = sum(size // 2 + size // 64 + 4 * math.ceil(size / 64 / 256) + codebooks for size in sizes)
    assert get_model_memory_mb(small) - kept == pytest.approx(expected / 1e6, abs=1e-9)
    assert all(4.127 < layer.bits_per_weight < 4.27 for layer in small.quantization.quantized)


@pytest.mark.parametrize("seed", range(8))
def test_one_layer_of_128_loses_less_than_a_tenth_of_the_variance(seed):
    torch.manual_seed(seed)
    model = create_test_transformer(1, 128).eval()
    exact, quantized = logits(model, ids(seed)), logits(quantize_model_4bit(model), ids(seed))
    assert 0 < (exact - quantized).square().mean() < 0.1 * exact.var()
    eight = logits(quantize_model_8bit(model), ids(seed))
    assert (exact - eight).square().mean() < 0.01 * exact.var()


@pytest.mark.parametrize("build", [decoder, llama])
@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit])
def test_the_given_model_is_untouched_and_shares_nothing(build, convert):
    model = build()
    before, answer = state(model), logits(model, ids(0, 50))
    small = convert(model)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.is_floating_point():
                parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert torch.equal(logits(model, ids(0, 50)), answer)
    kind = Linear4bit if convert is quantize_model_4bit else Linear8bitLt
    assert not any(isinstance(module, kind) for module in model.modules())
    assert sum(isinstance(module, kind) for module in small.modules()) == len(small.quantization.quantized) >= 14


@pytest.mark.parametrize("build", [decoder, llama])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_computes_what_our_own_codes_say(build, quant_type, double):
    model = build()
    small = quantize_model_4bit(model, quant_type, double)
    by_hand, to = model, {"nf4": "nf4", "fp4": "fp4-bnb"}[quant_type]
    for size in (64, 32):  # of the llama's layers one has 96 inputs
        named = {name for name, module in model.named_modules() if getattr(module, "in_features", 0) % 64 == 64 - size}
        if any(name != "lm_head" for name in named - {""}):
            by_hand = quantize_layers(
                by_hand, to, per_block(size), layers=named.__contains__, double_quantization=double
            )
    tolerance = 1e-2 if double else 1e-5
    first = logits(small, ids(0, 50))
    torch.testing.assert_close(first, logits(by_hand, ids(0, 50)), atol=tolerance, rtol=tolerance)
    memory = get_model_memory_mb(small)
    assert torch.equal(logits(small.train(), ids(0, 50)), first)
    assert torch.equal(logits(small.eval(), ids(0, 50)), first)  # running changes neither values nor memory
    assert get_model_memory_mb(small) == memory
    assert torch.equal(logits(copy.deepcopy(small), ids(0, 50)), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_theirs(dtype):
    model = llama().to(dtype)
    small = quantize_model_4bit(model)
    assert logits(small, ids(0, 50)).dtype == dtype
    q_proj = small.model.layers[0].self_attn.q_proj
    assert q_proj.compute_dtype == dtype
    weight = quantize(model.model.layers[0].self_attn.q_proj.weight, "nf4")
    assert torch.equal(q_proj.weight.data.flatten(), weight.payload)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["ours", "llama"])
def test_a_tied_head_stays_tied_and_a_free_one_is_quantized(tied, family):
    model = decoder(tie_embeddings=tied) if family == "ours" else llama(tie_word_embeddings=tied)
    small = quantize_model_4bit(model)
    names = [layer.name for layer in small.quantization.quantized]
    assert ("lm_head" in names) is not tied
    embedding = small.embed_tokens if family == "ours" else small.model.embed_tokens
    assert (small.lm_head.weight is embedding.weight) is tied
    (reason,) = (reason for name, reason in reasons(small).items() if "embed_tokens" in name)
    assert ("shared by" in reason and "lm_head" in reason) if tied else "rows are looked up" in reason


@pytest.mark.parametrize(("inputs", "block_size"), [(128, 64), (96, 32), (32, 32), (48, None), (33, None)])
def test_rows_hold_whole_blocks_or_the_layer_is_left_alone(inputs, block_size):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, inputs), nn.Linear(inputs, 10)).eval(), torch.randn(5, 64)
    small = quantize_model_4bit(model, double_quantization=False)
    if block_size is None:
        assert f"rows of {inputs} weights do not hold a whole number of blocks" in reasons(small)["1.weight"]
        assert torch.equal(small[1].weight, model[1].weight)
    else:
        expected = quantize(model[1].weight, "nf4", per_block(block_size)).dequantize()
        hidden = torch.randn(3, inputs)
        torch.testing.assert_close(small[1](hidden), hidden @ expected.T + model[1].bias)
    assert small(x).shape == (5, 10)


def test_expert_tensors_are_named_not_skipped():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes)).eval()
    small = quantize_model_4bit(model)
    experts = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    assert experts
    assert experts <= set(reasons(small))
    assert all("3 dimensions" in reasons(small)[name] for name in experts)
    assert logits(small, ids(0, 50)).isfinite().all()


def test_layers_of_another_kind_are_named_with_the_reason():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            self.shared = nn.Linear(32, 32)
            self.again = self.shared

        def forward(self, x):
            return self.again(self.shared(self.attention(x, x, x)[0]))

    torch.manual_seed(0)
    small, x = quantize_model_4bit(Mixed()), torch.randn(1, 3, 32)
    assert small.again is small.shared
    assert [layer.name for layer in small.quantization.quantized] == ["shared"]
    assert "in_proj_weight" in " ".join(reasons(small))
    assert "without calling its layer" in reasons(small)["attention.out_proj.weight"]
    assert small(x).shape == x.shape


@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit, quantize_layers])
def test_a_model_may_be_a_linear_layer(convert):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32), torch.randn(3, 64)
    small = convert(model)
    assert 0 < (small(x) - model(x)).square().mean() < 0.02 * model(x).var()
    assert isinstance(model.weight, nn.Parameter)
    assert model.weight.dtype == torch.float32


def test_every_matrix_is_accounted_for_once():
    model = llama()
    small = quantize_model_4bit(model)
    names = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    quantized = {f"{layer.name}.weight" for layer in small.quantization.quantized}
    assert quantized | set(reasons(small)) == names
    assert not quantized & set(reasons(small))


@pytest.mark.parametrize("threshold", [math.nan, -1.0])
def test_a_threshold_that_makes_no_sense_is_refused(threshold):
    with pytest.raises(InputError, match=rf"threshold is {threshold}: give a magnitude .*, or 0 for no outliers"):
        quantize_model_8bit(llama(), threshold)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(
        InputError, match=r"quantize: 0\.weight: .*, not multiplied; 2\.weight: [^;]*, not multiplied\.$"
    ):
        quantize_model_4bit(nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Embedding(4, 8)))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(InputError, match="no linear layer"):
        quantize_model_4bit(gpt2)
    with pytest.raises(InputError, match="it has no matrices"):
        quantize_model_4bit(nn.LayerNorm(8))


@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit, quantize_layers])
def test_a_weight_that_is_no_number_is_refused_with_its_layer_and_place(convert):
    model = decoder()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 2] = math.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj hold nan at index \[3, 2\]"):
        convert(model)


@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit])
def test_what_is_quantized_already_is_said_to_be(convert):
    with pytest.raises(InputError, match="quantized already, a Linear"):
        quantize_model_4bit(convert(decoder()))


@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit])
def test_a_dtype_that_bitsandbytes_does_not_take_is_refused(convert):
    with pytest.raises(InputError, match=r"weights of layers\.0\.self_attn\.q_proj are float64: bitsandbytes takes"):
        convert(decoder().double())


@pytest.mark.parametrize("quant_type", ["int4", "NF4", None])
def test_another_four_bit_type_is_refused(quant_type):
    with pytest.raises(InputError, match=r"no 4-bit type .*: choose nf4 or fp4"):
        quantize_model_4bit(decoder(), quant_type)


@pytest.mark.parametrize("double", [False, True])
def test_a_layers_bits_count_its_copy_of_the_codebooks_and_a_tensors_do_not(double):
    torch.manual_seed(0)
    model = nn.Linear(256, 256)
    (layer,) = quantize_model_4bit(model, double_quantization=double).quantization.quantized
    codebooks = 64 + (1024 if double else 0)
    stored = quantize(model.weight, "nf4", double_quantization=double)
    assert layer.nbytes == stored.nbytes + codebooks
    assert layer.bits_per_weight == pytest.approx(stored.bits_per_weight + 8 * codebooks / 256**2)


def test_adapters_learn_on_a_quantized_model():
    model = quantize_model_4bit(decoder())
    inject_lora(model, rank=4)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        out = model(ids(0, 50))
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids(0, 50)[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def optimized(seed, **changes):
    """A model of which nothing is 0, so that each of its tensors is seen in its logits."""
    torch.manual_seed(seed)
    sizes = {"d_model": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "lora_rank": 4}
    model = create_optimized_model(ModelConfig(**sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def quantized(convert, **options):
    """One that makes a model in few bits from a seed."""

    def build(seed):
        model = decoder(tie_embeddings=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return convert(model, **options)

    return build


BUILDS = {
    "4 bits": quantized(quantize_model_4bit),
    "4 bits, plain scales": quantized(quantize_model_4bit, double_quantization=False),
    "fp4": quantized(quantize_model_4bit, quant_type="fp4"),
    "8 bits": quantized(quantize_model_8bit),
    "LoRA": lambda seed: optimized(seed, use_quantization=True, use_lora=True),
    "mixtures": lambda seed: optimized(seed, use_quantization=True, use_moe=True, tie_embeddings=False),
    "all": lambda seed: optimized(
        seed, use_quantization=True, use_moe=True, use_lora=True, use_flashattention=True, d_model=96, num_heads=3
    ),
    "a layer": lambda seed: quantize_model_4bit(nn.Linear(64, 32)),
}


def given(name):
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) if name == "a layer" else ids(0, 50)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize("name", BUILDS)
def test_a_state_goes_from_one_model_to_another(name, options):
    first, second, x = BUILDS[name](0), BUILDS[name](1), given(name)
    wanted = logits(first, x)
    assert not torch.allclose(logits(second, x), wanted, atol=1e-3)
    stored = first.state_dict()
    assert not any(second.load_state_dict(stored, **options))
    assert torch.equal(logits(second, x), wanted)
    assert torch.equal(logits(copy.deepcopy(second), x), wanted)
    assert get_model_memory_mb(second) == get_model_memory_mb(first)
    if "assign" not in options:  # then nothing is shared
        for tensor in second.state_dict().values():
            tensor.zero_()
        assert torch.equal(logits(first, x), wanted)


@pytest.mark.parametrize("name", ["4 bits", "8 bits", "all"])
def test_a_copy_takes_a_state_too_and_a_file_gives_it_back(name, tmp_path):
    first, second, x = BUILDS[name](0), copy.deepcopy(BUILDS[name](1)), given(name)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(second, x), logits(first, x))


@pytest.mark.parametrize("name", ["4 bits", "all"])
def test_a_model_that_is_saved_as_a_whole_gives_and_takes_a_state_too(name, tmp_path):
    first, second, third = (BUILDS[name](seed) for seed in range(3))
    second = copy.deepcopy(second)
    second.load_state_dict(first.state_dict())
    torch.save(second, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(logits(copy.deepcopy(read), given(name)), logits(first, given(name)))
    read = copy.deepcopy(read)
    read.load_state_dict(third.state_dict())
    torch.testing.assert_close(logits(read, given(name)), logits(third, given(name)))


def without_scales(stored):
    return {name: tensor for name, tensor in stored.items() if "weight." not in name and not name.endswith("SCB")}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("4 bits", lambda: BUILDS["8 bits"](0).state_dict(), "not the codes and scales of nf4"),
        ("4 bits", lambda: decoder(tie_embeddings=False).state_dict(), "codes and scales of nf4 in blocks of 64"),
        ("4 bits", lambda: BUILDS["4 bits, plain scales"](0).state_dict(), "with scales in 8 bits"),
        ("4 bits, plain scales", lambda: BUILDS["4 bits"](0).state_dict(), "not the codes"),
        ("4 bits", lambda: BUILDS["fp4"](0).state_dict(), "not the codes and scales of nf4"),
        ("4 bits", lambda: without_scales(BUILDS["4 bits"](0).state_dict()), "not the codes and scales"),
        ("4 bits", lambda: {k: v.float() for k, v in BUILDS["4 bits"](0).state_dict().items()}, "not the codes"),
        ("8 bits", lambda: without_scales(BUILDS["8 bits"](0).state_dict()), "codes and scales of int8, 64 × 64"),
        ("8 bits", lambda: decoder(tie_embeddings=False).state_dict(), "codes and scales of int8"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_matrices_stay(name, make, words, strict):
    model = BUILDS[name](1)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj\.weight: what is given") as error:
        model.load_state_dict(make(), strict=strict)
    assert words in str(error.value)
    assert "give the state of a model of the same configuration" in str(error.value)
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "q_proj" in name)


def test_a_state_of_adapters_alone_leaves_the_matrices():
    model, other = (optimized(seed, use_quantization=True, use_lora=True) for seed in (0, 1))
    before = state(model)
    adapters = {name: tensor for name, tensor in other.state_dict().items() if "adapter" in name}
    missing, unexpected = model.load_state_dict(adapters, strict=False)
    assert adapters
    assert not unexpected
    assert set(missing) <= before.keys() - adapters.keys()
    assert all(torch.equal(adapters.get(name, before[name]), tensor) for name, tensor in state(model).items())
