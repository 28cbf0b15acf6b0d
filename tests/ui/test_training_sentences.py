"""What the training lab says follows from the numbers, on results made by hand."""

import dataclasses

import numpy as np
import pytest

from engine.experiments import training
from engine.experiments._training import recorded_run
from engine.experiments._training_cost import Cost
from ui.training import sentences
from ui.training.settings import batch_sentence, cost_sentence, roughly, step_seconds


def result(
    held_out=(5.8, 3.0),
    *,
    loss=(5.8, 3.0),
    text_loss=None,
    random_loss=None,
    induction=None,
    heads=None,
    copied=0.0,
    ended="finished",
    steps=None,
    seconds=10.0,
):
    """A run whose losses go through the given heights, evenly."""
    checkups = len(held_out)
    steps = steps or 40 * (checkups - 1)
    step = np.arange(1, steps + 1)
    copies = np.full(checkups, copied) if np.isscalar(copied) else np.array(copied)
    return training.Result(
        step=step,
        loss=np.interp(step, np.linspace(1, max(steps, 2), len(loss)), loss),
        learning_rate=np.full(steps, 1e-3),
        grad_norm=np.ones(steps),
        tokens_per_second=np.full(steps, 1000.0),
        checked=np.linspace(0, steps, checkups).astype(int),
        held_out_loss=np.array(held_out),
        text_loss=np.array(text_loss or held_out),
        random_loss=np.array(random_loss or held_out),
        induction=np.array(induction if induction else [0.0] * checkups),
        previous_token=np.zeros(checkups),
        copied=copies,
        heads=np.array(heads if heads else [(0, 0)] * checkups, int),
        head_maps=np.zeros((2, 8, 8), np.float16),
        prompt="One day",
        samples=[],
        steps=steps,
        ended=ended,
        ending="All steps were taken.",
        predicted=Cost(1, 1e9 * steps, 1),
        measured=Cost(1, 1.1e9 * steps, 1),
        seconds=seconds,
        tokens_per_step=100,
        training_tokens=900,
        held_out_tokens=100,
        characters_per_token=2.0,
        device="CPU",
        versions={"torch": "2"},
    )


class TestApart:
    def test_the_kinds_have_their_own_numbers(self):
        words = sentences.apart(result(held_out=(5.8, 4.0), text_loss=(5.8, 3.5), random_loss=(5.8, 5.5)), 0.6)
        assert words == (
            "The text that it reads costs 3.50, unread text 4.00. A random token that is said again costs 5.50."
        )

    @pytest.mark.parametrize(("share", "absent"), [(0.0, "random"), (1.0, "text")])
    def test_what_is_not_read_is_not_said(self, share, absent):
        assert absent not in sentences.apart(result(), share)

    def test_copying_is_said_only_of_a_model_that_copies(self):
        assert "now that it can be copied" in sentences.apart(result(copied=0.9), 0.6)
        assert "copied" not in sentences.apart(result(copied=0.4), 0.6)


class TestMixture:
    @pytest.mark.parametrize("share", [0.05, 0.6, 1.0])
    def test_the_share_is_said(self, share):
        words = sentences.mixture(share)
        assert words.startswith(f"{share:.0%} of what it reads is random tokens said twice")
        assert "looking back" in words

    def test_text_alone_is_text_alone(self):
        assert "text alone" in sentences.mixture(0.0)
        assert "0%" not in sentences.mixture(0.0)


