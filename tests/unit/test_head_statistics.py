"""Each statistic on maps whose answer is known by construction, and on random maps for its bounds."""

import math

import pytest
import torch

from engine.head_statistics import (
    entropy,
    first_token_mass,
    head_roles,
    induction_score,
    mean_distance,
    previous_token_score,
    probe_periods,
    repeated_random_tokens,
)

T = 12


def uniform_causal(length=T):
    return torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]


def attending(offset, length=T):
    """Each query puts everything on the key `offset` before it, or on the first token."""
    weights = torch.zeros(length, length)
    for query in range(length):
        weights[query, max(query - offset, 0)] = 1
    return weights


def random_causal(seed, *shape):
    logits = torch.randn(*shape, T, T, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


def test_one_hot_maps_have_no_entropy_and_uniform_ones_the_most():
    assert entropy(attending(1)) == 0
    expected = sum(math.log(n) for n in range(1, T + 1)) / T
    assert entropy(uniform_causal()).item() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_entropy_lies_between_the_two(seed):
    values = entropy(random_causal(seed, 3, 4))
    assert values.shape == (3, 4)
    assert (values > 0).all()
    assert (values < entropy(uniform_causal())).all()


def test_distance_counts_tokens():
    assert mean_distance(attending(0)) == 0
    assert mean_distance(attending(3)).item() == pytest.approx((0 + 1 + 2 + 3 * (T - 3)) / T)
    assert mean_distance(attending(3).T.contiguous()).item() > 0  # looking ahead is a distance too


def test_the_first_token_is_not_counted_as_its_own_sink():
    assert first_token_mass(attending(T)) == 1
    assert first_token_mass(attending(0)) == 0


def test_previous_token_score():
    assert previous_token_score(attending(1)) == 1
    assert previous_token_score(attending(0)) == 0
    assert previous_token_score(attending(2)).item() == pytest.approx(1 / (T - 1))  # query 1 can only look at 0


def test_induction_looks_one_past_the_earlier_occurrence():
    period = T // 2
    assert induction_score(attending(period - 1), period) == 1
    assert induction_score(attending(period), period) == 0  # that is the duplicate itself, not its successor
    assert induction_score(attending(1), period) == 0
    with pytest.raises(ValueError, match=f"{T + 1}"):
        induction_score(attending(1), T + 1)


@pytest.mark.parametrize("longest", [20, 25, 32])
def test_looking_equally_far_back_is_induction_on_one_probe_period_only(longest):
    periods = probe_periods(longest)
    assert max(periods) == longest
    for back in (period - 1 for period in periods):
        assert sum(induction_score(attending(back, 2 * period), period) for period in periods) == 1


def test_one_token_has_neither_a_previous_nor_a_sink():
    for statistic in (first_token_mass, previous_token_score):
        assert statistic(torch.ones(3, 1, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_probe_repeats_exactly_and_never_repeats_inside(seed):
    tokens = repeated_random_tokens(vocab_size=1000, period=20, batch=3, seed=seed)
    assert tokens.shape == (3, 40)
    assert torch.equal(tokens[:, :20], tokens[:, 20:])
    assert all(row[:20].unique().numel() == 20 for row in tokens)
    assert torch.equal(tokens, repeated_random_tokens(1000, 20, 3, seed))
    assert not torch.equal(tokens, repeated_random_tokens(1000, 20, 3, seed + 1))
    with pytest.raises(ValueError, match="10"):
        repeated_random_tokens(vocab_size=10, period=20, batch=1, seed=0)


def test_roles_name_what_a_head_does():
    period = T // 2
    maps = torch.stack([attending(1), attending(period - 1), attending(T), uniform_causal()])[None]
    assert head_roles(maps, period) == [["previous token", "induction", "sink", ""]]


def test_an_induction_head_that_rests_while_there_is_nothing_to_look_up_is_no_sink():
    period = T // 2
    resting = attending(period - 1) * 0.6 + attending(T) * 0.4
    assert first_token_mass(resting) > 0.5
    assert head_roles(resting[None, None], period) == [["induction"]]
