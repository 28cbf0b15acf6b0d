"""The spectrum of an update, against the decomposition of the whole matrix."""

import math

import pytest
import torch

from engine.lora.spectrum import captured_energy, delta_weight, effective_rank, singular_values, stable_rank


def factors(seed, inputs=40, outputs=24, rank=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(inputs, rank, generator=generator), torch.randn(rank, outputs, generator=generator)
    return A.to(dtype), B.to(dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(40, 24, 6), (24, 40, 1), (8, 8, 8), (6, 30, 10), (30, 6, 10)])
@pytest.mark.parametrize("scaling", [1.0, 0.25, -3.0])
def test_singular_values_are_those_of_the_whole_matrix(seed, inputs, outputs, rank, scaling):
    A, B = factors(seed, inputs, outputs, rank)
    whole = delta_weight(A, B, scaling)
    assert whole.shape == (outputs, inputs)
    torch.testing.assert_close(whole, scaling * (A @ B).T)
    found = singular_values(A, B, scaling)
    expected = torch.linalg.svdvals(whole)
    torch.testing.assert_close(found, expected[: len(found)])
    assert expected[len(found) :].abs().sum() < 1e-9


def test_the_whole_matrix_is_never_made():
    A, B = factors(0, 200_000, 200_000, 2, torch.float32)  # it would take 160 GB
    assert singular_values(A, B).shape == (2,)


def test_half_precision_is_decomposed_in_float32():
    A, B = factors(0, dtype=torch.bfloat16)
    assert singular_values(A, B).dtype == delta_weight(A, B).dtype == torch.float32


@pytest.mark.parametrize("seed", range(3))
def test_captured_energy_rises_to_one(seed):
    A, B = factors(seed)
    sigma = singular_values(A, B)
    energy = captured_energy(sigma)
    assert (energy.diff() >= 0).all()
    assert energy[-1].item() == pytest.approx(1)
    U, S, Vh = torch.linalg.svd(A @ B)
    for k in (1, 3):
        kept = (U[:, :k] * S[:k]) @ Vh[:k]
        assert energy[k - 1].item() == pytest.approx((kept.norm() / (A @ B).norm()).item() ** 2)


def test_ranks_of_what_is_known():
    equal = torch.full((5,), 2.0, dtype=torch.float64)
    assert effective_rank(equal) == pytest.approx(5)
    assert stable_rank(equal) == pytest.approx(5)
    single = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert effective_rank(single) == pytest.approx(1)
    assert stable_rank(single) == pytest.approx(1)
    two = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(two) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert stable_rank(two) == pytest.approx(10 / 9)


def test_an_update_of_zero_has_rank_zero():
    A, B = factors(0)
    sigma = singular_values(A, torch.zeros_like(B))
    assert effective_rank(sigma) == stable_rank(sigma) == 0
    assert torch.equal(captured_energy(sigma), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_cancel_have_no_direction_and_small_changes_have_theirs(seed, scale, dtype):
    A, B = factors(seed, 256, 192, 8, dtype)
    A = scale * A
    sigma = singular_values(torch.cat([A, A], dim=1), torch.cat([B, -B]), 2.0)
    assert torch.equal(sigma, torch.zeros(16))
    assert effective_rank(sigma) == 0
    change = torch.zeros_like(B)
    change[0, 0] = 0.25 * 2**-4
    sigma = singular_values(torch.cat([A, A], dim=1), torch.cat([B + change, -B]), 2.0)
    assert effective_rank(sigma) == pytest.approx(1, abs=0.1)
    if dtype == torch.float32:
        assert sigma[0].item() == pytest.approx(2 * (A[:, :1] @ change[:1]).norm().item(), rel=1e-2)
