"""Softmax in one pass: the two-pass softmax's numbers, whatever the chunks, where the naive one overflows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.flash.online import absorb, naive_softmax, softmax_of, stream_softmax

SEEDS = range(8)
CHUNKS = (1, 2, 3, 7, 24, 100)


def row(count=24, seed=0, size=1.0, dtype=torch.float64):
    return (size * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_the_softmax_in_two_passes(chunk, seed):
    scores = row(seed=seed, size=30)
    torch.testing.assert_close(softmax_of(stream_softmax(scores, chunk)), scores.softmax(-1), rtol=0, atol=1e-14)


@given(st.lists(st.floats(-1e4, 1e4) | st.just(-math.inf), min_size=1, max_size=40), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_any_row_any_chunk(values, chunk):
    scores = torch.tensor(values, dtype=torch.float64)
    states = list(stream_softmax(scores, chunk))
    expected = scores.softmax(-1).nan_to_num(0.0)  # a row of −∞ has weights of 0, not 0 / 0
    torch.testing.assert_close(softmax_of(states), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(states[-1].maximum + states[-1].sum.log(), scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_state_follows_from_the_one_before_and_tells_the_scores_so_far(chunk):
    scores = row(size=5)
    scores[:4] = -math.inf
    maximum, total, start = torch.tensor(-math.inf).double(), torch.tensor(0.0).double(), 0
    for state in stream_softmax(scores, chunk):
        assert state.columns == slice(start, min(start + chunk, 24))
        assert torch.equal(state.scores, scores[state.columns])
        assert torch.equal(state.maximum_before, maximum)
        assert torch.equal(state.sum_before, total)
        so_far = scores[: state.columns.stop]
        assert state.maximum == so_far.max()
        if state.maximum > -math.inf:
            torch.testing.assert_close(state.rescale, (state.maximum_before - state.maximum).exp(), rtol=0, atol=1e-15)
            torch.testing.assert_close(state.sum, (so_far - so_far.max()).exp().sum())
        else:
            assert state.rescale == state.sum == 0
        maximum, total, start = state.maximum, state.sum, state.columns.stop
    assert start == 24


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_overflow_the_naive_one_only(dtype, chunk, seed):
    scores = row(seed=seed, size=100, dtype=dtype)
    scores[5] = 200
    assert naive_softmax(scores).isnan().any()
    weights = softmax_of(stream_softmax(scores, chunk))
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), scores.double().softmax(-1), rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_naive_overflow_is_the_dtypes():
    """e¹² = 162 755 is beyond float16's 65 504, within bfloat16's 3.4 · 10³⁸."""
    scores = torch.tensor([0.0, 12.0])
    assert torch.equal(naive_softmax(scores.half()).isnan(), torch.tensor([False, True]))
    assert naive_softmax(scores.half())[0] == 0
    assert naive_softmax(scores.bfloat16()).isfinite().all()


def test_naive_overflow_of_the_sum_alone_makes_every_weight_zero():
    """Each e¹¹ = 59 874 is a float16, two of them are not."""
    assert torch.equal(naive_softmax(torch.full((2,), 11.0).half()), torch.zeros(2).half())


@pytest.mark.parametrize("seed", SEEDS)
def test_small_scores_agree_all_round(seed):
    scores = row(seed=seed)
    torch.testing.assert_close(naive_softmax(scores), softmax_of(stream_softmax(scores, 5)))


def test_the_largest_differences_of_the_dtype():
    scores = torch.tensor([65504.0, -65504.0, 65504.0]).half()
    assert torch.equal(softmax_of(stream_softmax(scores, 1)), torch.tensor([0.5, 0.0, 0.5]).half())


def test_nan_is_passed_on():
    scores = torch.tensor([1.0, math.nan, 2.0])
    assert softmax_of(stream_softmax(scores, 1)).isnan().all()


def test_absorb_takes_many_rows_and_some_that_saw_nothing():
    scores = torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]])
    after = absorb(scores, torch.full((2,), -math.inf), torch.zeros(2))
    assert torch.equal(after.maximum, torch.tensor([2.0, -math.inf]))
    assert torch.equal(after.rescale, torch.zeros(2))
    torch.testing.assert_close(after.exponentials, torch.tensor([[math.exp(-1), 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(after.sum, torch.tensor([1 + math.exp(-1), 0.0]))


class TestErrors:
    @pytest.mark.parametrize("chunk", [0, -1])
    def test_a_chunk_has_scores(self, chunk):
        with pytest.raises(ValueError, match=rf"chunk \({chunk}\) must be at least 1"):
            stream_softmax(row(), chunk)

    @pytest.mark.parametrize("scores", [torch.zeros(2, 2), torch.zeros(()), torch.zeros(3, dtype=torch.long)])
    def test_scores_are_a_row_of_numbers(self, scores):
        for call in (naive_softmax, lambda scores: stream_softmax(scores, 1)):
            with pytest.raises(ValueError, match="one row of floating-point numbers"):
                call(scores)

    def test_no_scores(self):
        with pytest.raises(ValueError, match="at least one score"):
            softmax_of(stream_softmax(torch.zeros(0), 4))
