"""Collapse and its cures in this process: a small mixture of experts that learns, and what is written down."""

import dataclasses
import math
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from engine.data import Batch
from engine.experiments import _router_languages, router_collapse
from engine.experiments._on_workers import router_training
from engine.experiments._on_workers.router_training import BalancedTrainer, build, count_directions
from engine.runtime.jobs import LocalJob
from engine.runtime.results import weigh
from engine.trainer import TrainerOptions

GUESSING = math.log(router_collapse.VOCAB_SIZE)


def train(job=None, **values):
    return router_collapse.run(router_collapse.Params(**values), job or LocalJob())


@pytest.fixture
def few_held_out(monkeypatch):
    monkeypatch.setattr(router_collapse, "_HELD_OUT_BLOCKS", 2)


@pytest.fixture(scope="module")
def collapsed():
    return train(steps=75)


@pytest.fixture(scope="module")
def cured():
    return train(steps=75, balancing="loss-free bias", bias_rate=0.1)


def test_without_balancing_it_collapses(collapsed):
    assert collapsed.relative[0].min() > 0.1
    assert collapsed.dead[-1] >= 2
    assert collapsed.max_violation[-1] > 1.5
    assert not collapsed.bias.any()
    assert f"{collapsed.dead[-1]} of 16 experts get no token at all" in collapsed.sentence
    assert "0 of 16 experts got less than a tenth of a fair share before the first step" in collapsed.course


def test_the_bias_cures_it(collapsed, cured):
    assert cured.dead[-1] == 0
    assert cured.trained_violation[-1] < collapsed.trained_violation[-1] / 3
    assert cured.held_out_loss[-1] < collapsed.held_out_loss[-1] + 0.1  # it still moves much; the default run is strict
    assert cured.bias[-1].any()
    assert not cured.bias[0].any()


def test_the_auxiliary_loss_evens_the_load(collapsed):
    found = train(steps=75, balancing="auxiliary loss", aux_weight=0.1)
    assert found.max_violation[-1] < collapsed.max_violation[-1] / 2
    assert found.loss[-1] == pytest.approx(collapsed.loss[-1], abs=0.2)  # the auxiliary loss is not in it


def test_it_learns_and_specialises(collapsed):
    assert abs(collapsed.held_out_loss[0] - GUESSING) < 0.3
    assert collapsed.held_out_loss[-1] < collapsed.held_out_loss[0] - 2
    assert collapsed.information[-1] > collapsed.information[0] + 0.2
    assert (collapsed.information_chance < 0.02).all()
    busy = max(collapsed.typical, key=lambda one: one.load)
    assert busy.purity > 0.5
    assert busy.tokens
    assert "nats about its source beyond what chance gives" in collapsed.learned


def test_every_step_and_every_checkup_is_there(collapsed):
    M, E, J = len(collapsed.checked), 16, len(collapsed.sources)
    np.testing.assert_array_equal(collapsed.step, np.arange(1, 76))
    assert (collapsed.checked[0], collapsed.checked[-1]) == (0, 75)
    assert collapsed.loss.shape == (75,)
    assert collapsed.load.shape == collapsed.relative.shape == collapsed.bias.shape == (M, E)
    assert collapsed.source_loss.shape == (M, J)
    assert collapsed.counts.shape == (J, E)
    assert (collapsed.counts.sum(1) == collapsed.held_out_tokens / J).all()
    np.testing.assert_allclose(collapsed.load.sum(1), 1)
    np.testing.assert_allclose(collapsed.relative, E * collapsed.load)
    np.testing.assert_allclose(collapsed.max_violation, collapsed.relative.max(1) - 1)
    np.testing.assert_array_equal(collapsed.dead, (collapsed.load == 0).sum(1))
    np.testing.assert_allclose(collapsed.held_out_loss, collapsed.source_loss.mean(1))
    assert math.isnan(collapsed.trained_violation[0])
    assert np.isfinite(collapsed.trained_violation[1:]).all()
    weigh(collapsed)


def test_sizes_are_those_of_the_model(collapsed):
    model = build(16, 1, 0.0)
    assert collapsed.parameters == sum(parameter.numel() for parameter in model.parameters())
    dense = build(1, 1, 0.0)
    router = 15 * router_collapse.D_MODEL
    assert collapsed.active_parameters == sum(parameter.numel() for parameter in dense.parameters()) + router


def test_the_result_reaches_a_process_without_torch(collapsed):
    code = "import sys, pickle; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    plain = pickle.dumps(dataclasses.replace(collapsed, versions={}))
    assert subprocess.run([sys.executable, "-c", code], input=plain, check=False).returncode == 0


