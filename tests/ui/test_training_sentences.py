"""What the training lab says follows from the numbers, on results made by hand."""

import dataclasses

import numpy as np
import pytest

from engine.experiments import training
from engine.experiments._training_cost import Cost
from ui.training import sentences
from ui.training.settings import cost_sentence, roughly, step_seconds


def result(held_out=(5.8, 3.0), *, loss=(5.8, 3.0), copied=0.0, ended="finished", steps=None, seconds=10.0):
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
        induction=np.zeros(checkups),
        previous_token=np.zeros(checkups),
        copied=copies,
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


class TestRandomSamples:
    def test_they_cost_less_only_if_they_are_copied(self):
        learned = result(held_out=(5.8, 4.0), loss=(5.8, 2.0), copied=0.9)
        assert "copied" in sentences.random_samples(learned)
        for copied in (0.0, 0.4):
            words = sentences.random_samples(result(held_out=(5.8, 4.0), loss=(5.8, 2.0), copied=copied))
            assert "includes the random samples." in words
        dear = result(held_out=(5.8, 2.0), loss=(5.8, 4.0), copied=0.9)
        assert "cost less" not in sentences.random_samples(dear)


class TestByHeart:
    def test_it_is_said_where_the_training_loss_fell_on(self):
        words = sentences.loss(result(held_out=(5.8, 3.0, 4.0), loss=(5.8, 3.0, 1.0)))
        assert "lowest after step 40 (3.00): after that the model learned its text by heart" in words

    @pytest.mark.parametrize(
        "values",
        [
            {"loss": (5.8, 3.0, 4.0)},
            {"loss": (5.8, 3.0, 1.0), "ended": "diverged"},
            {"loss": (5.8, 3.0, 1.0), "copied": (0.0, 0.0, 0.9)},
        ],
        ids=["the training loss rose", "diverged", "it learned to copy"],
    )
    def test_it_is_not_said_otherwise_but_the_lowest_is(self, values):
        words = sentences.loss(result(held_out=(5.8, 3.0, 4.0), **values))
        assert "by heart" not in words
        assert "lowest after step 40 (3.00)." in words

    def test_a_loss_that_is_lowest_at_the_end_has_no_such_sentence(self):
        assert "lowest" not in sentences.loss(result(held_out=(5.8, 4.0, 3.0), loss=(5.8, 3.0, 1.0)))

    def test_a_run_that_was_best_before_it_began_learned_nothing_by_heart(self):
        assert "by heart" not in sentences.loss(result(held_out=(5.8, 6.5), loss=(5.8, 3.0)))


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

    @pytest.mark.parametrize("held_out", [(5.8,), (5.8, 5.8), (5.8, 9.0), (5.8, 5.79)])
    def test_without_progress_there_is_no_half_of_it(self, held_out):
        words = sentences.progress(result(held_out=held_out, steps=1))
        assert "Half" not in words
        assert "has not clearly fallen" in words


def test_the_speed_is_that_of_the_steps_alone():
    found = result(steps=40, held_out=(5.8, 3.0), seconds=10.0)  # 0.1 s a step, 1.1 GFLOP each
    assert step_seconds(found) == pytest.approx(4.0)
    assert "11 GFLOP/s" in sentences.speed(found)
    assert sentences.speed(dataclasses.replace(found, seconds=1000.0)).startswith("The steps did 11 GFLOP/s")


class TestCost:
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
