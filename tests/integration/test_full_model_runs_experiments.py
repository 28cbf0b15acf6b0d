"""The runs of the whole model in this process, on few steps: it learns, is taken apart switch by switch, is timed."""

import itertools
import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from engine import llama, pretrained
from engine.errors import InputError
from engine.experiments import (
    full_model_ablation,
    full_model_step,
    full_model_tests,
    full_model_throughput,
    full_model_training,
    parse,
)
from engine.experiments._full_model import SWITCHES
from engine.experiments._full_model_runs import LEARNING_RATES, PROMPTS
from engine.experiments._on_workers.full_model_throughput import continuing, reading
from engine.experiments._on_workers.full_model_training import SAMPLE_TOKENS, Ground, persevere
from engine.experiments._training_cost import weigh as weigh_step
from engine.experiments.full_model_ablation import EVERYTHING, NOTHING, describe_rows, states
from engine.measure import is_held
from engine.model import evaluating
from engine.pretraining.run import PROMPT
from engine.runtime.jobs import LocalJob
from engine.runtime.results import weigh
from engine.trainer import DivergedError, Trainer

TINY = {"d_model": 32, "num_layers": 1, "num_heads": 2, "rank": 2, "experts": 3, "batch_size": 4, "length": 32}
OFF = dict.fromkeys(SWITCHES, False)
TEXT = "The cat sat on the mat and the dog ran to the tree. " * 60
"""Learned in no time, and its tokenizer is made in none."""


def stop_after(step):
    job = LocalJob()
    job._on_progress = lambda progress: setattr(job, "cancelled", progress.step >= step)
    return job


@pytest.fixture(scope="module")
def seen():
    return {"progress": [], "shown": []}


@pytest.fixture(scope="module")
def trained(seen):
    job = LocalJob(on_progress=seen["progress"].append, on_show=seen["shown"].append)
    params = full_model_training.Params(**TINY, steps=24, text=TEXT, prompt="The cat")
    return full_model_training.run(params, job)


