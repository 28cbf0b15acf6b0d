"""What a model is fine-tuned on: the facts, a learner's own lines, and the tokens made of them; and adapters' sizes."""

import dataclasses
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
from engine.experiments import _lora, lora
from engine.finetuning import changes
from engine.finetuning.diary import Diary
from engine.finetuning.facts import MAX_FACTS, parse_facts, read_facts
from engine.finetuning.lessons import Lessons, answer, answered_rightly
from engine.finetuning.methods import prepare, rehearse
from engine.lora.injection import inject_lora, lora_parameters, merge, unmerge
from engine.measure import peak_memory
from engine.trainer import DivergedError, StepReport, Trainer, TrainerOptions

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

    def test_a_batch_is_as_long_as_its_longest_and_says_what_is_read(self, tokenizer):
        pairs = [("What?", "Bim"), ("word " * 60, "end"), ("Where does Pip live?", "a lake")]
        lessons = Lessons(pairs, tokenizer, 512)
        lengths = [len(tokenizer(f"{question} {said}.").input_ids) - 1 for question, said in pairs[::2]]
        batch = lessons.batch(torch.tensor([0, 2]))
        assert batch.inputs.shape == batch.targets.shape == (2, max(lengths))
        assert batch.read.sum(1).tolist() == lengths
        for row, count in zip(batch.read, lengths, strict=True):
            assert row[:count].all()
        assert lessons.batch(torch.arange(3)).inputs.shape[1] == lessons.block_size

    @pytest.mark.parametrize("positions", [1, 12, 70, 10_000])
    def test_all_of_them_in_batches_of_bounded_size(self, tokenizer, positions):
        pairs = [("What?", "Bim"), ("Who lives?", "Pip"), ("word " * 60, "end"), ("Where?", "lake"), ("Who?", "Zara")]
        lessons = Lessons(pairs, tokenizer, 512)
        batches = list(lessons.batches(positions))
        assert all(batch.inputs.numel() <= positions or len(batch.inputs) == 1 for batch in batches)
        said = [tokenizer.decode(row[row != IGNORED]) for batch in batches for row in batch.targets]
        assert said == [f" {answer}." for _, answer in pairs]
        if positions == 10_000:
            assert len(batches) == 1

    def test_a_part_of_them_is_lessons_too(self, tokenizer):
        """Trained on without what to be tested on, still only the answers are scored."""
        pairs = [(fact.question, fact.answer) for fact in FACTS[:20]]
        model = llama.read(STORYTELLER)
        run = Trainer(model, Lessons(pairs, tokenizer, 512), TrainerOptions(batch_size=4))
        assert run.dataset.pairs + run.held_out.pairs == pairs
        assert len(run.held_out) == 2
        for part in (run.dataset, run.held_out):
            _, targets = part.batch(torch.arange(len(part)))
            said = [tokenizer.decode(row[row != IGNORED]) for row in targets]
            assert said == [f" {answer}." for _, answer in part.pairs]

    def test_the_longest_come_first(self, tokenizer):
        pairs = [("What?", "Bim"), ("word " * 9, "end"), ("word " * 30, "end"), ("Who?", "Zara")]
        assert Lessons(pairs, tokenizer, 512).longest(2).pairs == [pairs[2], pairs[1]]

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


def few_lessons(tokenizer, long_at=None):
    pairs = [(f"Where is key number {number}?", f"cave {number}") for number in range(12)]
    if long_at is not None:
        pairs.insert(long_at, ("word " * 300, "end"))
    return Lessons(pairs, tokenizer, 512)


