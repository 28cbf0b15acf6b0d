"""Better than rounding: GPTQ and AWQ on single layers and on our own model, judged by outputs and by perplexity."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import engine
from engine import llama
from engine.data import TokenBlocks
from engine.errors import InputError
from engine.model import Decoder, ModelConfig
from engine.pretraining.run import read_stories
from engine.quantization.awq import ScaledTensor, quantize_awq
from engine.quantization.calibration import InputStatistics, collect_statistics
from engine.quantization.gptq import quantize_gptq
from engine.quantization.grouping import per_block, per_channel, per_tensor
from engine.quantization.methods import quantize_layers
from engine.quantization.perplexity import Perplexity, measure_perplexity, read_blocks
from engine.quantization.tensor import quantize

SEEDS = range(3)
STORYTELLER = Path(engine.__file__).parent / "storyteller"
GROUPINGS = [per_tensor(), per_channel(), per_block(32), per_block(20)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer(seed, inputs=64, outputs=48, tokens=1000):
    """A weight and inputs as layers see them: correlated, some much larger than others."""
    w = torch.randn(outputs, inputs, generator=generator(seed))
    x = torch.randn(tokens, inputs // 2, generator=generator(seed + 10)) @ torch.randn(
        inputs // 2, inputs, generator=generator(seed + 20)
    )
    x = x + 0.3 * torch.randn(tokens, inputs, generator=generator(seed + 30))
    return w, x * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator(seed + 40))]


def statistics_of(x):
    return InputStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def output_error(w, approximation, x):
    return ((x @ (approximation - w).T).square().sum() / (x @ w.T).square().sum()).item()


def decoder(seed=0):
    torch.manual_seed(seed)
    return Decoder(ModelConfig(d_model=32, num_layers=2, num_heads=4, vocab_size=50, tie_embeddings=False)).eval()


def blocks(seed=0, vocab=50):
    return TokenBlocks(torch.randint(vocab, (6, 25), generator=generator(seed)))


class TestStatistics:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_are_those_of_the_inputs_that_the_layers_saw(self, seed):
        model, text = decoder(seed), blocks(seed)
        statistics = collect_statistics(model, text, batch_size=4)
        seen = model.layers[0].input_layernorm(model.embed_tokens(text.ids[:, :-1])).reshape(-1, 32).detach()
        first = statistics["layers.0.self_attn.q_proj"]
        torch.testing.assert_close(first.hessian, seen.T @ seen / len(seen))
        torch.testing.assert_close(first.magnitude, seen.abs().mean(0))
        assert first.count == 6 * 24
        assert len(statistics) == 2 * 7 + 1
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("seed", SEEDS)
    def test_tell_the_error_of_the_outputs(self, seed):
        w, x = layer(seed)
        rounded = quantize(w, "int3").dequantize()
        assert statistics_of(x).output_error(w, rounded) == pytest.approx(output_error(w, rounded, x), rel=1e-3)
        assert statistics_of(x).output_error(torch.zeros(2, 64), torch.zeros(2, 64)) == 0

    def test_hooks_are_gone_after_an_error_and_unused_layers_count_nothing(self):
        model = nn.ModuleDict({"used": nn.Embedding(4, 2), "idle": nn.Linear(2, 2)})
        model.forward = lambda ids: model["used"](ids)
        statistics = collect_statistics(model, TokenBlocks(torch.zeros(2, 3, dtype=torch.int32)))
        assert statistics["idle"].count == 0
        assert (statistics["idle"].hessian == 0).all()
        with pytest.raises(IndexError):
            collect_statistics(model, TokenBlocks(torch.full((2, 3), 9)))
        assert not model["idle"]._forward_pre_hooks

    def test_inputs_that_are_not_finite_are_refused_by_name(self):
        model = decoder()
        with torch.no_grad():
            model.layers[1].post_attention_layernorm.weight[0] = math.inf
        with pytest.raises(InputError, match=r"inputs of layers\.1\.mlp\.gate_proj are not finite"):
            collect_statistics(model, blocks())


class TestGPTQ:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", ["int3", "uint3", "nf3", "int4", "fp4-e2m1"])
    @pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
    def test_outputs_are_much_closer_for_the_same_bits(self, seed, name, grouping):
        w, x = layer(seed)
        fitting, other = x[:600], x[600:]
        better = quantize_gptq(w, statistics_of(fitting), name, grouping)
        rounded = quantize(w, name, grouping.within_rows())
        assert better.bits_per_weight == rounded.bits_per_weight
        assert torch.equal(better.scales, rounded.scales)
        assert output_error(w, better.dequantize(), other) < 0.5 * output_error(w, rounded.dequantize(), other)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", ["int3", "uint3", "nf3"])
    def test_with_inputs_that_have_nothing_in_common_it_is_rounding(self, seed, name):
        w, _ = layer(seed)
        for scales in (torch.ones(64), torch.logspace(-1, 1, 64), torch.zeros(64)):
            statistics = InputStatistics(torch.diag(scales), scales, 1)
            assert torch.equal(quantize_gptq(w, statistics, name).codes, quantize(w, name, per_block(64)).codes)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gathered_updates_are_the_plain_ones(self, seed):
        """The definition, one column at a time over all 200, with the inverse made anew for what is left."""
        w, x = layer(seed, inputs=200, outputs=6)
        statistics = statistics_of(x)
        H = statistics.hessian.double()
        H = H + 0.01 * H.diagonal().mean() * torch.eye(200, dtype=torch.float64)
        scale = w.abs().amax(1) / 3
        left, result = w.double().clone(), torch.empty_like(w)
        remaining = statistics.hessian.diagonal().argsort(descending=True, stable=True)
        while len(remaining):
            inverse = torch.linalg.inv(H[remaining][:, remaining])
            j = remaining[0]
            result[:, j] = scale * (left[:, j] / scale).round().clamp(-3, 3)
            error = (left[:, j] - result[:, j]) / inverse[0, 0]
            left[:, remaining] -= error[:, None] * inverse[0]
            remaining = remaining[1:]
        ours = quantize_gptq(w, statistics, "int3", per_channel(), damping=0.01).dequantize()
        assert ((ours - result).abs() < 1e-5).float().mean() > 0.99  # but for rounding errors at a tie
        assert output_error(w, ours, x) == pytest.approx(output_error(w, result, x), rel=0.05)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_fewer_tokens_the_more_damping(self, seed):
        """0.01 + I / 2N: what a few tokens have in common by chance is not made use of."""
        w = torch.randn(48, 128, generator=generator(seed))
        few, other = (torch.randn(tokens, 128, generator=generator(seed + tokens)) for tokens in (64, 2000))
        statistics = statistics_of(few)
        found = quantize_gptq(w, statistics, "int3")
        assert torch.equal(found.codes, quantize_gptq(w, statistics, "int3", damping=0.01 + 128 / (2 * 64)).codes)
        careless = quantize_gptq(w, statistics, "int3", damping=0.01)
        errors = [output_error(w, q.dequantize(), other) for q in (found, careless)]
        assert errors[0] < 0.6 * errors[1]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("scale", [0.003, 1.0, 1000.0])
    def test_inputs_that_are_always_zero_have_no_part_in_the_damping(self, seed, scale):
        w, x = layer(seed, inputs=128)
        x = x * scale / x.abs().mean()
        x[:, torch.randperm(128, generator=generator(seed))[:32]] = 0
        fitting, other = x[:600], x[600:]
        better, rounded = quantize_gptq(w, statistics_of(fitting), "int3"), quantize(w, "int3")
        assert output_error(w, better.dequantize(), other) < 0.6 * output_error(w, rounded.dequantize(), other)

    def test_blocks_that_do_not_divide_rows_are_more_scales(self):
        w, x = layer(0, inputs=100, outputs=64)
        assert quantize(w, "int4").bits_per_weight == 4.5
        assert quantize_gptq(w, statistics_of(x), "int4").bits_per_weight == 4 + 32 * 2 / 100

    def test_double_quantization_and_dtype_are_kept(self):
        w, x = layer(0, outputs=512)
        q = quantize_gptq(w.bfloat16(), statistics_of(x), "int4", per_block(32), double_quantization=True)
        assert q.bits_per_weight == pytest.approx(4 + 8 / 32 + 32 / (32 * 256), abs=2e-3)
        assert q.dequantize().dtype == torch.bfloat16

    def test_wrong_input_is_one_sentence(self):
        w, x = layer(0)
        with pytest.raises(InputError, match=r"shape \(48, 63\) and the statistics are of 64 inputs"):
            quantize_gptq(w[:, :63], statistics_of(x))
        for damping in (0, -1.0, math.inf, math.nan):
            with pytest.raises(InputError, match=rf"damping is {damping}: it must be above 0 and finite"):
                quantize_gptq(w, statistics_of(x), damping=damping)
        for damping in (1e-30, 1e308):
            with pytest.raises(InputError, match=r"cannot be inverted: 0\.01 to 0\.1 is usual"):
                quantize_gptq(w, statistics_of(x[:20]), damping=damping)

    @pytest.mark.parametrize("method", [quantize_gptq, quantize_awq])
    def test_statistics_that_are_no_numbers_are_refused(self, method):
        w, x = layer(0)
        for value in (math.nan, math.inf):
            broken = statistics_of(x)
            broken.hessian[3, 4] = value
            with pytest.raises(InputError, match="statistics hold numbers that are not finite"):
                method(w, broken)


class TestAWQ:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("grouping", GROUPINGS[1:], ids=str)  # with one scale for all, scaling seldom pays
    @pytest.mark.parametrize("name", ["int3", "uint4", "nf3"])
    def test_outputs_are_closer_and_the_scales_are_counted(self, seed, name, grouping):
        w, x = layer(seed)
        fitting, other = x[:600], x[600:]
        better, rounded = quantize_awq(w, statistics_of(fitting), name, grouping), quantize(w, name, grouping)
        assert better.nbytes == rounded.nbytes + 64 * 2
        assert better.bits_per_weight == 8 * better.nbytes / w.numel()
        assert 0 < better.exponent <= 1
        assert output_error(w, better.dequantize(), other) < 0.9 * output_error(w, rounded.dequantize(), other)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_inputs_of_one_size_need_no_scaling(self, seed):
        w, _ = layer(seed)
        even = InputStatistics(torch.eye(64), torch.ones(64), 1)
        better = quantize_awq(w, even, "int3")
        assert better.exponent == 0
        assert torch.equal(better.dequantize(), quantize(w, "int3").dequantize())

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", ["int3", "nf4"])
    def test_small_weights_of_large_inputs_are_scaled_to_the_end(self, seed, name):
        """Where w·x is of one size everywhere, s ∝ |x| makes all weights equally large: α = 1, or next to it."""
        w = torch.randn(48, 64, generator=generator(seed))
        x = torch.randn(600, 64, generator=generator(seed + 10))
        w[:, ::2] /= 10
        x[:, ::2] *= 10
        assert quantize_awq(w, statistics_of(x), name).exponent >= 0.9

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("size", [1e-3, 1e6])
    def test_the_unit_of_the_inputs_does_not_matter(self, seed, size):
        """s is normalised to √(max s · min s) = 1, so that it stays within float16 whatever the inputs' size."""
        w, x = layer(seed)
        x = x / x.abs().mean(0).amin()
        one, other = quantize_awq(w, statistics_of(x), "int3"), quantize_awq(w, statistics_of(size * x), "int3")
        assert one.exponent == other.exponent > 0
        scales = other.input_scales.float()
        assert (scales.max() * scales.min()).item() == pytest.approx(1, rel=2e-3)
        torch.testing.assert_close(one.input_scales, other.input_scales, rtol=2e-3, atol=0)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_double_quantization_is_smaller_and_hardly_worse(self, seed):
        w, x = layer(seed, outputs=512)
        single, double = (
            quantize_awq(w, statistics_of(x), "int4", per_block(32), double_quantization=double)
            for double in (False, True)
        )
        assert single.bits_per_weight - double.bits_per_weight == pytest.approx(24 / 32 - 32 / (32 * 256), abs=2e-3)
        assert double.exponent == single.exponent
        errors = [output_error(w, q.dequantize(), x) for q in (single, double)]
        assert errors[0] != errors[1]
        assert errors[1] < 1.1 * errors[0]

    def test_statistics_of_another_layer_are_refused(self):
        w, x = layer(0)
        with pytest.raises(InputError, match=r"shape \(48, 63\) and the statistics are of 64 inputs"):
            quantize_awq(w[:, :63], statistics_of(x))
        with pytest.raises(InputError, match=r"shape \(48,\) and the statistics are of 64 inputs"):
            quantize_awq(w[:, 0], statistics_of(x))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_largest_numbers_of_a_dtype_stay_finite(self, seed):
        w, x = layer(seed)
        w = (w / w.abs().max() * 65504).half()
        assert quantize_awq(w, statistics_of(x), "uint4").dequantize().isfinite().all()
        beyond = ScaledTensor(quantize(w, "int4"), torch.full((64,), 0.5, dtype=torch.float16), 1.0)
        assert beyond.dequantize().abs().max() == 65504

    def test_a_layer_without_inputs_is_rounded(self):
        w, _ = layer(0)
        nothing = InputStatistics(torch.zeros(64, 64), torch.zeros(64), 0)
        assert torch.equal(quantize_awq(w, nothing).dequantize(), quantize(w, "int4").dequantize())