def test_tokens_come_to_look_alike(collapsed):
    assert collapsed.directions.shape == collapsed.checked.shape
    assert collapsed.directions.min() < collapsed.directions[0] / 1.5
    assert "directions before the first step" in collapsed.course


def test_it_collapses_with_a_router_that_does_not_learn(collapsed):
    found = train(steps=75, freeze_router=True)
    assert found.dead[-1] >= 2
    assert found.max_violation[-1] > 1.5
    assert "did not learn in this run" in found.course
    assert not np.array_equal(found.load, collapsed.load)


@pytest.mark.parametrize("seed", range(3))
def test_directions_are_counted(seed):
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(16, 16)).Q
    for count in (1, 4, 16):
        rows = basis[:count].repeat(8, 1)
        assert count_directions(3 * rows) == pytest.approx(count, rel=1e-4)


@pytest.mark.usefixtures("few_held_out")
class TestRuns:
    def test_what_is_known_is_shown_on_the_way(self):
        shown, reports = [], []
        train(LocalJob("cpu", reports.append, shown.append), steps=4)
        assert [len(draft.step) for draft in shown] == [0, 1, 2, 3, 4]
        assert {draft.ended for draft in shown} == {"running"}
        assert [report.step for report in reports] == [1, 2, 3, 4]
        assert set(reports[-1].numbers) == {"loss", "held_out_loss", "held_out_max_violation", "dead_experts"}
        assert shown[0].sentence.startswith("Before the first step")

    def test_a_cancelled_run_keeps_what_it_learned(self):
        def on_progress(progress):
            job.cancelled = progress.step == 3

        job = LocalJob("cpu", on_progress)
        found = train(job, steps=10)
        assert (len(found.step), found.checked[-1], found.ended) == (3, 3, "cancelled")
        assert found.ending == "Cancelled after step 3 of 10: what was learned until then is shown."

    def test_the_same_seed_learns_the_same(self):
        one, same, other = (train(steps=3, seed=seed) for seed in (5, 5, 6))
        np.testing.assert_array_equal(one.loss, same.loss)
        np.testing.assert_array_equal(one.load, same.load)
        assert (one.loss != other.loss).any()

    def test_a_router_that_is_no_number_is_named_and_stops(self, monkeypatch):
        def build_broken(*sizes):
            model, seen = build(*sizes), []

            def spoil(module, inputs):
                seen.append(1)
                if len(seen) == 4:
                    model.layers[1].mlp.router.weight.data[0, 0] = float("nan")

            model.register_forward_pre_hook(spoil)
            return model

        monkeypatch.setattr(router_training, "build", build_broken)
        found = train(steps=10)  # passes: a checkup, a step, a step, a step
        assert found.ended == "diverged"
        assert found.ending.startswith("Training stopped at step ")
        assert "The router's weight has 1 of 1024 numbers that are not finite" in found.ending
        assert np.isfinite(found.held_out_loss).all()
        assert len(found.checked) >= 2

    def test_a_rate_far_too_high_still_has_an_ending(self):
        found = train(steps=12, learning_rate=10.0)
        assert found.ended in ("finished", "diverged")
        assert np.isfinite(found.relative).all()

    @pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4)])
    def test_with_nothing_to_choose_the_load_is_fair(self, experts, top_k):
        found = train(steps=2, experts=experts, top_k=top_k, balancing="loss-free bias")
        np.testing.assert_array_equal(found.relative, 1)
        assert not found.bias.any()
        assert "one expert" in found.sentence or "exactly its fair share" in found.sentence
        assert found.information[-1] == 0

    def test_memory_is_estimated_from_above(self):
        from engine.measure import peak_memory

        params = router_collapse.Params(steps=2)
        used = peak_memory(lambda: router_collapse.run(params, LocalJob()), "cpu")
        assert used <= params.memory_bytes()


@pytest.mark.usefixtures("few_held_out")
def test_what_was_trained_on_is_counted_over_all_steps_since_the_checkup_before(monkeypatch):
    told, examine = [], router_training.Diary.examine

    def listen(diary, step, chosen):
        told.append((step, torch.stack(chosen).clone() if chosen else None))
        examine(diary, step, chosen)

    monkeypatch.setattr(router_training.Diary, "examine", listen)
    monkeypatch.setattr(router_collapse, "_CHECKUPS", 2)
    found = train(steps=8)
    chosen = {step: counts for step, counts in told if counts is not None}
    assert [len(chosen[step]) for step in found.checked[1:]] == [4, 4]
    for step, violation in zip(found.checked[1:], found.trained_violation[1:], strict=True):
        together = chosen[step].sum(0).double()
        assert violation == pytest.approx(float(together.max() / together.mean() - 1))
        last = chosen[step][-1].double()
        assert violation != pytest.approx(float(last.max() / last.mean() - 1))


