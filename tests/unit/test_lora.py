"""The contract's adapters: they start at nothing, learn in the right order, and leave the base alone."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from engine import AttentionWithLoRA, LoRALayer, MultiHeadAttention, create_attention_with_lora
from engine.errors import InputError
from engine.lora.layer import LARGEST_ALPHA, SMALLEST_ALPHA, rank_stabilized_scaling, standard_scaling
from engine.rotary import RotaryEmbedding

SEEDS = range(4)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


class TestLoRALayer:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("training", [True, False])
    def test_starts_at_exactly_zero_output(self, seed, training):
        torch.manual_seed(seed)
        layer = LoRALayer(32, 48, rank=4, alpha=8).train(training)
        assert layer.A.shape == (32, 4)
        assert layer.B.shape == (4, 48)
        assert torch.equal(layer.B, torch.zeros(4, 48))
        assert torch.equal(layer(normal(2, 5, 32, seed=seed)), torch.zeros(2, 5, 48))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_starts_small_but_not_at_zero(self, seed):
        torch.manual_seed(seed)
        A = LoRALayer(512, 64, rank=16).A
        assert 0.001 < A.std() < 0.1
        assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.05)

    def test_has_under_a_tenth_of_the_dense_parameters(self):
        layer = LoRALayer(1024, 1024, rank=32)
        assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * 32 * 1024 < 0.1 * 1024**2

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("alpha", [None, 1, 6.0])
    def test_output_is_x_a_b_scaled(self, seed, alpha):
        torch.manual_seed(seed)
        layer = LoRALayer(12, 20, rank=3, alpha=alpha)
        with torch.no_grad():
            layer.B.normal_()
        x = normal(2, 7, 12, seed=seed)
        expected = (x @ layer.A @ layer.B) * ((3 if alpha is None else alpha) / 3)
        torch.testing.assert_close(layer(x), expected)

    def test_rank_stabilized_scaling_divides_by_the_root(self):
        assert LoRALayer(64, 64, 16, 8, scaling_rule=rank_stabilized_scaling).scaling == 2.0

    @pytest.mark.parametrize("seed", SEEDS)
    def test_first_gradient_reaches_b_only_and_both_from_the_second_step_on(self, seed):
        torch.manual_seed(seed)
        layer = LoRALayer(16, 16, rank=4)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        x, target = normal(8, 16, seed=seed), normal(8, 16, seed=seed + 100)
        for step in range(4):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            assert layer.B.grad.abs().max() > 0
            if step == 0:
                assert torch.equal(layer.A.grad, torch.zeros_like(layer.A))
            else:
                assert layer.A.grad.abs().max() > 0
            optimizer.step()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [1.0, 1e4, "max"])
    def test_finite_input_gives_finite_output(self, dtype, value):
        torch.manual_seed(0)
        layer = LoRALayer(64, 32, rank=4, alpha=64).to(dtype)
        with torch.no_grad():
            layer.B.normal_()
        size = torch.finfo(dtype).max if value == "max" else value
        x = torch.sign(normal(3, 64)).to(dtype) * size
        assert layer(x).isfinite().all()
        assert layer(x.abs()).isfinite().all()

    @pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("value", [1e6, torch.finfo(torch.float32).max])
    def test_finite_input_gives_finite_output_under_autocast(self, autocast, value):
        torch.manual_seed(0)
        layer, attention = LoRALayer(16, 16, rank=4), MultiHeadAttention(16, 2)
        with torch.no_grad():
            layer.B.normal_()
        x = torch.sign(normal(2, 3, 16)) * value
        with torch.autocast("cpu", dtype=autocast):
            for y in (layer(x), layer(x.abs()), *attention.project(x, x, x)):
                assert y.isfinite().all()
            assert layer(x).dtype == autocast

    @pytest.mark.parametrize("rank", [0, -1, 9])
    def test_rank_out_of_range_names_value_and_bound(self, rank):
        with pytest.raises(InputError, match=rf"rank is {rank}: it must be from 1 to 8, .* 8 inputs and 16 outputs"):
            LoRALayer(8, 16, rank)

    @pytest.mark.parametrize("alpha", [0, -1.0, 9e-7, 1.1e6, 1e41, 1e-40, math.inf, math.nan])
    def test_alpha_out_of_range_names_value_and_bounds(self, alpha):
        with pytest.raises(InputError, match=rf"alpha is {re.escape(str(alpha))}: it must be from 1e-06 to 1e\+06\."):
            LoRALayer(8, 8, 2, alpha)

    @pytest.mark.parametrize("alpha", [SMALLEST_ALPHA, LARGEST_ALPHA])
    @pytest.mark.parametrize("rule", [standard_scaling, rank_stabilized_scaling])
    def test_starts_at_zero_with_every_alpha(self, alpha, rule):
        layer = LoRALayer(8, 8, 4, alpha, scaling_rule=rule)
        assert torch.equal(layer(normal(3, 8)), torch.zeros(3, 8))

    def test_says_its_shape(self):
        assert "8, 16, rank=2, scaling=2" in repr(LoRALayer(8, 16, 2, 4))

    @pytest.mark.slow
    def test_compiles(self):
        torch.manual_seed(0)
        layer = LoRALayer(16, 24, rank=4)
        with torch.no_grad():
            layer.B.normal_()
        x = normal(5, 16)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


class TestAttentionWithLoRA:
    @staticmethod
    def build(seed, **options):
        torch.manual_seed(seed)
        base = MultiHeadAttention(32, 4, **options)
        widths = base.q_proj.out_features, base.k_proj.out_features
        return base, AttentionWithLoRA(base, LoRALayer(32, widths[0], 4), LoRALayer(32, widths[1], 4))

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "bias": True}, {"rotary": RotaryEmbedding(8)}])
    def test_starts_equal_to_the_base(self, seed, training, options):
        base, adapted = self.build(seed, **options)
        adapted.train(training)
        x = normal(2, 6, 32, seed=seed)
        mask = torch.ones(6, 6).tril()
        for given, wanted in zip(adapted(x, x, x, mask), base(x, x, x, mask), strict=True):
            torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_equals_attention_with_the_sums_as_weights(self, seed):
        base, adapted = self.build(seed)
        x = normal(2, 6, 32, seed=seed)
        with torch.no_grad():
            adapted.lora_q.B.normal_(std=0.3)
            adapted.lora_k.B.normal_(std=0.3)
            given = adapted(x, x, x)
            assert (given[0] - base(x, x, x)[0]).abs().max() > 1e-3
            base.q_proj.weight += (adapted.lora_q.A @ adapted.lora_q.B).T * adapted.lora_q.scaling
            base.k_proj.weight += (adapted.lora_k.A @ adapted.lora_k.B).T * adapted.lora_k.scaling
            adapted.reset_parameters()  # B is 0 again
        for found, wanted in zip(given, base(x, x, x), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(adapted.lora_q.B, torch.zeros_like(adapted.lora_q.B))

    def test_only_the_adapters_learn(self):
        base, adapted = self.build(0)
        assert not any(parameter.requires_grad for parameter in base.parameters())
        expected = {id(p) for p in (adapted.lora_q.A, adapted.lora_q.B, adapted.lora_k.A, adapted.lora_k.B)}
        assert {id(parameter) for parameter in adapted.lora_parameters()} == expected
        assert {id(p) for p in adapted.parameters() if p.requires_grad} == expected
        before = {name: value.clone() for name, value in base.state_dict().items()}
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
        x = normal(2, 6, 32)
        for _ in range(3):
            optimizer.zero_grad()
            adapted(x, x, x)[0].square().sum().backward()
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())

    def test_an_adapter_of_another_shape_is_named(self):
        base = MultiHeadAttention(32, 4, num_kv_heads=2)
        with pytest.raises(ValueError, match="lora_k maps 32 to 32, k_proj 32 to 16"):
            AttentionWithLoRA(base, LoRALayer(32, 32, 4), LoRALayer(32, 32, 4))

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("d_model", "rank"), [(64, 4), (128, 16)])
    def test_ten_steps_change_the_output(self, seed, d_model, rank):
        torch.manual_seed(seed)
        attention = create_attention_with_lora(d_model, rank)
        x = normal(2, 10, d_model, seed=seed)
        before = attention(x, x, x)[0].detach()
        optimizer = torch.optim.AdamW(attention.lora_parameters(), lr=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            attention(x, x, x)[0].sum().backward()
            optimizer.step()
        assert (attention(x, x, x)[0] - before).abs().max() > 1e-3

    def test_takes_the_number_of_heads(self):
        assert create_attention_with_lora(32, 2, num_heads=8).num_heads == 8
        with pytest.raises(ValueError, match=r"32.*5"):
            create_attention_with_lora(32, 2, num_heads=5)

    @pytest.mark.slow
    def test_compiles(self):
        attention = create_attention_with_lora(32, 4)
        with torch.no_grad():
            attention.lora_q.B.normal_(std=0.3)
        x = normal(2, 6, 32)
        compiled = torch.compile(attention, fullgraph=True)
        for given, wanted in zip(compiled(x, x, x), attention(x, x, x), strict=True):
            torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