class TestInduction:
    def test_the_head_that_formed_has_its_name(self):
        found = result(held_out=(5.8, 4, 3), induction=(0.02, 0.6, 0.9), heads=((0, 1), (1, 0), (1, 0)))
        assert sentences.induction(found, 2).startswith(
            "An induction head formed by step 40: layer 1, head 0, which scored 60% then and scores 90% at the end."
        )
        assert sentences.formed(found) == 1

    def test_another_one_that_is_better_at_the_end_has_its_own(self):
        found = result(held_out=(5.8, 4, 3), induction=(0.02, 0.6, 0.9), heads=((0, 1), (1, 0), (1, 1)))
        words = sentences.induction(found, 2)
        assert "layer 1, head 0, which scored 60% then. The best at the end is layer 1, head 1, with 90%." in words

    def test_none_has_no_name_and_no_moment(self):
        found = result(induction=(0.02, 0.3))
        assert "No induction head formed" in sentences.induction(found, 2)
        assert "layer" not in sentences.induction(found, 2)
        assert sentences.formed(found) is None

    @pytest.mark.parametrize("ended", ["running", "finished", "diverged"])
    def test_one_layer_is_told_why_it_has_none_and_not_to_read_more(self, ended):
        found = result(induction=(0.02, 0.06), ended=ended)
        assert sentences.ONE_LAYER in sentences.induction(found, 1)
        assert "storyteller" not in sentences.induction(found, 1)
        assert sentences.ONE_LAYER not in sentences.induction(found, 2)
        assert ("storyteller" in sentences.induction(found, 2)) == (ended != "running")

    def test_the_best_score_has_its_step_where_the_last_is_another(self):
        found = result(held_out=(5.8, 4, 9), induction=(0.05, 0.02, 0.0))
        assert "the best score of a head is 5% after step 0 and 0% after step 80" in sentences.induction(found, 2)
        assert "score of a head is 5%, of" in sentences.induction(result(induction=(0.01, 0.05)), 2)

    def test_the_maps_are_read_where_the_lines_are(self):
        maps = np.zeros((2, 8, 8), np.float16)
        maps[1, range(4, 8), range(1, 5)] = 0.75
        words = sentences.look_back(dataclasses.replace(result(), head_maps=maps))
        assert "4 random tokens said twice" in words
        assert "3 tokens back: 0% of its attention before the first step, 75% after step 40" in words

    @pytest.mark.parametrize("score", [0.11, 0.9])
    def test_the_map_s_share_and_the_score_are_told_apart(self, score):
        words = sentences.look_back(result(induction=(0.0, score)))
        assert f"of this one sequence; its score above, {score:.0%}, is the mean over other random tokens" in words


def test_the_storyteller_is_explained_with_its_own_numbers():
    words = sentences.storyteller(recorded_run(), 4096)
    assert "the model that comes with the workbench" in words
    assert "80% text in blocks of 512 tokens, 4 times as many tokens a step" in words


class TestByHeart:
    def test_it_is_said_where_the_text_that_it_reads_became_cheaper(self):
        words = sentences.loss(result(held_out=(5.8, 3.0, 4.0), text_loss=(5.8, 3.0, 1.0)))
        assert "lowest after step 40 (3.00): after that the model learned its text by heart" in words

    @pytest.mark.parametrize(
        "values",
        [
            {"text_loss": (5.8, 3.0, 4.0)},
            {"text_loss": (5.8, 3.0, 1.0), "ended": "diverged"},
            {"text_loss": (5.8, 3.0, 3.0), "loss": (5.8, 3.0, 1.0), "random_loss": (5.8, 3.0, 0.1)},
        ],
        ids=["the text became dearer", "diverged", "it learned to copy"],
    )
    def test_it_is_not_said_otherwise_but_the_lowest_is(self, values):
        words = sentences.loss(result(held_out=(5.8, 3.0, 4.0), **values))
        assert "by heart" not in words
        assert "lowest after step 40 (3.00)." in words

    def test_a_loss_that_is_lowest_at_the_end_has_no_such_sentence(self):
        assert "lowest" not in sentences.loss(result(held_out=(5.8, 4.0, 3.0), text_loss=(5.8, 3.0, 1.0)))

    def test_a_run_that_was_best_before_it_began_learned_nothing_by_heart(self):
        assert "by heart" not in sentences.loss(result(held_out=(5.8, 6.5), text_loss=(5.8, 3.0)))


class TestGuessing:
    def test_a_loss_below_it_is_a_number_of_tokens(self):
        assert "20 equally likely next tokens instead of all 320." in sentences.loss(result(held_out=(5.9, 3.0)))
        assert "20 equally likely next tokens instead of 245." in sentences.loss(result(held_out=(5.5, 3.0)))

    @pytest.mark.parametrize("last", [5.9, 21.6, 300.0])
    def test_a_loss_above_it_is_not(self, last):
        words = sentences.loss(result(held_out=(5.8, last), ended="diverged"))
        assert "worse than guessing" in words
        assert "equally likely" not in words

    def test_a_loss_at_it_is_no_better(self):
        assert "no better than guessing" in sentences.loss(result(held_out=(5.9, 5.78)))


