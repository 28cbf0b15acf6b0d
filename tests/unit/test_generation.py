"""Text from a decoder: drawn from the distribution that was asked for, and the same with a cache as without."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.generation import GREEDY, Sampling, draw, generate, next_distribution
from engine.model import Decoder, ModelConfig

SEEDS = range(3)
VOCAB, CONTEXT = 40, 32
SAMPLINGS = [
    GREEDY,
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=5),
    Sampling(top_p=0.8),
    Sampling(temperature=0.9, top_k=12, top_p=0.6),
]


def decoder(seed=0, **changes):
    """A random decoder whose next-token probabilities are far from equal."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": VOCAB}
    model = Decoder(ModelConfig(**sizes | {"max_seq_len": CONTEXT} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def prompt(seed, batch=3, length=5):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(seed, batch=4, vocab=30):
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestDistribution:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
    def test_without_a_cut_it_is_the_softmax(self, seed, temperature):
        logits = logits_of(seed)
        expected = (logits.double() / temperature).exp()
        expected /= expected.sum(1, keepdim=True)
        torch.testing.assert_close(next_distribution(logits, Sampling(temperature=temperature)), expected)

    @given(
        seed=st.integers(0, 10**6),
        temperature=st.floats(0, 100),
        top_k=st.none() | st.integers(1, 40),
        top_p=st.none() | st.floats(1e-9, 1),
    )
    @settings(max_examples=60, derandomize=True, deadline=None)
    def test_rows_are_probabilities_and_the_most_probable_token_stays(self, seed, temperature, top_k, top_p):
        logits = logits_of(seed)
        probabilities = next_distribution(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
        assert (probabilities >= 0).all()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4, dtype=torch.float64))
        assert (probabilities.gather(1, logits.argmax(1, keepdim=True))[:, 0] >= probabilities.amax(1)).all()

    @pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-300, 1e-6])
    def test_hardly_any_temperature_is_greedy(self, temperature):
        logits = logits_of(0)
        expected = torch.nn.functional.one_hot(logits.argmax(1), 30).double()
        torch.testing.assert_close(next_distribution(logits, Sampling(temperature=temperature)), expected)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("top_k", [1, 4, 29, 30, 1000])
    def test_top_k_keeps_the_k_most_probable_in_proportion(self, seed, top_k):
        logits = logits_of(seed)
        whole, cut = logits.double().softmax(1), next_distribution(logits, Sampling(top_k=top_k))
        kept = cut > 0
        assert (kept.sum(1) == min(top_k, 30)).all()
        for row in range(4):
            assert kept[row].all() or whole[row, kept[row]].min() > whole[row, ~kept[row]].max()
            torch.testing.assert_close(cut[row, kept[row]], whole[row, kept[row]] / whole[row, kept[row]].sum())

    def test_top_p_that_is_reached_exactly_takes_no_more(self):
        logits = torch.tensor([[0.25, 0.5, 0.25]]).log()
        assert next_distribution(logits, Sampling(top_p=0.5)).tolist() == [[0.0, 1.0, 0.0]]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
    def test_top_p_keeps_the_fewest_that_reach_p(self, seed, top_p):
        logits = logits_of(seed)
        whole, cut = logits.double().softmax(1), next_distribution(logits, Sampling(top_p=top_p))
        for row in range(4):
            kept = cut[row] > 0
            assert whole[row, kept].sum() >= top_p
            assert whole[row, kept].sum() - whole[row, kept].min() < top_p
            assert whole[row, kept].min() > whole[row, ~kept].max()
            torch.testing.assert_close(cut[row, kept], whole[row, kept] / whole[row, kept].sum())

    def test_top_p_counts_what_top_k_left(self):
        """0.4, 0.3, 0.2, 0.1 cut to two are 4/7 and 3/7: the first alone reaches 0.55, which 0.4 would not."""
        logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
        assert next_distribution(logits, Sampling(top_k=2, top_p=0.55)).tolist() == [[1, 0, 0, 0]]

    @pytest.mark.parametrize("seed", SEEDS)
    def test_more_temperature_is_less_certain(self, seed):
        entropies = [
            torch.special.entr(next_distribution(logits_of(seed), Sampling(temperature=temperature))).sum(1)
            for temperature in (0.1, 0.5, 1.0, 2.0, 10.0)
        ]
        assert all((cooler < warmer).all() for cooler, warmer in pairwise(entropies))

    def test_the_logits_given_stay_as_they_are(self):
        logits = logits_of(0).double()
        before = logits.clone()
        next_distribution(logits, Sampling(top_k=3, top_p=0.5))
        assert torch.equal(logits, before)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"temperature": -0.1}, "temperature is -0.1"),
            ({"temperature": math.nan}, "temperature is nan"),
            ({"top_k": 0}, "top_k is 0"),
            ({"top_p": 0.0}, r"top_p is 0\.0"),
            ({"top_p": 1.5}, r"top_p is 1\.5"),
        ],
    )
    def test_a_wrong_value_is_one_sentence(self, wrong, words):
        with pytest.raises(InputError, match=words):
            Sampling(**wrong)


