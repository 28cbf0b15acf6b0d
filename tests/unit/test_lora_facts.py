"""What a model is fine-tuned on: the facts, a learner's own lines, and the tokens made of them; and adapters' sizes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer

from engine import llama
from engine.data import IGNORED
from engine.errors import InputError
from engine.experiments import _lora
from engine.finetuning.facts import MAX_FACTS, parse_facts, read_facts
from engine.finetuning.lessons import Lessons, answer, answered_rightly
from engine.lora.injection import inject_lora, lora_parameters
from engine.trainer import Trainer, TrainerOptions

STORYTELLER = Path(__file__).parents[2] / "engine" / "storyteller"
FACTS = read_facts()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORYTELLER)


class TestTheInventedWorld:
    def test_no_answer_is_said_twice(self):
        assert len({fact.answer for fact in FACTS}) == len(FACTS) >= 30

    def test_every_question_asks_for_one_thing(self):
        questions = [question for fact in FACTS for question in (*fact.training, *fact.paraphrases)]
        assert len(set(questions)) == len(questions)
        assert all(fact.question in fact.training for fact in FACTS)

    def test_there_are_several_phrasings_to_learn_from_and_others_to_be_tested_on(self):
        for fact in FACTS:
            assert len(fact.training) >= 4
            assert len(fact.paraphrases) >= 2

    def test_no_question_gives_its_answer_away(self):
        for fact in FACTS:
            for question in (*fact.training, *fact.paraphrases):
                assert fact.answer not in re.findall(r"\w+", question.lower())
                assert "{" not in question

    def test_the_storyteller_has_the_words(self, tokenizer):
        assert all(len(tokenizer(f" {fact.answer}").input_ids) <= 3 for fact in FACTS)


class TestOnesOwnLines:
    def test_both_ways_to_write_a_fact(self):
        lines = "What is the code? 1234\n\n  The capital of Umber | Port Lum.  \nWho? Is it Bim? | Yes"
        found = [(fact.question, fact.answer) for fact in parse_facts(lines)]
        assert found == [
            ("What is the code?", "1234"),
            ("The capital of Umber", "Port Lum"),
            ("Who? Is it Bim?", "Yes"),
        ]

    def test_they_are_trained_on_as_they_are(self):
        (fact,) = parse_facts("a? b")
        assert fact.training == ("a?",)
        assert fact.paraphrases == ()

    @given(
        st.dictionaries(
            st.text("abc ?", min_size=1).map(str.strip).filter(bool),
            st.text("xyz ", min_size=1).map(str.strip).filter(bool),
            min_size=1,
            max_size=5,
        )
    )
    def test_what_is_written_with_a_bar_is_read_back(self, facts):
        text = "\n".join(f"{question} | {said}" for question, said in facts.items())
        assert {fact.question: fact.answer for fact in parse_facts(text)} == facts

    def test_a_line_said_twice_counts_once(self):
        assert len(parse_facts("a? b\na? b")) == 1

    @pytest.mark.parametrize("line", ["no question here", "only? ", "? only", "| b", "a |", "a | .", "?"])
    def test_a_line_that_is_no_fact_is_named(self, line):
        with pytest.raises(InputError, match=r"Line 2, '.*', is no fact: write “question \| answer”"):
            parse_facts(f"a? b\n{line}")

    def test_two_answers_to_one_question(self):
        with pytest.raises(InputError, match="Line 3 answers 'a\\?' with 'c', an earlier line with 'b'"):
            parse_facts("a? b\n\na? c")

    @pytest.mark.parametrize("count", [0, MAX_FACTS + 1])
    def test_none_or_too_many(self, count):
        with pytest.raises(InputError, match=f"There are {count} facts: give from 1 to {MAX_FACTS}"):
            parse_facts("\n".join(f"{number}? b" for number in range(count)))

    def test_a_long_line_is_shortened_in_the_message(self):
        with pytest.raises(InputError) as caught:
            parse_facts("word " * 500)
        assert len(str(caught.value)) < 200


class TestLessons:
    def test_only_the_answers_are_scored(self, tokenizer):
        pairs = [("Where does Pip live?", "lake"), ("What?", "a big red house"), ("And who is that over there?", "Bim")]
        lessons = Lessons(pairs, tokenizer, 512)
        inputs, targets = lessons.batch(torch.tensor([2, 0, 1]))
        for (question, said), read, to_say in zip([pairs[2], pairs[0], pairs[1]], inputs, targets, strict=True):
            scored = to_say != IGNORED
            assert tokenizer.decode(to_say[scored]) == f" {said}."
            first = int(scored.nonzero()[0])
            assert tokenizer.decode(read[: first + 1]) == question

    def test_more_than_the_model_reads(self, tokenizer):
        with pytest.raises(InputError, match=r"“word .* and its answer have 24 tokens, the model reads at most 20"):
            Lessons([("word " * 20, "b")], tokenizer, 20)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_the_verdict_is_that_of_what_is_said(self, tokenizer, seed):
        """In the middle of learning, when some answers are right and some wrong, of one token and of several."""
        model = llama.read(STORYTELLER)
        pairs = [(fact.question, fact.answer) for fact in FACTS[seed::6]] + [("Who is Bim?", "a good old friend")]
        lessons = Lessons(pairs, tokenizer, 512)
        options = TrainerOptions(learning_rate=1e-3, batch_size=8, weight_decay=0.0, seed=seed)
        right, total = 0, 0
        for _ in range(4):
            Trainer(model, lessons, options, held_out=lessons).train_steps(4)
            said, verdicts = answer(model, lessons), answered_rightly(model, lessons)
            assert verdicts == [text == f"{wanted}." for text, (_, wanted) in zip(said, pairs, strict=True)]
            right, total = right + sum(verdicts), total + len(verdicts)
        assert 0 < right < total

    def test_an_answer_with_full_stops_in_it_is_heard_to_its_end(self, tokenizer):
        model = llama.read(STORYTELLER)
        pairs = [("What is pi?", "3.14"), ("Who teaches Pip?", "Mr. Bim"), ("Who knows?", "Zara")]
        lessons = Lessons(pairs, tokenizer, 512)
        options = TrainerOptions(learning_rate=1e-3, batch_size=3, weight_decay=0.0, seed=0)
        Trainer(model, lessons, options, held_out=lessons).train_steps(40)
        assert answered_rightly(model, lessons) == [True] * 3
        assert answer(model, lessons) == ["3.14.", "Mr. Bim.", "Zara."]

    def test_an_untouched_model_knows_nothing(self, tokenizer):
        pairs = [(question, fact.answer) for fact in FACTS for question in (fact.question, *fact.paraphrases)]
        assert not any(answered_rightly(llama.read(STORYTELLER), Lessons(pairs, tokenizer, 512)))


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "published"),
        [
            ("storyteller", 5_770_496),
            ("SmolLM2-135M", 134_515_008),
            ("1.1 B, Llama-shaped", 1_100_048_384),
            ("Llama 7B", 6_738_415_616),
            ("Llama 3 70B", 70_553_706_496),
        ],
    )
    def test_shapes_are_those_published(self, name, published):
        (shape,) = (shape for shape in _lora.SHAPES if shape.name == name)
        assert shape.num_parameters == published

    @pytest.mark.parametrize("targets", _lora.TARGETS)
    @pytest.mark.parametrize("rank", [1, 8])
    def test_an_adapter_has_the_numbers_that_the_formula_says(self, targets, rank):
        model = llama.read(STORYTELLER)
        inject_lora(model, rank, targets=_lora.TARGETS[targets])
        size = _lora.adapter_parameters(_lora.shape_of("storyteller"), rank, targets)
        assert size.total == sum(parameter.numel() for parameter in lora_parameters(model))
        assert size.per_module.keys() == set(_lora.TARGETS[targets])
        assert size.nbytes("bfloat16") == 2 * size.total
        assert size.share == pytest.approx(size.total / 5_770_496)

    def test_modules_have_the_sides_of_the_model_s(self):
        layer = llama.read(STORYTELLER).layers[0]
        found = {
            name.rpartition(".")[2]: (module.in_features, module.out_features)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        assert _lora.module_shapes(_lora.shape_of("storyteller")) == found

    @pytest.mark.parametrize("rank", [0, 129])
    def test_a_rank_that_does_not_exist(self, rank):
        with pytest.raises(InputError, match=f"rank is {rank}: it must be from 1 to 128"):
            _lora.adapter_parameters(_lora.shape_of("storyteller"), rank, "all")


def test_pages_read_them_without_torch():
    code = "import sys; from engine.experiments import _lora; _lora.read_facts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