class TestTraining:
    def test_it_learns_and_says_so_on_the_way(self, trained, seen):
        assert trained.ended == "finished"
        np.testing.assert_array_equal(trained.step, np.arange(1, 25))
        assert trained.held_out_loss[0] == pytest.approx(trained.guessing, rel=0.1)
        assert trained.held_out_loss[-1] < 0.8 * trained.held_out_loss[0]
        assert trained.checked.tolist() == list(range(0, 25, 2))
        steps = [progress.step for progress in seen["progress"]]
        assert steps == list(range(1, 25))
        lengths = [len(shown.step) for shown in seen["shown"]]
        assert lengths == sorted(lengths)
        assert {shown.ended for shown in seen["shown"]} == {"running"}
        weigh(trained)

    def test_it_goes_on_after_the_prompt_while_it_learns(self, trained, seen):
        assert [sample.step for sample in trained.samples] == [0, 2, 3, 6, 12, 24]
        assert all(sample.text.startswith("The cat") for sample in trained.samples)
        assert trained.samples[0].text != trained.samples[-1].text
        assert any(len(shown.samples) == 3 for shown in seen["shown"])

    def test_every_mixture_has_its_load(self, trained):
        assert trained.load.shape == (13, 3, 3)
        np.testing.assert_allclose(trained.load.mean(-1), 1)
        np.testing.assert_allclose(trained.violation, trained.load.max(-1) - 1)

    def test_memory_of_a_step_holds_the_model_and_stays_below_what_is_predicted(self, trained):
        params = full_model_training.Params(**TINY)
        assert trained.model_bytes < trained.step_bytes <= params.memory_bytes()

    def test_the_step_that_is_weighed_finds_the_optimizers_means(self, monkeypatch):
        taken = []
        monkeypatch.setattr(
            full_model_training, "weigh", lambda trainer: taken.append(trainer.step) or weigh_step(trainer)
        )
        params = full_model_training.Params(**TINY, **OFF, steps=3, text=TEXT)
        found = full_model_training.run(params, LocalJob())
        assert taken == [1]  # steps before it
        assert found.step.tolist() == [1, 2, 3]
        assert found.step_bytes > 0

    def test_without_mixtures_there_is_no_load(self):
        found = full_model_training.run(full_model_training.Params(**TINY, **OFF, steps=1, text=TEXT), LocalJob())
        assert found.mixtures == ()
        assert found.violation.shape == (2, 0)
        assert found.prompt

    def test_what_was_learned_until_a_cancellation_is_kept(self):
        params = full_model_training.Params(**TINY, steps=50, text=TEXT)
        found = full_model_training.run(params, stop_after(4))
        assert found.ended == "cancelled"
        assert "after step 4 of 50" in found.ending
        assert len(found.loss) == found.checked[-1] == found.samples[-1].step == 4

    def test_a_divergence_is_told_and_keeps_its_curve(self):
        params = full_model_training.Params(**TINY | {"moe": False}, steps=20, text=TEXT, learning_rate=10)
        found = full_model_training.run(params, LocalJob())
        assert found.ended == "diverged"
        assert "Training diverged at step" in found.ending

    def test_a_prompt_without_room_for_an_answer_is_refused(self):
        ground = Ground(full_model_training.Params(**TINY, text=TEXT), "cpu")
        with pytest.raises(InputError, match=f"{SAMPLE_TOKENS} are to follow"):
            ground.check_prompt("日本" * 150)
        ground.check_prompt("The cat sat")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"prompt": "x" * 301}, r"^Prompt has 301 characters: give 300 at most\.$"),
        ({"text": "x" * 20_001}, r"^Your text has 20,001 characters: give 20,000 at most\.$"),
        ({"text": "too short"}, "Your text has 9 characters"),
        ({"num_heads": 3}, "Heads is 3"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(values, said):
    with pytest.raises(InputError, match=said):
        parse("full_model_training", values)


def test_what_ends_a_text_for_many_a_program_is_left_out():
    params = full_model_training.Params(prompt=" The\0 cat\0 ", text=f"\0{TEXT}")
    assert (params.prompt, params.text) == ("The cat", TEXT.strip())


def test_the_page_names_the_prompt_that_is_taken(ground):
    assert ground.corpus.prompt == PROMPTS["storyteller"]
    assert PROMPTS["fresh"] == PROMPT


def test_a_text_whose_last_tenth_fills_no_sample_is_refused_with_its_tokens():
    params = full_model_training.Params(**TINY | {"length": 128}, text="the " * 330)
    with pytest.raises(InputError, match="each part needs 129"):
        Ground(params, "cpu")


@pytest.fixture(scope="module")
def ground():
    return Ground(full_model_training.Params(begin="storyteller", length=16, batch_size=2, rank=2), "cpu")


def test_a_router_that_is_given_no_numbers_is_a_divergence():
    trainer = SimpleNamespace(step=3, total_steps=5)

    def go():
        raise InputError("The router was given numbers that are not finite.")

    with pytest.raises(DivergedError, match=r"at step 4 of 5\. The router") as error:
        persevere(trainer, go)
    assert error.value.step == 4
    trainer.step = 5  # all were taken, and then it is examined
    with pytest.raises(DivergedError, match=r"at step 5 of 5\."):
        persevere(trainer, go)


def test_what_no_machine_of_a_class_has_room_for_is_known_before_it_is_built():
    huge = {"d_model": 512, "num_layers": 12, "num_heads": 16, "batch_size": 64, "length": 256, "flash": False}
    assert full_model_training.Params(**huge).memory_bytes() > 12e9
    assert full_model_ablation.Params(**huge | {"flash": True}).memory_bytes() > 12e9  # a row has it off
    assert full_model_throughput.Params(**huge).memory_bytes() < 10e9


class TestStoryteller:
    def test_it_reads_the_town_in_its_own_tokens(self, ground):
        assert ground.corpus.prompt == "What color is Pip's door?"
        said = ground.corpus.tokenizer.decode(ground.corpus.learned.tolist())
        assert "Pip" in said
        assert ground.corpus.tokenizer.decode(ground.corpus.tested.tolist()) not in said

    def test_only_adapters_learn_and_what_is_published_stays(self, ground):
        model = ground.build(0)
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        assert "embed_tokens.weight" in frozen
        trainer = ground.trainer(model, 0, rate=0.01)
        trainer.train_steps(2)
        after = dict(model.named_parameters())
        assert all(torch.equal(before, after[name]) for name, before in frozen.items())
        published = llama.from_transformers(pretrained.load("storyteller").model)
        assert torch.equal(published.embed_tokens.weight, after["embed_tokens.weight"])

    def test_it_says_the_likeliest_word(self, ground):
        model = ground.build(0)
        assert ground.speak(model, "One day") == ground.speak(model, "One day")


def test_rates_go_by_what_learns():
    fresh, told = (full_model_training.Params(begin=begin) for begin in ("fresh", "storyteller"))
    assert fresh.rate() == fresh.rate(**OFF | {"quantization": True}) == LEARNING_RATES["fresh", True]
    assert fresh.rate(**OFF) == fresh.rate(**OFF | {"flash": True}) == LEARNING_RATES["fresh", False]
    assert told.rate(**OFF | {"quantization": True}) == LEARNING_RATES["storyteller", False]
    assert told.rate(**OFF | {"moe": True}) == LEARNING_RATES["storyteller", True]
    assert full_model_training.Params(learning_rate=0.5).rate(**OFF) == 0.5


@pytest.fixture(scope="module")
def ablated(seen):
    job = LocalJob(on_progress=seen.setdefault("ablation", []).append, on_show=seen.setdefault("rows", []).append)
    params = full_model_ablation.Params(**TINY | {"d_model": 64}, steps=5, seeds=2, text=TEXT)
    return full_model_ablation.run(params, job)


class TestAblation:
    def test_there_are_ten_rows_in_their_order(self, ablated, seen):
        names = [row.name for row in ablated.rows]
        alone = list(SWITCHES.values())
        assert names == [NOTHING, *alone, EVERYTHING, *(f"all but {name}" for name in alone)]
        assert ablated.ended == "finished"
        assert [len(shown.rows) for shown in seen["rows"]] == list(range(1, 11))
        steps = [progress.step for progress in seen["ablation"]]
        assert steps == sorted(steps)
        assert steps[-1] == seen["ablation"][-1].total == 10 * 2 * 5
        weigh(ablated)

    def test_rows_are_real_runs_of_the_same_start(self, ablated):
        rows = {frozenset(row.switches): row for row in ablated.rows}
        for switches, row in rows.items():
            assert row.timed == 2 * 3
            assert row.low_ms <= row.median_ms <= row.high_ms
            start = rows[frozenset({"quantization"}) if "quantization" in switches else frozenset()]
            np.testing.assert_allclose(row.first_loss, start.first_loss, atol=1e-4)
            assert all(last < first for first, last in zip(row.first_loss, row.last_loss, strict=True))
        assert len({row.last_loss for row in ablated.rows}) >= 7  # FlashAttention alone changes nothing but rounding

    def test_each_switch_moves_what_it_must(self, ablated):
        row = {row.name: row for row in ablated.rows}
        plain = row[NOTHING]
        assert row["4-bit base"].model_bytes < plain.model_bytes < row["LoRA"].model_bytes
        assert row["MoE-LoRA"].model_bytes > plain.model_bytes
        assert row["FlashAttention"].model_bytes == plain.model_bytes
        assert row["LoRA"].learning < plain.learning == row["FlashAttention"].learning
        assert row["FlashAttention"].peak_bytes < plain.peak_bytes
        assert row["all but FlashAttention"].peak_bytes > row[EVERYTHING].peak_bytes
        assert row["all but 4-bit base"].model_bytes > row[EVERYTHING].model_bytes
        np.testing.assert_allclose(row["FlashAttention"].last_loss, plain.last_loss, atol=1e-3)

    def test_predicted_memory_bounds_every_row(self, ablated):
        params = full_model_ablation.Params(**TINY | {"d_model": 64})
        for row in ablated.rows:
            predicted = params.step_bytes(**states(frozenset(row.switches)))
            assert row.peak_bytes <= predicted < 2.5 * row.peak_bytes

    def test_every_row_says_what_learns(self, ablated):
        learns = {row.name: row.learns for row in ablated.rows}
        assert learns[NOTHING] == learns["FlashAttention"] == ("embeddings", "norms", "base matrices")
        assert learns["4-bit base"] == ("embeddings", "norms")
        assert learns["LoRA"] == ("embeddings", "norms", "adapters")
        assert learns["MoE-LoRA"] == ("embeddings", "norms", "some base matrices", "adapters", "routers")

    @pytest.mark.parametrize("rate", [10, 1])  # nothing comes as far as the second step, some rows not to the third
    def test_rows_that_diverge_early_cost_no_other_row_and_are_called_nothing_else(self, rate):
        tiny = {"d_model": 32, "num_layers": 1, "num_heads": 1, "rank": 2, "experts": 2, "length": 16, "batch_size": 4}
        switches = OFF | {"lora": True, "moe": True}
        params = full_model_ablation.Params(**tiny, **switches, steps=5, text=TEXT, learning_rate=rate)
        found = full_model_ablation.run(params, LocalJob())
        assert found.ended == "finished"
        assert [row.name for row in found.rows] == [NOTHING, "LoRA", "MoE-LoRA", EVERYTHING]
        early = [row for row in found.rows if not row.timed]
        assert early
        assert all(row.diverged and math.isnan(row.median_ms) for row in early)
        assert f"Diverged before a step was timed: {', '.join(row.name for row in early)}." in found.sentence
        assert "nan" not in found.sentence
        assert "0.0" not in found.sentence
        weigh(found)

    def test_every_step_that_is_timed_has_the_device_for_itself(self, monkeypatch):
        held = {}

        class Watched(Trainer):
            def resume(self):
                held.setdefault(self.step, set()).add(is_held(str(self.device)))
                return super().resume()

        monkeypatch.setattr("engine.experiments._on_workers.full_model_training.Trainer", Watched)
        params = full_model_ablation.Params(**TINY, **OFF | {"lora": True}, steps=6, text=TEXT)
        full_model_ablation.run(params, LocalJob())
        assert held == {0: {False}} | {step: {True} for step in range(1, 6)}

    @pytest.mark.parametrize(("seeds", "ends"), [(1, (1, 9)), (2, (2, 18))])
    def test_of_fewer_than_ten_times_the_spread_is_all_of_them(self, seeds, ends):
        runs = [full_model_ablation._Run(6.0, 4.0, [9.0, *range(1, 9)], 4, 2, 1)]
        if seeds == 2:
            runs += [full_model_ablation._Run(6.0, 4.0, list(map(float, range(10, 20))), 4, 2, 1)]
        made = full_model_ablation._row(NOTHING, frozenset(), runs, full_model_ablation.Params(), 1)
        assert (made.low_ms, made.high_ms) == pytest.approx(ends, abs=0.9)
        assert ((made.low_ms, made.high_ms) == ends) == (seeds == 1)

    def test_complete_rows_survive_a_cancellation(self):
        params = full_model_ablation.Params(**TINY, steps=5, text=TEXT)
        found = full_model_ablation.run(params, stop_after(12))
        assert [row.name for row in found.rows] == [NOTHING, "LoRA"]
        assert found.ended == "cancelled"
        assert "after 2 of 10 rows" in found.ending
        assert "Not all rows are there" in found.sentence

    def test_what_is_switched_off_is_left_out_and_nothing_runs_twice(self):
        two = full_model_ablation.Params(moe=False, quantization=False)
        assert list(two.rows()) == [NOTHING, "LoRA", "FlashAttention", EVERYTHING]
        assert list(full_model_ablation.Params(**OFF | {"moe": True}).rows()) == [NOTHING, "MoE-LoRA"]
        with pytest.raises(InputError, match="switch on one technique"):
            parse("full_model_ablation", OFF)

    @pytest.mark.parametrize("values", [{"steps": 4}, {"seeds": 0}, {"seeds": 4}])
    def test_too_few_steps_to_time_or_seeds_out_of_bounds_are_refused(self, values):
        with pytest.raises(InputError):
            parse("full_model_ablation", values)


def row(name, switches, last=(4.0,), ms=10.0, peak=40e6, spread=0.5, timed=10):
    return full_model_ablation.Row(
        name, switches, tuple(6.0 for _ in last), last, ms, ms - spread, ms + spread, timed, 1e5 / ms, int(peak), 10**6,
        1000, ("norms",), 1e-2,
    )  # fmt: skip


def early(name, switches):
    return row(name, switches, last=(math.nan,), ms=math.nan, peak=0, timed=0)


class TestSentence:
    def test_it_names_what_saves_and_what_costs(self):
        rows = [row(NOTHING, ()), row("LoRA", ("lora",), peak=30e6), row("MoE-LoRA", ("moe",), ms=20)]
        said = describe_rows(rows)
        assert "LoRA saves most memory: a step takes 30.0 MB" in said
        assert "MoE-LoRA costs most time: 20 ms" in said
        assert "with one seed that may be luck" in said

    def test_a_large_model_is_told_in_gigabytes(self):
        rows = [row(NOTHING, (), peak=11_046_644_736), row("LoRA", ("lora",), peak=980_400_000)]
        assert "a step takes 0.98 GB at its peak instead of 11.05." in describe_rows(rows)
        assert "less memory than nothing on, 11.05 GB." in describe_rows([rows[0], row("LoRA", ("lora",), peak=12e9)])

    @pytest.mark.parametrize(("ms", "word"), [(20, "and 2 times the time"), (10.5, "cannot be told from that")])
    def test_all_together_are_held_against_nothing(self, ms, word):
        rows = [row(NOTHING, ()), row("LoRA", ("lora",)), row(EVERYTHING, ("lora", "moe"), ms=ms, peak=20e6)]
        said = describe_rows(rows)
        assert "With 2 techniques on a step takes 50% of the memory" in said
        assert word in said

    def test_times_that_overlap_and_memory_that_is_not_saved_are_no_findings(self):
        said = describe_rows([row(NOTHING, ()), row("LoRA", ("lora",), ms=10.8, peak=41e6)])
        assert "none makes a step longer" in said
        assert "none makes a step take less memory" in said

    @pytest.mark.parametrize(("losses", "word"), [((4.0, 4.1), "no more"), ((5.0, 5.1), "more")])
    def test_losses_are_held_against_the_spread_of_seeds(self, losses, word):
        said = describe_rows([row(NOTHING, (), last=(4.0, 4.2)), row("LoRA", ("lora",), last=losses)])
        assert f"which is {word} than the 0.20" in said

    def test_a_row_that_diverged_is_named(self):
        said = describe_rows([row(NOTHING, ()), row("LoRA", ("lora",), last=(math.nan,))])
        assert "Losses cannot be compared. Diverged: LoRA." in said

    def test_what_diverged_before_it_was_weighed_saves_nothing(self):
        said = describe_rows([row(NOTHING, ()), early("LoRA", ("lora",)), row("MoE-LoRA", ("moe",), peak=30e6)])
        assert "MoE-LoRA saves most memory" in said
        assert said.endswith(" Diverged before a step was timed: LoRA.")

    def test_nothing_is_held_against_a_row_that_diverged_at_once(self):
        rows = [early(NOTHING, ()), row("LoRA", ("lora",)), row(EVERYTHING, ("lora", "moe"))]
        said = describe_rows(rows)
        assert said.startswith("Memory cannot be compared: too few rows")
        assert "Times cannot be compared: too few rows" in said
        assert "techniques on a step takes" not in said

    def test_of_two_times_nothing_is_said(self):
        said = describe_rows([row(NOTHING, ()), row("LoRA", ("lora",), last=(math.nan,), ms=90, timed=2)])
        assert "Times cannot be compared" in said
        assert "Diverged: LoRA." in said

    def test_without_rows_nothing_is_claimed(self):
        assert describe_rows([row(NOTHING, ())]) == "The first rows are not there yet."


class TestThroughput:
    def test_every_batch_at_every_length_in_both_phases(self):
        shown = []
        params = full_model_throughput.Params(**TINY | {"batch_size": 3}, runs=3)
        found = full_model_throughput.run(params, LocalJob(on_show=shown.append))
        assert params.batches == (1, 2, 3)
        assert params.lengths == (8, 16, 32)
        cases = {(point.phase, point.batch, point.length) for point in found.points}
        assert len(cases) == len(found.points) == found.total == 18
        assert [len(draft.points) for draft in shown] == list(range(1, 19))
        for point in found.points:
            tokens = point.batch * (point.length if point.phase == "prefill" else 1)
            assert point.tokens_per_second == pytest.approx(1e3 * tokens / point.median_ms)
            assert point.low_ms <= point.median_ms <= point.high_ms
        assert "With 32 tokens a text, one token more takes" in found.sentence
        weigh(found)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("length", [1, 2, 24])
    def test_a_token_after_a_cache_gives_what_the_whole_prompt_gives(self, seed, length):
        ground = Ground(full_model_training.Params(**TINY, text=TEXT), "cpu")
        model = ground.build(seed)
        ground.trainer(model, seed, rate=0.01).train_steps(2)  # no zeros left
        ids = torch.randint(300, (3, length), generator=torch.Generator().manual_seed(seed))
        with evaluating(model):
            whole, step = reading(model, ids)(), continuing(model, ids)
            for _ in range(3):  # as often as it is timed
                torch.testing.assert_close(step(), whole, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model(ids)[:, -1], whole, atol=1e-4, rtol=1e-4)

    def test_points_survive_a_cancellation(self):
        found = full_model_throughput.run(full_model_throughput.Params(**TINY, runs=3), stop_after(3))
        assert len(found.points) == 3
        assert "after 3 of 18 points" in found.ending

    def test_batches_and_lengths_end_at_what_is_set(self):
        for batch in (1, 2, 5, 64):
            batches = full_model_throughput.Params(batch_size=batch).batches
            assert batches[-1] == batch
            assert list(batches) == sorted(set(batches))

    def test_larger_batches_need_more_memory(self):
        small, large = (full_model_throughput.Params(batch_size=batch).memory_bytes() for batch in (1, 64))
        assert large > small > 0

    def test_there_is_time_for_every_choice_of_a_kernel(self):
        widest = full_model_throughput.Params(batch_size=64)
        kinds = len(widest.batches) * len(widest.lengths)
        assert widest.time_limit > 2 * 60 * kinds


def point(phase, batch, length, ms, low, high):
    tokens = batch * (length if phase == "prefill" else 1)
    return full_model_throughput.Point(phase, batch, length, ms, low, high, 7, 1e3 * tokens / ms)


class TestThroughputSentence:
    def said(self, one, most, short=(10, 9, 11), read=(20, 19, 21)):
        points = [
            point("decode", 8, 32, *short),
            point("decode", 1, 128, *one),
            point("decode", 8, 128, *most),
            point("prefill", 8, 128, *read),
        ]
        return full_model_throughput.describe_points(points)

    def test_ratios_of_times_that_are_apart_are_told(self):
        said = self.said((10, 9, 11), (15, 14, 16))
        assert "one token more takes 10 ms (9 to 11) for one text and 15 ms (14 to 16) for 8 at once" in said
        assert "1.5 times the wait, 5.3 times the tokens a second, 533." in said
        assert "With 32 tokens in the cache it is 10 ms (9 to 11)." in said
        assert "51,200 tokens/s at 8 × 128, 64.0 times as many as writing at its best." in said

    def test_a_shorter_cache_that_takes_longer_is_no_finding(self):
        said = self.said((10, 9, 11), (15, 14, 16), short=(40, 30, 50))
        assert "it is 40 ms (30 to 50), though less is read: other work held up one of them." in said
        assert "though" not in self.said((10, 9, 11), (15, 14, 16))

    def test_no_ratio_of_times_that_overlap_is_told(self):
        said = self.said((45, 19, 75), (54, 19, 70), short=(30, 18, 50))
        assert ": times that cannot be told apart, 6.7 times the tokens a second" in said
        assert "Whether 32 or 128 tokens are in the cache cannot be told" in said
        assert "the wait" not in said

    def test_throughput_that_overlaps_is_not_told_either(self):
        assert "6.0 times the wait, tokens a second that cannot be told apart." in self.said((10, 9, 11), (60, 50, 95))
        assert "; neither these times nor the tokens a second" in self.said((45, 5, 90), (54, 19, 200))

    def test_reading_that_is_as_fast_as_writing_is_not_called_faster(self):
        said = self.said((10, 9, 11), (15, 14, 16), read=(1500, 1000, 3000))
        assert "which cannot be told from writing at its best" in said


EVERY = [dict(zip(SWITCHES, states, strict=True)) for states in itertools.product((False, True), repeat=4)]


def named(switches):
    return "+".join(name for name, on in switches.items() if on) or "nothing"


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_kernel_is_chosen")
class TestOnAGPU:
    SMALL: ClassVar = {
        "d_model": 64, "num_layers": 2, "num_heads": 4, "rank": 4, "experts": 3, "batch_size": 4, "length": 64,
    }  # fmt: skip

    @pytest.mark.parametrize("switches", EVERY, ids=named)
    def test_a_step_takes_the_memory_that_is_predicted(self, switches):
        step = full_model_step.run(full_model_step.Params(**self.SMALL, **switches), LocalJob("cuda"))
        assert math.isfinite(step.loss)
        assert 0 < step.evidence.low_ms <= step.evidence.median_ms <= step.evidence.high_ms < math.inf
        assert abs(step.predicted_bytes - step.peak_bytes) / step.peak_bytes < 0.1

    @pytest.mark.parametrize(
        "changes",
        [{}, OFF, {"experts": 16, "top_k": 1}, {"begin": "storyteller", "experts": 16, "top_k": 1}],
        ids=str,
    )
    def test_all_properties_hold(self, changes):
        checks = full_model_tests.run(full_model_tests.Params(**self.SMALL | changes), LocalJob("cuda")).checks
        assert [(check.name, check.measured, check.bound) for check in checks if not check.passed] == []

    def test_an_ablation_has_all_its_rows(self):
        params = full_model_ablation.Params(**self.SMALL, steps=5, text=TEXT)
        found = full_model_ablation.run(params, LocalJob("cuda"))
        assert (found.ended, len(found.rows)) == ("finished", 10)
        for row in found.rows:
            assert not row.diverged
            assert row.timed == 3
            assert 0 < row.low_ms <= row.median_ms <= row.high_ms < math.inf
            assert row.peak_bytes > row.model_bytes > 0

    def test_a_training_learns(self):
        params = full_model_training.Params(**self.SMALL, steps=24, text=TEXT, prompt="The cat")
        found = full_model_training.run(params, LocalJob("cuda"))
        assert found.ended == "finished"
        assert np.isfinite(found.loss).all()
        assert found.held_out_loss[-1] < 0.9 * found.held_out_loss[0]
        assert found.step_bytes > found.model_bytes
        np.testing.assert_allclose(found.load.mean(-1), 1)

    def test_throughput_has_all_its_points(self):
        params = full_model_throughput.Params(**self.SMALL | {"batch_size": 1}, runs=3)
        found = full_model_throughput.run(params, LocalJob("cuda"))
        assert (found.ended, len(found.points)) == ("finished", 6)
        assert all(0 < point.low_ms <= point.median_ms <= point.high_ms < math.inf for point in found.points)