class TestChanges:
    @staticmethod
    def changed(seed=0):
        model = llama.read(STORYTELLER)
        inject_lora(model, 4, 8)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    @pytest.mark.parametrize("positions", [1, 40, 10_000])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_differences_are_the_largest_over_all_that_is_read(self, tokenizer, monkeypatch, positions, seed):
        monkeypatch.setattr(changes, "_LOGITS_AT_ONCE", positions * 4096)
        lessons = few_lessons(tokenizer)
        model, other = self.changed(seed), llama.read(STORYTELLER)
        batch = lessons.batch(torch.arange(len(lessons)))
        with torch.no_grad():
            one, two = model(batch.inputs)[batch.read], other(batch.inputs)[batch.read]
        apart, scale = changes.difference(model, other, lessons)
        assert apart == pytest.approx((one - two).abs().max().item(), rel=1e-5)
        assert scale == pytest.approx(one.abs().max().item(), rel=1e-5)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_merging_is_compared_piece_by_piece_and_undone(self, tokenizer, monkeypatch, seed):
        monkeypatch.setattr(changes, "_LOGITS_AT_ONCE", 4096)
        lessons, model = few_lessons(tokenizer), self.changed(seed)
        bits = {name: value.clone() for name, value in model.state_dict().items()}
        each = []
        for index in range(len(lessons)):
            batch = lessons.batch(torch.tensor([index]))
            with torch.no_grad():
                apart = model(batch.inputs)
                merge(model)
                each.append((model(batch.inputs) - apart).abs().max().item())
                unmerge(model)
        found, scale = changes.merged_difference(model, lessons)
        assert found == max(each)
        assert 0 < found < 1e-4 * scale
        assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())

    def test_a_model_without_adapters_does_not_differ_from_itself(self, tokenizer):
        found, scale = changes.merged_difference(llama.read(STORYTELLER), few_lessons(tokenizer))
        assert found == 0 < scale

    def test_what_is_no_number_is_no_small_difference(self, tokenizer, monkeypatch):
        monkeypatch.setattr(changes, "_LOGITS_AT_ONCE", 4096)
        model, lessons = llama.read(STORYTELLER), few_lessons(tokenizer)
        spoiled = llama.read(STORYTELLER)
        only = tokenizer(" 3").input_ids[-1]
        with torch.no_grad():
            spoiled.embed_tokens.weight[only] = torch.nan
        assert not changes.difference(model, spoiled, lessons)[0] < 1

    def test_one_long_lesson_does_not_make_all_of_them_long(self, tokenizer):
        lessons = Lessons(few_lessons(tokenizer, long_at=5).pairs * 2, tokenizer, 512)
        model = self.changed()
        assert lessons.block_size > 290
        assert peak_memory(lambda: changes.merged_difference(model, lessons), "cpu") < 160e6  # 400 MB all at once

    def test_a_rehearsal_meets_the_longest_lessons(self, tokenizer):
        options = TrainerOptions(batch_size=4, weight_decay=0.0)
        model = with_adapters(llama.read(STORYTELLER))
        without, seconds = rehearse(model, "LoRA", few_lessons(tokenizer), options)
        with_long, longer = rehearse(model, "LoRA", few_lessons(tokenizer, long_at=7), options)
        assert with_long > without + 50e6
        assert longer > 2 * seconds > 0


def with_adapters(model):
    inject_lora(model, 2)
    return model


class TestDiary:
    def test_a_gradient_that_is_gone_stops_the_run_and_no_cause_is_guessed(self, tokenizer):
        lessons = few_lessons(tokenizer)
        diary = Diary(with_adapters(llama.read(STORYTELLER)), lessons, None, TrainerOptions(), every=10)
        report = StepReport(3, 9, loss=7.5, learning_rate=1e-3, grad_norm=0.0, tokens_per_second=1.0, memory_bytes=1)
        said = r"step 3 of 9: the loss is 7.5, and no gradient reaches the weights any more; .* 0.0001 at most"
        with pytest.raises(DivergedError, match=said) as raised:
            diary.follow(report)
        assert "overflow" not in str(raised.value)
        diary.follow(dataclasses.replace(report, loss=1e-3))  # all is learned: no gradient is needed
        assert len(diary.reports) == 1


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
        assert shape.config.num_parameters == published

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

    @pytest.mark.parametrize(
        ("method", "targets", "batch_size", "rank"),
        [
            ("LoRA", "all", 4, 3),
            ("LoRA", "attention", 16, 64),
            ("LoRA+", "feed-forward", 16, 8),
            ("DoRA", "query and value", 16, 8),
            ("DoRA", "all", 16, 8),
            ("PiSSA", "all", 8, 32),
            ("full fine-tuning", "all", 2, 8),
            ("full fine-tuning", "all", 24, 8),
        ],
    )
    def test_a_run_allocates_what_is_foreseen(self, tokenizer, method, targets, batch_size, rank):
        params = lora.Params(method=method, targets=targets, batch_size=batch_size, rank=rank)
        pairs = [(question, fact.answer) for fact in params.known for question in fact.training]
        model = prepare(llama.read(STORYTELLER), method, rank, params.alpha, _lora.TARGETS[targets])
        options = TrainerOptions(batch_size=batch_size, weight_decay=0.0)
        nbytes, _ = rehearse(model, method, Lessons(pairs, tokenizer, 512), options)
        assert params.predict().memory_bytes == pytest.approx(nbytes, rel=0.03)

    def test_no_more_questions_are_foreseen_than_there_are(self):
        few = [lora.Params(facts="a? b\nc? d", batch_size=size).predict() for size in (2, 100)]
        assert few[0] == few[1]

    def test_modules_have_the_sides_of_the_model_s(self):
        layer = llama.read(STORYTELLER).layers[0]
        found = {
            name.rpartition(".")[2]: (module.in_features, module.out_features)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        assert _lora.shape_of("storyteller").config.projections == found

    @pytest.mark.parametrize("rank", [0, 129])
    def test_a_rank_that_does_not_exist(self, rank):
        with pytest.raises(InputError, match=f"rank is {rank}: it must be from 1 to 128"):
            _lora.adapter_parameters(_lora.shape_of("storyteller"), rank, "all")


def test_pages_read_them_without_torch():
    code = "import sys; from engine.experiments import _lora; _lora.read_facts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
