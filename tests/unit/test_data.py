"""Sequences as blocks: nothing is lost, nothing is said twice, and the synthetic language can be learned."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import END_TOKEN, TokenBlocks, create_test_dataset, pack, stream, train_tokenizer
from engine.errors import InputError
from tests.tiny_models import CORPUS

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, VOCAB)


def blocks_of(count, length=4):
    return TokenBlocks(torch.arange(count * (length + 1)).view(count, length + 1))


class TestTokenizer:
    @given(text=st.text(max_size=60))
    @settings(max_examples=80, derandomize=True, deadline=None)
    def test_any_text_comes_back_as_it_was(self, tokenizer, text):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert all(0 <= token < VOCAB for token in ids)

    def test_has_as_many_entries_as_asked_for_the_end_first(self, tokenizer):
        assert len(tokenizer) == VOCAB
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_TOKEN, 0)

    def test_is_made_for_its_text(self, tokenizer):
        own = " ".join(CORPUS)
        foreign = own.translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "qjxzkvbpygfwmucldrhsnioate"))
        assert len(tokenizer(own).input_ids) < 0.8 * len(own.encode())
        assert len(tokenizer(own).input_ids) < len(tokenizer(foreign).input_ids)

    def test_equal_texts_make_equal_tokenizers(self, tokenizer):
        assert train_tokenizer(CORPUS, VOCAB).get_vocab() == tokenizer.get_vocab()

    def test_too_few_entries_is_one_sentence(self):
        with pytest.raises(InputError, match="vocab_size is 256: give at least 257"):
            train_tokenizer(CORPUS, 256)
        assert len(train_tokenizer(CORPUS, 257)) == 257


class TestPacking:
    def test_a_stream_is_every_text_and_an_end_after_each(self, tokenizer):
        texts = ["Lily ran.", "", "Tom sat 🚀 there."]
        pieces, current = [], []
        for token in stream(texts, tokenizer).tolist():
            if token == tokenizer.eos_token_id:
                pieces.append(tokenizer.decode(current))
                current = []
            else:
                current.append(token)
        assert (pieces, current) == (texts, [])

    @given(texts=st.lists(st.sampled_from(CORPUS), min_size=1, max_size=4), block_size=st.integers(1, 40))
    @settings(max_examples=60, derandomize=True, deadline=None)
    def test_loses_no_token_but_a_rest_shorter_than_a_block(self, tokenizer, texts, block_size):
        tokens = stream(texts, tokenizer)
        if len(tokens) <= block_size:
            return
        blocks = pack(texts, tokenizer, block_size)
        inputs, targets = blocks.batch(torch.arange(len(blocks)))
        predicted = targets.flatten()
        assert torch.equal(inputs.flatten(), tokens[: len(predicted)].long())
        assert torch.equal(predicted, tokens[1 : 1 + len(predicted)].long())
        assert 0 <= len(tokens) - 1 - len(predicted) < block_size
        assert blocks.block_size == block_size

    def test_text_of_one_block_is_enough_and_a_token_less_is_one_sentence(self, tokenizer):
        length = len(stream(["Lily and Tom"], tokenizer))
        assert len(pack(["Lily and Tom"], tokenizer, length - 1)) == 1
        with pytest.raises(InputError, match=rf"has {length} tokens, a block needs {length + 1}"):
            pack(["Lily and Tom"], tokenizer, length)

    def test_no_text_at_all_is_one_sentence(self, tokenizer):
        with pytest.raises(InputError, match="has 0 tokens"):
            pack([], tokenizer, 8)


class TestTokenBlocks:
    def test_a_batch_is_the_blocks_asked_for_in_that_order(self):
        inputs, targets = blocks_of(5).batch(torch.tensor([3, 0, 3]))
        assert inputs.tolist() == [[15, 16, 17, 18], [0, 1, 2, 3], [15, 16, 17, 18]]
        assert torch.equal(targets, inputs + 1)
        assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)

    @given(count=st.integers(2, 50), share=st.floats(0, 1))
    @settings(max_examples=60, derandomize=True, deadline=None)
    def test_a_split_is_all_blocks_once_and_neither_part_is_empty(self, count, share):
        whole = blocks_of(count)
        training, held_out = whole.split(share)
        assert torch.equal(torch.cat([training.ids, held_out.ids]), whole.ids)
        assert min(len(training), len(held_out)) >= 1
        assert abs(len(held_out) - share * count) <= 1

    def test_one_block_cannot_be_split(self):
        with pytest.raises(InputError, match=r"one block.*add text"):
            blocks_of(1).split(0.1)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 1), (5,), (2, 2, 2)])
    def test_blocks_with_nothing_to_learn_are_one_sentence(self, shape):
        with pytest.raises(InputError, match="nothing to learn"):
            TokenBlocks(torch.zeros(shape, dtype=torch.long))


class TestSyntheticLanguage:
    def test_is_the_same_on_every_call_and_within_the_vocabulary(self):
        dataset = create_test_dataset(20)
        assert torch.equal(dataset.ids, create_test_dataset(20).ids)
        assert dataset.ids.shape == (20, 64)
        assert dataset.ids.min() >= 0
        assert dataset.ids.max() < 1000

    def test_each_word_has_at_most_three_successors_and_a_favourite(self):
        """Knowing the language costs −Σ p ln p of 0.7, 0.2 and 0.1, less where two of the three are the same word."""
        ids = create_test_dataset(2000).ids
        counts = torch.zeros(1000, 1000)
        counts.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.ones(()), accumulate=True)
        assert (counts > 0).sum(1).max() <= 3
        frequent = counts[counts.sum(1) > 500]
        shares = frequent / frequent.sum(1, keepdim=True)
        assert len(shares) > 10
        assert (shares.amax(1) > 0.6).all()
        costs = torch.special.entr(shares).sum(1)
        assert costs.max() < 0.85
        assert costs.mean() > 0.3

    def test_frequency_alone_explains_a_part_of_it_and_the_word_before_most_of_the_rest(self):
        shares = create_test_dataset(1000).ids.flatten().bincount(minlength=1000).double() / 64_000
        frequency_alone = torch.special.entr(shares).sum().item()
        assert 0.8 + 1 < frequency_alone < math.log(1000) - 1

    @pytest.mark.parametrize("count", [0, -3])
    def test_no_samples_are_one_sentence(self, count):
        with pytest.raises(InputError, match=f"num_samples is {count}: give 1 or more"):
            create_test_dataset(count)