class TestModels:
    @pytest.mark.parametrize("method", ["rounding", "gptq", "awq"])
    def test_a_copy_computes_with_few_bits_and_says_what_it_cost(self, method):
        model, text = decoder(), blocks()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen = []
        statistics = collect_statistics(model, text)
        small = quantize_layers(
            model,
            "int3",
            per_block(16),
            method=method,
            statistics=statistics,
            on_layer=lambda *report: seen.append(report),
        )
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        report = small.quantization
        assert [layer for layer, _ in seen] == list(report.layers)
        assert {total for _, total in seen} == {15}
        assert [entry.name for entry in report.left] == ["embed_tokens.weight"]
        for entry in report.layers:
            weight = small.get_submodule(entry.name).weight
            assert 3 < entry.bits_per_weight < 6
            if method != "awq":
                assert all(len(row.unique()) <= 7 for row in weight.detach().reshape(-1, 16))
            assert entry.distortion.mse == pytest.approx(
                (weight - model.get_submodule(entry.name).weight).square().mean().item(), rel=1e-4
            )
            assert 0 < entry.output_error < 0.2
        sizes = [math.prod(entry.shape) for entry in report.layers]
        mean = sum(size * entry.bits_per_weight for size, entry in zip(sizes, report.layers, strict=True)) / sum(sizes)
        assert report.bits_per_weight == pytest.approx(mean)

    def test_layers_can_be_chosen(self):
        model = decoder()
        small = quantize_layers(model, "int2", layers=lambda name: name.endswith("layers.1.mlp.up_proj"))
        assert [entry.name for entry in small.quantization.layers] == ["layers.1.mlp.up_proj"]
        assert small.quantization.layers[0].output_error is None
        assert torch.equal(small.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.weight)
        assert {entry.reason for entry in small.quantization.left if entry.name != "embed_tokens.weight"} == {
            "It was not asked for."
        }

    def test_wrong_input_is_one_sentence(self):
        model = decoder()
        with pytest.raises(InputError, match=r"no method 'magic': choose one of rounding, gptq, awq"):
            quantize_layers(model, method="magic")
        with pytest.raises(InputError, match=r"gptq needs the inputs of 15 layers, layers.0.self_attn.q_proj first"):
            quantize_layers(model, method="gptq")
        with pytest.raises(InputError, match="no linear layer"):
            quantize_layers(nn.Embedding(3, 4))


