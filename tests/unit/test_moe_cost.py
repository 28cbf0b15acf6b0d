"""Costs are what the layers really have and do."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import InputError
from engine.model import SwiGLU
from engine.moe.cost import dense, dense_width, expected_used_experts, mixture, training_flops
from engine.moe.feed_forward import MoEFeedForward

SHAPES = ((64, 16, 24, 4, 2), (10, 8, 8, 8, 1), (33, 12, 20, 3, 3), (7, 5, 6, 5, 2))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_the_layers_own(shape):
    num_tokens, d_model, ffn_dim, num_experts, top_k = shape
    cost = mixture(*shape)
    assert cost.parameters == count(MoEFeedForward(d_model, ffn_dim, num_experts, top_k))
    assert cost.active_parameters == cost.parameters - (num_experts - top_k) * count(SwiGLU(d_model, ffn_dim))
    assert dense(num_tokens, d_model, ffn_dim).parameters == count(SwiGLU(d_model, ffn_dim))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_those_that_pytorch_counts(shape):
    num_tokens, d_model, ffn_dim, num_experts, top_k = shape
    x = torch.randn(num_tokens, d_model, dtype=torch.float64)  # a dtype of the loop's, whose products are counted
    for module, cost in (
        (MoEFeedForward(d_model, ffn_dim, num_experts, top_k).double(), mixture(*shape)),
        (SwiGLU(d_model, ffn_dim).double(), dense(num_tokens, d_model, ffn_dim)),
    ):
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() == cost.flops
        x.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        assert counter.get_total_flops() == training_flops(cost.flops, "both")
        assert training_flops(cost.flops, "forward") + training_flops(cost.flops, "backward") == 3 * cost.flops


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_are_what_each_step_reads_and_writes(shape):
    N, D, F, E, K = shape
    A = N * K
    logits, gathering, weighted_sum = (N * D, N * E), (A * D, A * D), (A * D, N * D)
    for rows, cost, around in (
        (A, mixture(*shape, element_bytes=4), (*logits, *gathering, *weighted_sum)),
        (N, dense(N, D, F, element_bytes=4), ()),
    ):
        gate_and_up, silu_times, down = (rows * D, rows * 2 * F), (rows * 2 * F, rows * F), (rows * F, rows * D)
        assert cost.activation_bytes == 4 * sum((*around, *gate_and_up, *silu_times, *down))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_dense_networks_are_equal_in_what_they_say(shape):
    num_tokens, d_model, ffn_dim, num_experts, top_k = shape
    cost = mixture(*shape)
    parameters, flops = (
        dense(num_tokens, d_model, dense_width(ffn_dim, num_experts, top_k, equal)) for equal in ("parameters", "FLOPs")
    )
    assert abs(parameters.parameters - cost.parameters) <= 1.5 * d_model
    assert abs(flops.flops - cost.flops) <= 3 * num_tokens * d_model
    assert flops.parameters <= parameters.parameters
    assert flops.flops <= parameters.flops


def test_only_experts_that_have_a_token_are_read():
    few, many = (mixture(num_tokens, 64, 64, 16, 2) for num_tokens in (1, 10000))
    assert few.weight_bytes == 2 * few.active_parameters
    assert many.weight_bytes == 2 * many.parameters
    assert mixture(8, 64, 64, 16, 2, used_experts=3).weight_bytes == 2 * (64 * 16 + 3 * 3 * 64 * 64)
    assert mixture(0, 64, 64, 16, 2).flops == 0
    assert mixture(0, 64, 64, 16, 2).weight_bytes == 2 * 64 * 16


def test_the_expected_experts_are_those_that_draws_give():
    generator = torch.Generator().manual_seed(0)
    for num_tokens, num_experts, top_k in ((3, 8, 2), (20, 16, 1), (5, 4, 4)):
        draws = torch.rand(4000, num_tokens, num_experts, generator=generator).topk(top_k).indices.flatten(1)
        used = torch.zeros(4000, num_experts).scatter_(1, draws, 1.0).sum(1)
        expected = expected_used_experts(num_tokens, num_experts, top_k)
        assert abs(used.mean() - expected) <= 5 * used.std() / 4000**0.5 + 1e-6


def test_time_is_bound_by_arithmetic_or_by_memory():
    cost = mixture(4096, 256, 512, 8, 2)
    assert cost.milliseconds(1e12, 1e30) == pytest.approx(cost.flops / 1e9)
    assert cost.milliseconds(1e30, 1e12) == pytest.approx(cost.bytes / 1e9)
    assert cost.bytes == cost.weight_bytes + cost.activation_bytes
    assert mixture(4096, 256, 512, 8, 2, element_bytes=4).bytes == 2 * cost.bytes


def test_a_mixture_moves_more_than_the_dense_network_of_equal_flops():
    cost = mixture(4096, 256, 512, 8, 2)
    other = dense(4096, 256, dense_width(512, 8, 2, "FLOPs"))
    assert cost.weight_bytes > other.weight_bytes
    assert cost.activation_bytes > other.activation_bytes


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match=r"top_k \(5\).*num_experts \(4\)"):
        mixture(1, 8, 8, 4, 5)
    with pytest.raises(InputError, match=r"ffn_dim \(0\)"):
        dense(1, 8, 0)


def test_it_needs_no_torch():
    script = "import sys, engine.moe.cost; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