class TestTrainer:
    def make(self, bias_rate=0.0, aux_weight=0.0):
        torch.manual_seed(0)
        stream = torch.arange(2000, dtype=torch.int32) % 500
        mixture = _router_languages.SourceMixture((stream, stream.flip(0)), 64)
        options = TrainerOptions(batch_size=4, learning_rate=1e-3)
        held_out = _router_languages.read(512, 64, 1).held_out
        return BalancedTrainer(build(4, 2, bias_rate), mixture, options, held_out=held_out, aux_weight=aux_weight)

    def test_the_bias_moves_by_the_rate_against_the_load(self):
        trainer = self.make(bias_rate=0.05)
        trainer.train_steps(1)
        load = trainer.chosen[0].float()
        expected = 0.05 * (load.mean() - load).sign()
        torch.testing.assert_close(trainer.model.layers[1].mlp.router.selection_bias, expected)

    def test_the_auxiliary_loss_is_trained_on_and_is_not_in_the_loss_that_is_told(self):
        with_loss, without = self.make(aux_weight=1.0), self.make()
        reports = []
        for trainer in (with_loss, without):
            trainer.on_step = reports.append
            trainer.train_steps(1)
        assert reports[0].loss - reports[1].loss == pytest.approx(1.0, abs=0.3)  # about 1 where the load is even
        assert with_loss.next_token_loss == pytest.approx(without.next_token_loss, rel=1e-5)
        assert reports[1].loss == pytest.approx(without.next_token_loss, rel=1e-5)

    def test_every_choice_is_counted(self):
        trainer = self.make()
        trainer.train_steps(3)
        assert [int(load.sum()) for load in trainer.chosen] == [4 * 64 * 2] * 3


class TestLanguages:
    def test_every_batch_has_as_much_of_each_source(self):
        streams = tuple(torch.full((300,), source) for source in range(5))
        batch = _router_languages.SourceMixture(streams, 64).batch(torch.arange(10) % 3, torch.Generator())
        assert isinstance(batch, Batch)
        assert batch.inputs.shape == batch.targets.shape == (10, 64)
        assert batch.inputs[:, 0].tolist() == [0, 1, 2, 3, 4] * 2

    def test_targets_are_the_next_tokens_of_a_window(self):
        mixture = _router_languages.SourceMixture((torch.arange(400), torch.arange(1000, 1500)), 64)
        for seed in range(5):
            batch = mixture.batch(torch.randperm(len(mixture)), torch.Generator().manual_seed(seed))
            assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
            assert (batch.inputs.diff(dim=1) == 1).all()

    def test_what_is_held_out_is_never_learned(self):
        found = _router_languages.read(512, 64, 10)
        assert len(found.held_out) == 50
        for source, stream in enumerate(found.learned):
            kept = found.held_out.ids[10 * source : 10 * source + 10]
            assert torch.equal(kept[:-1, -1], kept[1:, 0])  # consecutive blocks, of one source
            whole = torch.cat([stream, kept[:, :-1].flatten(), kept[-1, -1:]])
            text = found.tokenizer.decode(whole[:40].tolist())
            assert text.startswith(found.examples[source][:20])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [3, 5])
def test_the_default_run_collapses_and_the_bias_cures_it(seed):
    """MaxVio below 0.1 on all tokens of the last sixteen steps, at a loss that is no worse than another seed makes it.

    Of seeds 0 to 7 these are the hardest: at 3 the bias costs a little, at 5 held-out text is least even.
    """
    began = time.process_time()
    collapsed, cured = (train(seed=seed, balancing=balancing) for balancing in ("none", "loss-free bias"))
    assert time.process_time() - began < 2 * 60 * 2  # two runs of 60 seconds on two cores
    assert collapsed.dead[-1] >= 2
    assert (collapsed.relative[-1] < router_collapse.IDLE).sum() >= 5
    assert collapsed.max_violation[-1] > 2
    assert cured.checked[-1] - cured.checked[-2] == 16
    assert cured.trained_violation[-1] < 0.1
    assert cured.dead[-1] == 0
    assert cured.max_violation[-1] < 0.25
    assert cured.held_out_loss[-1] < collapsed.held_out_loss[-1] + router_collapse.SEED_NOISE