class TestDraw:
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_tokens_come_as_often_as_the_distribution_says(self, sampling):
        """Every count within 5 σ of its binomial mean, and never what has no probability."""
        logits, draws = logits_of(1, batch=1, vocab=8), 20_000
        expected = next_distribution(logits, sampling)[0]
        drawn = draw(logits.expand(draws, -1), sampling, generator())
        counts = drawn.bincount(minlength=8)
        sigma = (draws * expected * (1 - expected)).sqrt()
        assert ((counts - draws * expected).abs() <= 5 * sigma).all()

    def test_equal_seeds_draw_the_same_and_others_do_not(self):
        logits = logits_of(0, batch=1).expand(50, -1)
        assert torch.equal(draw(logits, Sampling(), generator(1)), draw(logits, Sampling(), generator(1)))
        assert not torch.equal(draw(logits, Sampling(), generator(1)), draw(logits, Sampling(), generator(2)))


class TestGenerate:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_equals_the_whole_text_computed_anew_for_every_token(self, seed, sampling):
        model, text, random = decoder(seed), prompt(seed), generator(seed)
        with torch.no_grad():
            for _ in range(20):
                chosen = draw(model(text)[:, -1], sampling, random)
                text = torch.cat([text, chosen[:, None]], dim=1)
        assert torch.equal(generate(model, prompt(seed), 20, sampling, generator=generator(seed)), text)

    def test_every_token_but_the_last_is_computed_once(self):
        model, computed = decoder(), []
        model.embed_tokens.register_forward_hook(lambda module, ids, output: computed.append(ids[0].clone()))
        text = generate(model, prompt(0), 7)
        assert torch.equal(torch.cat(computed, dim=1), text[:, :-1])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_sequence_ends_with_the_end_token_and_the_others_go_on(self, seed):
        model = decoder(seed)
        free = generate(model, prompt(seed), 20, Sampling(), generator=generator(seed))[:, 5:]
        end = int(free[0, 4])  # said by the first sequence, so it ends at the latest there
        ended = generate(model, prompt(seed), 20, Sampling(), end_token=end, generator=generator(seed))[:, 5:]
        for row, reference in zip(ended.tolist(), free.tolist(), strict=True):
            stop = reference.index(end) + 1 if end in reference else len(reference)
            assert row[:stop] == reference[: min(stop, len(row))]
            assert set(row[stop:]) <= {end}
        longest = max(row.index(end) + 1 if end in row else 20 for row in free.tolist())
        assert ended.shape[1] == longest

    def test_stops_when_all_have_ended(self):
        model = decoder()
        said = generate(model, prompt(0, batch=1), 10)[0, 5:].tolist()
        ended = generate(model, prompt(0, batch=1), 10, end_token=said[2])[0, 5:].tolist()
        assert ended == said[: said.index(said[2]) + 1]

    def test_fills_the_context_to_the_last_token(self):
        assert generate(decoder(), prompt(0), CONTEXT - 5).shape == (3, CONTEXT)

    def test_neither_dropout_nor_gradients_take_part_and_the_mode_is_put_back(self):
        model = decoder(dropout=0.5)
        expected = generate(model, prompt(0), 10)
        model.train()
        text = generate(model, prompt(0), 10)
        assert torch.equal(text, expected)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize(
        ("ids", "new", "words"),
        [
            (torch.zeros(2, 0, dtype=torch.long), 3, r"\(2, 0\) cannot be continued"),
            (torch.zeros(4, dtype=torch.long), 3, r"\(4,\) cannot be continued"),
            (torch.zeros(1, 4, dtype=torch.long), 0, "max_new_tokens is 0: give 1 or more"),
            (torch.zeros(1, 4, dtype=torch.long), CONTEXT - 3, r"33 tokens.*holds 32.*shorten it by 1"),
        ],
    )
    def test_what_cannot_be_continued_is_one_sentence(self, ids, new, words):
        with pytest.raises(InputError, match=words):
            generate(decoder(), ids, new)