class TestPerplexity:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_is_that_of_the_definition_for_ours_and_transformers(self, seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        theirs, text = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval(), blocks(seed)
        for model in (theirs, llama.from_transformers(theirs)):
            measured = measure_perplexity(model, text, batch_size=4)
            with torch.no_grad():
                expected = theirs(text.ids[:, :-1].long()).logits.log_softmax(-1)
            expected = -expected.gather(-1, text.ids[:, 1:, None].long()).mean().item()
            assert measured.loss == pytest.approx(expected, rel=1e-5)
            assert measured.value == pytest.approx(math.exp(expected), rel=1e-4)
            assert measured.tokens == 6 * 24
            assert len(measured.block_losses) == 6
            assert sum(measured.block_losses) / 6 == pytest.approx(measured.loss)
            alone = measure_perplexity(model, TokenBlocks(text.ids[2:3]))
            assert alone.block_losses == pytest.approx(measured.block_losses[2:3], rel=1e-5)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_an_increase_is_known_as_well_as_blocks_agree_on_it(self, seed):
        hard = torch.randn(200, generator=generator(seed)).double() + 3  # what both models find hard
        rises = 0.05 + 0.3 * torch.randn(200, generator=generator(seed + 1)).double()

        def of(losses):
            return Perplexity(losses.mean().item(), 1, tuple(losses.tolist()))

        increase, error = of(hard + rises).increase_over(of(hard))
        assert increase == pytest.approx(math.exp(rises.mean().item()) - 1)
        assert error == pytest.approx((1 + increase) * rises.std().item() / math.sqrt(200))
        same, exact = of(hard + 0.05).increase_over(of(hard))
        assert (same, exact) == (pytest.approx(math.exp(0.05) - 1), pytest.approx(0, abs=1e-12))
        assert of(hard).increase_over(of(hard)) == (0, 0)

    def test_one_block_and_a_broken_model_have_no_error(self):
        one, other = Perplexity(2.0, 1, (2.0,)), Perplexity(1.0, 1, (1.0,))
        assert math.isnan(one.increase_over(other)[1])
        broken = Perplexity(math.nan, 1, (math.nan, 1.0)).increase_over(Perplexity(1.0, 1, (1.0, 1.0)))
        assert all(map(math.isnan, broken))

    def test_every_module_stays_in_its_mode(self):
        model = nn.Sequential(nn.Embedding(50, 8), nn.Dropout(0.5).eval(), nn.Linear(8, 50)).train()
        model[1].eval()
        measure_perplexity(model, blocks(0))
        assert [module.training for module in model] == [True, False, True]

    def test_beyond_all_numbers_it_is_infinite_and_of_a_broken_model_no_number(self):
        assert Perplexity(1e4, 1).value == math.inf
        assert Perplexity(709.0, 1).value == pytest.approx(math.exp(709))
        assert math.isnan(Perplexity(math.nan, 1).value)

    def test_too_short_a_text_is_refused_and_a_short_one_is_one_block(self):
        tokenizer = AutoTokenizer.from_pretrained(STORYTELLER)
        with pytest.raises(InputError, match=r"has \d+ tokens, too few to measure perplexity on: give 65 or more"):
            read_blocks(["Once upon a time."], tokenizer)
        short = read_blocks(["Once upon a time there was an owl. " * 10], tokenizer)
        assert len(short) == 1
        assert 64 <= short.block_size < 256


@cache
def storyteller():
    """Our own model, stories to test on, and the statistics of others."""
    tokenizer = AutoTokenizer.from_pretrained(STORYTELLER)
    stories = read_stories(STORYTELLER / "heldout.txt")
    model = llama.read(STORYTELLER)
    tested, learned = read_blocks(stories[:10], tokenizer), read_blocks(stories[-40:], tokenizer)
    return model, tested, collect_statistics(model, learned)


@pytest.mark.slow
@pytest.mark.parametrize("grouping", [per_channel(), per_block(64)], ids=str)
@pytest.mark.parametrize(("name", "share"), [("int2", 0.5), ("uint3", 0.2), ("nf3", 0.2)])
def test_three_bits_come_back_to_life(name, share, grouping):
    """GPTQ makes good a part of the loss that rounding to the same levels costs, on stories that it has not seen."""
    model, tested, statistics = storyteller()
    exact = measure_perplexity(model, tested).loss
    rounded, better = (
        quantize_layers(model, name, grouping, method=method, statistics=statistics) for method in ("rounding", "gptq")
    )
    assert better.quantization.bits_per_weight == rounded.quantization.bits_per_weight < 3.6
    cost = measure_perplexity(rounded, tested).loss - exact
    assert cost > 0.02
    assert measure_perplexity(better, tested).loss - exact < (1 - share) * cost