class TestProgress:
    def test_half_of_it_is_where_the_loss_had_half_fallen(self):
        words = sentences.progress(result(held_out=(6.0, 5.5, 4.5, 4.2, 4.0)))
        assert words == "Half of all progress was made by step 80 of 160."
        assert "progress so far was" in sentences.progress(result(ended="running"))

    @pytest.mark.parametrize("held_out", [(5.8,), (5.8, 5.8), (5.8, 5.79), (5.8, 5.84)])
    def test_without_progress_there_is_no_half_of_it(self, held_out):
        words = sentences.progress(result(held_out=held_out, steps=1))
        assert "Half" not in words
        assert "has not clearly fallen" in words

    @pytest.mark.parametrize("last", [5.9, 9.0, 20.88])
    def test_a_loss_that_rose_is_said_to_have_risen(self, last):
        words = sentences.progress(result(held_out=(5.8, last), ended="diverged"))
        assert f"has risen: from 5.80 nats a token before the first step to {last:.2f}" in words
        assert "fallen" not in words

    def test_a_loss_that_fell_and_rose_has_both(self):
        words = sentences.progress(result(held_out=(5.8, 4.0, 6.5), ended="diverged"))
        assert (
            words
            == "Half of all progress was made by step 40 of 80. After step 40 the loss rose again, from 4.00 to 6.50."
        )


def test_the_speed_is_that_of_the_steps_alone():
    found = result(steps=40, held_out=(5.8, 3.0), seconds=10.0)  # 0.1 s a step, 1.1 GFLOP each
    assert step_seconds(found) == pytest.approx(4.0)
    assert "11 GFLOP/s" in sentences.speed(found)
    assert sentences.speed(dataclasses.replace(found, seconds=1000.0)).startswith("The steps did 11 GFLOP/s")


def test_the_step_that_is_weighed_does_not_slow_the_others():
    found = result(steps=40)
    weighed = found.tokens_per_second.copy()
    weighed[1] /= 50
    assert step_seconds(dataclasses.replace(found, tokens_per_second=weighed)) == pytest.approx(step_seconds(found))


def test_steps_of_unequal_speed_are_added_up():
    found = result(steps=100)
    speed = np.where(np.arange(100) < 55, 500.0, 1000.0)  # 100 tokens a step
    assert step_seconds(dataclasses.replace(found, tokens_per_second=speed)) == pytest.approx(55 * 0.2 + 45 * 0.1)


class TestCost:
    @pytest.mark.parametrize(("samples", "said"), [(18, "a batch holds 18, not 64."), (64, ""), (None, "")])
    def test_a_batch_that_the_text_cannot_fill_is_said(self, samples, said):
        words = batch_sentence(training.Params(), samples)
        assert words.endswith(said)
        assert bool(words) == bool(said)

    def test_the_arithmetic_of_many_default_runs_is_said(self):
        usual = training.Params()
        assert "times the arithmetic" not in cost_sentence(usual.predict(), None)
        large = training.Params(num_layers=8, d_model=256, steps=2000).predict()
        times = round(large.flops / usual.predict().flops)
        assert times > 20
        assert f"This is {times} times the arithmetic of the default run." in cost_sentence(large, None)

    def test_the_time_follows_from_the_last_run_s_speed(self):
        last = result(steps=40)  # 40 GFLOP by the formula in 4 s
        cost = Cost(1, 400e9, 1)
        assert "take about 40 s." in cost_sentence(cost, last)
        assert "limit" not in cost_sentence(cost, last)
        assert "take about 2.8 h, and it stops at its limit of 1 h." in cost_sentence(Cost(1, 1e14, 1), last)
        assert "last run" not in cost_sentence(cost, None)
        assert "last run" not in cost_sentence(cost, dataclasses.replace(last, step=np.array([])))

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [
            (0.2, "1 s"),
            (41.3, "41 s"),
            (89, "89 s"),
            (91, "1.5 min"),
            (5399, "90 min"),
            (5401, "1.5 h"),
            (90_000, "25 h"),
        ],
    )
    def test_times_are_said_roughly(self, seconds, said):
        assert roughly(seconds) == said
