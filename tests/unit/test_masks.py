"""Masks are small functions of (batch, head, query, key) that compose; their matrices are what the names say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.masks import (
    bidirectional,
    causal,
    from_matrix,
    intersection,
    materialize,
    padding,
    prefix_lm,
    sliding_window,
    union,
)

lengths = st.integers(1, 24)


@given(lengths)
def test_causal_is_the_lower_triangle(length):
    assert torch.equal(materialize(causal, length), torch.ones(length, length).tril().bool())


@given(lengths)
def test_bidirectional_allows_everything(length):
    assert materialize(bidirectional, length).all()


@given(lengths, st.integers(1, 30))
def test_window_lets_a_query_see_itself_and_its_window_minus_one_neighbours(length, window):
    allowed = materialize(intersection(causal, sliding_window(window)), length)
    expected = [min(window, query + 1) for query in range(length)]
    assert allowed.sum(-1).tolist() == expected
    assert allowed.diagonal().all()


@given(lengths)
def test_a_window_as_long_as_the_text_is_no_window(length):
    assert torch.equal(materialize(intersection(causal, sliding_window(length)), length), materialize(causal, length))


@given(lengths, st.integers(0, 30))
def test_prefix_lm_is_bidirectional_inside_the_prefix_and_causal_after(length, prefix):
    allowed = materialize(prefix_lm(prefix), length)
    inside = min(prefix, length)
    assert allowed[:inside, :inside].all()
    assert torch.equal(allowed[:, inside:], materialize(causal, length)[:, inside:])
    assert torch.equal(materialize(prefix_lm(0), length), materialize(causal, length))


def test_padding_hides_the_keys_past_each_length():
    allowed = materialize(padding(torch.tensor([2, 4])), 4, batch=2)  # (2, 1, 4, 4)
    assert allowed.shape == (2, 1, 4, 4)
    assert allowed[0].sum(-1).unique().tolist() == [2]
    assert allowed[1].all()


def test_a_custom_matrix_comes_back_and_composes():
    matrix = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(materialize(from_matrix(matrix), 5), matrix)
    assert torch.equal(materialize(intersection(causal, from_matrix(matrix)), 5), matrix & materialize(causal, 5))
    assert torch.equal(materialize(union(causal, from_matrix(matrix)), 5), matrix | materialize(causal, 5))


def test_fewer_queries_than_keys_are_the_last_positions():
    """As with a cache of keys: the last row of the whole matrix is what the newest token may see."""
    whole = materialize(intersection(causal, sliding_window(3)), 6)
    assert torch.equal(materialize(intersection(causal, sliding_window(3)), 2, 6), whole[-2:])


@pytest.mark.parametrize(("build", "value"), [(sliding_window, 0), (sliding_window, -3), (prefix_lm, -1)])
def test_impossible_sizes_are_named(build, value):
    with pytest.raises(ValueError, match=str(value)):
        build(value)


def test_masks_are_what_flex_attention_takes():
    from torch.nn.attention.flex_attention import create_mask

    mask = intersection(causal, sliding_window(3))
    assert torch.equal(create_mask(mask, 1, 1, 7, 7, device="cpu")[0, 0], materialize(mask, 7))
