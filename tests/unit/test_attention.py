"""Attention to the contract: rows that sum to 1, masks that are exactly zero, agreement with PyTorch's own kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine import MultiHeadAttention, ScaledDotProductAttention
from engine.attention import attend, attention_stages
from engine.masks import causal, materialize, padding
from engine.rotary import RotaryEmbedding, rotate

SEEDS = range(8)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestScaledDotProductAttention:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_agrees_with_pytorch(self, seed, is_causal):
        q, k, v = normal(3, 2, 9, 16, seed=seed)
        output, weights = ScaledDotProductAttention(16, causal=is_causal)(q, k, v)
        torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))
        assert weights.shape == (2, 9, 9)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_rows_sum_to_one_and_the_future_is_exactly_zero(self, seed):
        q, k, v = normal(3, 2, 12, 8, seed=seed) * 5
        _, weights = ScaledDotProductAttention(8, causal=True)(q, k, v)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 12))
        assert (weights.triu(1) == 0).all()
        assert (weights >= 0).all()

    @pytest.mark.parametrize("seed", SEEDS)
    def test_doubling_queries_and_keys_sharpens(self, seed):
        q, k, v = normal(3, 4, 10, 64, seed=seed)
        attention = ScaledDotProductAttention(64)
        assert attention(2 * q, 2 * k, v)[0].std() > attention(q, k, v)[0].std()

    def test_scale_is_one_over_the_root_of_the_width(self):
        """A wrong scale (none, or 1/d) changes these weights by far more than rounding."""
        q, k, v = normal(3, 1, 5, 64)
        _, weights = ScaledDotProductAttention(64)(q, k, v)
        torch.testing.assert_close(weights, (q @ k.mT / 8).softmax(-1))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_zero_in_the_mask_means_may_not_attend(self, dtype):
        q, k, v = normal(3, 2, 6, 8)
        allowed = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) > 0.4
        allowed.fill_diagonal_(True)
        output, weights = ScaledDotProductAttention(8)(q, k, v, allowed.to(dtype))
        assert (weights.masked_select(~allowed) == 0).all()
        torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))

    def test_a_causal_mask_and_a_given_mask_both_hold(self):
        q, k, v = normal(3, 1, 4, 8)
        mask = torch.tensor([[1, 1, 1, 1]] * 3 + [[0, 1, 1, 1]])
        _, weights = ScaledDotProductAttention(8, causal=True)(q, k, v, mask)
        assert weights[0, 3, 0] == 0
        assert (weights.triu(1) == 0).all()

    def test_a_fully_masked_row_gives_a_zero_row_and_finite_gradients(self):
        q, k, v = normal(3, 1, 4, 8).requires_grad_().unbind(0)
        mask = torch.ones(4, 4)
        mask[2] = 0
        output, weights = ScaledDotProductAttention(8)(q, k, v, mask)
        assert (weights[0, 2] == 0).all()
        assert (output[0, 2] == 0).all()
        grads = torch.autograd.grad(output.square().sum(), (q, k, v))
        assert all(grad.isfinite().all() for grad in grads)

    def test_gradients_agree_with_pytorch(self):
        ours, theirs = (normal(3, 2, 6, 8).double().requires_grad_() for _ in range(2))
        ScaledDotProductAttention(8, causal=True)(*ours)[0].square().sum().backward()
        F.scaled_dot_product_attention(*theirs, is_causal=True).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=24, max_size=24))
    def test_never_nan_or_inf_for_finite_input(self, numbers):
        q, k, v = torch.tensor(numbers).view(3, 1, 4, 2)
        output, weights = ScaledDotProductAttention(2, causal=True)(q, k, v)
        assert output.isfinite().all()
        assert weights.isfinite().all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))

    def test_nan_in_the_input_is_not_hidden(self):
        q, k, v = normal(3, 1, 4, 8)
        q[0, 1, 0] = math.nan
        assert ScaledDotProductAttention(8)(q, k, v)[0][0, 1].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_close_to_float32_and_does_not_overflow(self, dtype):
        q, k, v = normal(3, 2, 16, 64) * 40  # logits up to about 10^4 before the scale: q·k overflows float16
        output, weights = ScaledDotProductAttention(64)(q.to(dtype), k.to(dtype), v.to(dtype))
        assert output.dtype == weights.dtype == dtype
        exact, _ = ScaledDotProductAttention(64)(*(x.to(dtype).float() for x in (q, k, v)))
        assert (output.float() - exact).abs().max() <= 2 ** -(7 if dtype == torch.bfloat16 else 10) * v.abs().max()

    def test_shapes_that_do_not_fit_are_named(self):
        attention = ScaledDotProductAttention(8)
        with pytest.raises(ValueError, match=r"8.*\(1, 4, 6\)"):
            attention(normal(1, 4, 6), normal(1, 4, 6), normal(1, 4, 6))
        with pytest.raises(ValueError, match=r"\(3, 3\).*\(1, 4, 4\)"):
            attention(*normal(3, 1, 4, 8), torch.ones(3, 3))

    def test_works_under_torch_compile(self):
        q, k, v = normal(3, 2, 8, 16)
        attention = ScaledDotProductAttention(16, causal=True)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(compiled(q, k, v), attention(q, k, v), strict=True):
            torch.testing.assert_close(ours, theirs)


class TestStages:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_every_stage_follows_from_the_one_before(self, seed):
        q, k, v = normal(3, 2, 4, 7, 16, seed=seed)
        mask = materialize(causal, 7)
        stages = attention_stages(q, k, v, mask, temperature=0.5)
        torch.testing.assert_close(stages.scores, q @ k.mT)
        torch.testing.assert_close(stages.scaled, stages.scores / (4 * 0.5))
        assert torch.equal(stages.masked.isneginf(), ~mask.expand_as(stages.masked))
        torch.testing.assert_close(stages.weights, stages.masked.softmax(-1))
        torch.testing.assert_close(stages.output, stages.weights @ v)

    def test_stages_and_the_lean_path_agree_exactly(self):
        q, k, v = normal(3, 2, 4, 7, 16)
        mask = materialize(causal, 7)
        stages = attention_stages(q, k, v, mask)
        output, weights = attend(q, k, v, mask)
        assert torch.equal(stages.output, output)
        assert torch.equal(stages.weights, weights)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_temperature_orders_the_entropy(self, seed):
        q, k, v = normal(3, 1, 2, 9, 16, seed=seed)
        entropies = [
            torch.special.entr(attend(q, k, v, temperature=temperature)[1]).sum(-1).mean()
            for temperature in (0.1, 0.5, 1.0, 2.0, 10.0)
        ]
        assert entropies == sorted(entropies)

    def test_a_negative_scale_turns_the_preference_around_and_stays_finite(self):
        q, k, v = normal(3, 1, 2, 5, 8)
        torch.testing.assert_close(attend(q, k, v, scale=-0.5)[1], (-0.5 * q @ k.mT).softmax(-1))
        assert attend(q * 1e15, k * 1e15, v, scale=-1e10)[1].isfinite().all()

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, 1e-320])
    def test_a_temperature_that_is_not_positive_is_refused(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            attend(*normal(3, 1, 2, 3, 4), temperature=temperature)

    def test_grouped_queries_read_the_keys_of_their_group(self):
        q, k, v = normal(1, 6, 5, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2)
        output, weights = attend(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(weights[:, 2], attend(q[:, 2:3], k[:, :1], v[:, :1])[1][:, 0])
        with pytest.raises(ValueError, match=r"6.*4"):
            attend(q, normal(1, 4, 5, 8), normal(1, 4, 5, 8))


class TestMultiHeadAttention:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_fresh_heads_differ(self, seed):
        torch.manual_seed(seed)
        x = torch.randn(4, 10, 512)
        _, weights = MultiHeadAttention(512, 8)(x, x, x)
        assert weights.var(dim=1).mean() > 0.01

    @pytest.mark.parametrize("seed", range(40))
    def test_fresh_heads_focus_on_different_positions(self, seed):
        torch.manual_seed(seed)
        x = torch.zeros(1, 10, 64)
        x[:, 0] = x[:, -1] = 1
        _, weights = MultiHeadAttention(64, 4)(x, x, x)
        assert weights[0, :, 0].argmax(-1).unique().numel() >= 2
        assert weights[0].mean(1).argmax(-1).unique().numel() >= 2

    @pytest.mark.parametrize("seed", SEEDS)
    def test_fresh_logits_have_a_standard_deviation_near_two(self, seed):
        torch.manual_seed(seed)
        x = torch.randn(8, 16, 512)
        assert MultiHeadAttention(512, 8).stages(x, x, x).scaled.std().item() == pytest.approx(2, rel=0.1)

    def test_fresh_values_and_outputs_keep_the_variance_of_the_input(self):
        torch.manual_seed(0)
        attention, x = MultiHeadAttention(512, 8), torch.randn(4, 16, 512)
        assert attention.v_proj(x).std().item() == pytest.approx(1, rel=0.1)
        assert attention.o_proj(x).std().item() == pytest.approx(1, rel=0.1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("share", [1.0, -1.0, 0.5, 1e-3])
    def test_never_nan_or_inf_for_finite_input(self, dtype, share):
        torch.manual_seed(0)
        x = torch.full((1, 4, 64), share * torch.finfo(dtype).max, dtype=dtype)
        x[:, ::2] *= -1
        output, weights = MultiHeadAttention(64, 4, rotary=RotaryEmbedding(16)).to(dtype)(x, x, x)
        assert output.isfinite().all()
        assert weights.isfinite().all()

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_agrees_with_pytorchs_layer(self, seed, bias):
        torch.manual_seed(seed)
        ours, theirs = MultiHeadAttention(32, 4, bias=bias), nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
        with torch.no_grad():
            parts = [ours.q_proj, ours.k_proj, ours.v_proj]
            theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            theirs.out_proj.weight.copy_(ours.o_proj.weight)
            if bias:
                for part in [*parts, ours.o_proj]:
                    part.bias.normal_()
                theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                theirs.out_proj.bias.copy_(ours.o_proj.bias)
        query, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        output, weights = ours(query, memory, memory)
        expected, expected_weights = theirs(query, memory, memory, average_attn_weights=False)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(weights, expected_weights)

    def test_masks_of_every_rank(self):
        torch.manual_seed(0)
        attention, x = MultiHeadAttention(16, 2), torch.randn(3, 6, 16)
        square = materialize(causal, 6)
        reference, weights = attention(x, x, x, square)
        assert (weights.triu(1) == 0).all()
        for mask in (square.expand(3, 6, 6), square.expand(3, 2, 6, 6), square[None, None]):
            assert torch.equal(attention(x, x, x, mask)[0], reference)
        ragged = materialize(padding(torch.tensor([6, 3, 1])), 6, batch=3)
        assert (attention(x, x, x, ragged)[1][1, ..., 3:] == 0).all()

    def test_padding_changes_nothing_for_the_tokens_before_it(self):
        torch.manual_seed(0)
        attention, x = MultiHeadAttention(16, 2), torch.randn(1, 6, 16)
        mask = materialize(padding(torch.tensor([4])), 6, batch=1)
        short, _ = attention(x[:, :4], x[:, :4], x[:, :4])
        torch.testing.assert_close(attention(x, x, x, mask)[0][:, :4], short)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"d_model": 10, "num_heads": 3}, r"10.*3"),
            ({"d_model": 12, "num_heads": 4, "num_kv_heads": 3}, r"4.*3"),
            ({"d_model": 12, "num_heads": 0}, "0"),
        ],
    )
    def test_heads_that_do_not_divide_are_named(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            MultiHeadAttention(**arguments)

    def test_a_head_width_of_its_own_needs_no_division(self):
        attention = MultiHeadAttention(10, 3, head_dim=8)
        x = normal(1, 4, 10)
        assert attention(x, x, x)[0].shape == (1, 4, 10)

    def test_trains_and_runs_in_both_modes(self):
        torch.manual_seed(0)
        attention, x = MultiHeadAttention(16, 4, num_kv_heads=2, rotary=RotaryEmbedding(4)), torch.randn(2, 5, 16)
        attention(x, x, x)[0].square().mean().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in attention.parameters())
        torch.testing.assert_close(attention.eval()(x, x, x)[0], attention.train()(x, x, x)[0])


class TestRotary:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_scores_depend_on_the_distance_alone(self, seed):
        rotary = RotaryEmbedding(16)
        q, k = normal(2, 1, 16, seed=seed).double()
        near = rotary(q, torch.tensor([3])) @ rotary(k, torch.tensor([1])).mT
        far = rotary(q, torch.tensor([103])) @ rotary(k, torch.tensor([101])).mT
        other = rotary(q, torch.tensor([4])) @ rotary(k, torch.tensor([1])).mT
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(near, other)

    def test_rotation_keeps_the_length_and_leaves_position_zero_alone(self):
        rotary, x = RotaryEmbedding(8), normal(2, 5, 8)
        rotated = rotary(x, torch.arange(5))
        torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(rotated[:, 0], x[:, 0])

    def test_agrees_with_the_complex_form(self):
        """RoFormer, equation 13: multiply by e^(i·m·θ) with the two halves as real and imaginary part."""
        x, positions = normal(5, 8), torch.arange(5)
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
        turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
        expected = torch.cat([turned.real, turned.imag], -1)
        torch.testing.assert_close(RotaryEmbedding(8)(x, positions), expected)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gradients_are_those_of_finite_differences(self, seed):
        x, table = normal(2, 3, 5, 8, seed=seed).double().requires_grad_(), RotaryEmbedding(8).table(torch.arange(5))
        assert torch.autograd.gradcheck(lambda x: rotate(x, table.double()), x)
        assert torch.autograd.gradgradcheck(lambda x: rotate(x, table.double()), x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_it_has_the_same_gradients(self, dtype):
        """PyTorch 2.11 had none in float32; 2.13 finds them behind a `.to` that does nothing as well."""
        torch._dynamo.reset()
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        upstream = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        table = RotaryEmbedding(8).table(torch.arange(5))
        compiled = torch.compile(rotate, backend="aot_eager")
        found, wanted = (torch.autograd.grad(turn(x, table), x, upstream)[0] for turn in (compiled, rotate))
        torch.testing.assert_close(found, wanted)

    def test_saves_nothing_but_the_table(self):
        x, table = normal(2, 3, 5, 8).requires_grad_(), RotaryEmbedding(8).table(torch.arange(5))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
            rotate(x, table)
        assert saved == [table.data_ptr()]

    def test_keeps_the_layout_of_heads_that_lie_side_by_side(self):
        """So that what attention makes of them is joined again without a copy."""
        x = normal(2, 5, 3, 8).transpose(1, 2)
        rotated = RotaryEmbedding(8)(x, torch.arange(5))
        assert rotated.stride() == x.stride()
        assert torch.equal(rotated, RotaryEmbedding(8)(x.contiguous(), torch.arange(5)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_once(self, dtype):
        x, positions = normal(2, 5, 8).to(dtype), torch.arange(1000, 1005)
        expected = RotaryEmbedding(8)(x.float(), positions).to(dtype)
        assert torch.equal(RotaryEmbedding(8)(x, positions), expected)

    def test_an_odd_width_is_refused(self):
        with pytest.raises(ValueError, match="7"):
            RotaryEmbedding(7)


def test_printing_a_layer_names_its_settings():
    assert "16, causal=True" in repr(ScaledDotProductAttention(16, causal=True))
    assert "theta=500" in repr(MultiHeadAttention(16, 2, rotary=RotaryEmbedding(8, theta=500.0)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_cpu(dtype):
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(64, 4, rotary=RotaryEmbedding(16)).to(dtype), torch.randn(2, 33, 64).to(dtype)
    mask = materialize(causal, 33)
    reference, _ = attention.float()(x.float(), x.float(), x.float(), mask)
    output, weights = attention.to("cuda", dtype)(x.cuda(), x.cuda(), x.cuda(), mask.cuda())
    assert (weights.triu(1) == 0).all()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    assert (output.float().cpu() - reference).abs().max() < tolerance * reference.abs().max()
