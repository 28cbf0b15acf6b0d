"""The experiments of the MoE-LoRA lab in this process: what they learn, measure and keep."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine import experiments, llama, pretrained
from engine.data import IGNORED
from engine.errors import InputError
from engine.experiments import moe_lora, moe_lora_split, moe_lora_tests
from engine.experiments._moe_lora import ROLES, TASK_NAMES
from engine.experiments._on_workers.moe_lora_training import Examination, adapt, similarity
from engine.finetuning.lessons import Lessons, answered_rightly
from engine.moe.injection import moe_lora_layers, without_expert
from engine.moe.lora import MoELoRALayer
from engine.moe.observation import observing
from engine.moe.tasks import read_tasks
from engine.runtime.jobs import LocalJob
from engine.trainer import DivergedError, Trainer, evaluate

TINY = {"targets": "query and value", "rank": 2, "experts": 3, "steps": 6, "batch_size": 4}
E, J, N = 3, 4, 12


@pytest.fixture(scope="module")
def base():
    return pretrained.load("storyteller")


@pytest.fixture(scope="module")
def exam(base):
    return Examination(base)


@pytest.fixture(scope="module")
def seen():
    return {"progress": [], "shown": []}


@pytest.fixture(scope="module")
def result(seen):
    job = LocalJob(on_progress=seen["progress"].append, on_show=seen["shown"].append)
    return moe_lora.run(moe_lora.Params(**TINY), job)


def stop_after(step):
    job = LocalJob()
    job._on_progress = lambda progress: setattr(job, "cancelled", progress.step >= step)
    return job


def learned(model):
    with torch.no_grad():
        for layer in moe_lora_layers(model).values():
            for expert in layer.experts:
                expert.B.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def test_all_three_runs_are_there_with_every_step_and_checkup(result):
    assert result.ended == "finished"
    assert [run.role for run in result.runs] == list(ROLES)
    for run in result.runs:
        np.testing.assert_array_equal(run.step, np.arange(1, 7))
        assert run.checked.tolist() == list(range(7))
        assert run.task_loss.shape == run.task_accuracy.shape == (7, J)
        assert np.isfinite(run.loss).all()
        assert (run.task_loss > 0).all()
        assert ((run.task_accuracy >= 0) & (run.task_accuracy <= 1)).all()


def test_all_runs_begin_at_the_same_place(result):
    first = [run.task_loss[0] for run in result.runs]
    np.testing.assert_allclose(first[1], first[0], rtol=1e-4)
    np.testing.assert_allclose(first[2], first[0], rtol=1e-4)
    assert result.runs[0].loss[0] == pytest.approx(result.runs[1].loss[0], rel=1e-4)


def test_routing_is_shares(result):
    assert result.routing.shape == (7, J, N, E)
    np.testing.assert_allclose(result.routing.sum(-1), 1)
    assert result.information.shape == (7, N)
    assert ((result.information >= 0) & (result.information <= 1)).all()
    assert result.tasks == list(TASK_NAMES)
    assert len(result.projections) == N


def test_experts_are_taken_apart(result):
    anatomy = result.anatomy
    assert anatomy.spectra.shape == (N, E, 2)
    assert (np.diff(anatomy.spectra, axis=-1) <= 0).all()
    assert anatomy.similarity.shape == (N, E, E)
    assert (np.abs(anatomy.similarity) <= 1 + 1e-6).all()
    assert anatomy.off_loss.shape == anatomy.off_accuracy.shape == (E, J)
    assert anatomy.favourite_off_loss.shape == (J, J)
    np.testing.assert_array_equal(anatomy.favourite, result.routing[-1].argmax(-1))
    np.testing.assert_allclose(anatomy.loss, result.mixture.task_loss[-1])
    assert not np.allclose(anatomy.off_loss, anatomy.loss)


def test_what_it_says_is_judged_word_by_word(result):
    assert len(result.answers) == 3 * J
    for answer in result.answers:
        assert answer.right == (answer.said == f"{answer.expected}.")


def test_it_is_reported_and_shown_on_the_way(seen, result):
    steps = [progress.step for progress in seen["progress"]]
    assert steps == sorted(steps)
    assert steps[-1] == seen["progress"][-1].total == 18
    assert {shown.ended for shown in seen["shown"]} == {"running"}
    lengths = [sum(len(run.step) for run in shown.runs) for shown in seen["shown"]]
    assert lengths == sorted(lengths)
    assert seen["shown"][0].anatomy is None
    assert any(shown.anatomy is not None for shown in seen["shown"])


def test_the_result_can_be_written_down(result):
    json.dumps(experiments.to_plain(result), allow_nan=False)


@pytest.mark.parametrize("step", [2, 9])
def test_what_was_learned_before_a_cancellation_is_kept(step):
    found = moe_lora.run(moe_lora.Params(**TINY), stop_after(step))
    assert found.ended == "cancelled"
    assert sum(len(run.step) for run in found.runs) == step
    assert f"run {1 + step // 6} of 3" in found.ending
    assert found.anatomy is not None
    assert found.runs[-1].checked[-1] == step % 6


@pytest.mark.parametrize("error", [InputError("The router's weight has 1 of 768 numbers that are not finite."),
                                   DivergedError("Training diverged at step 4 of 6.", 4)])  # fmt: skip
def test_a_divergence_is_told_and_what_was_learned_before_is_kept(monkeypatch, error):
    take = Trainer._take_step

    def fail(trainer):
        if trainer.step == 3:
            raise error
        return take(trainer)

    monkeypatch.setattr(Trainer, "_take_step", fail)
    found = moe_lora.run(moe_lora.Params(**TINY), LocalJob())
    assert found.ended == "diverged"
    assert "diverged at step 4 of 6" in found.ending
    assert str(error) in found.ending
    assert len(found.mixture.step) == 3
    assert found.anatomy is None


@pytest.mark.parametrize("seed", range(2))
def test_the_same_seed_gives_the_same(seed):
    params = moe_lora.Params(**TINY | {"seed": seed, "steps": 2})
    one, other = (moe_lora.run(params, LocalJob()) for _ in range(2))
    np.testing.assert_array_equal(one.mixture.loss, other.mixture.loss)
    np.testing.assert_array_equal(one.routing, other.routing)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "noisy", "random"])
@pytest.mark.parametrize("options", [{"experts": 1}, {"top_k": 2, "shared_a": True}, {"bias_rate": 0.0}])
def test_every_setting_runs(kind, options):
    found = moe_lora.run(moe_lora.Params(**TINY | {"steps": 1, "kind": kind} | options), LocalJob())
    assert found.ended == "finished"
    np.testing.assert_allclose(found.routing.sum(-1), 1)
    if found.experts == 1:
        assert not found.information.any()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_mixture_learns_all_four_tasks():
    found = moe_lora.run(moe_lora.Params(), LocalJob())
    assert (found.mixture.mean_accuracy[0], found.ended) == (0, "finished")
    assert found.mixture.mean_accuracy[-1] > 0.5
    assert (found.mixture.task_loss[-1] < found.mixture.task_loss[0] / 3).all()
    assert all(run.mean_accuracy[-1] > 0.5 for run in found.runs)
    assert len({answer.task for answer in found.answers if answer.right}) >= 3


class TestExamination:
    def test_agrees_with_asking_each_task_by_itself(self, base, exam):
        model = learned(adapt("MoE-LoRA", moe_lora.Params(**TINY), base))
        found = exam.take(model)
        for index, task in enumerate(read_tasks()):
            lessons = Lessons(task.held_out, base.tokenizer, base.max_tokens)
            assert found.loss[index] == pytest.approx(evaluate(model, lessons, 16), rel=1e-4)
            right = answered_rightly(model, lessons)
            assert found.accuracy[index] == pytest.approx(sum(right) / len(right))

    def test_shares_are_those_of_a_plain_count(self, base, exam):
        model = learned(adapt("MoE-LoRA", moe_lora.Params(**TINY | {"top_k": 2}), base))
        found = exam.take(model)
        with torch.no_grad(), observing(model.eval()) as seen:
            model(exam.inputs)
        counts = np.zeros((J, E))
        _, routing = seen[5]
        for token, expert in zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True):
            counts[exam.task[token // exam.inputs.shape[1]], expert] += 1
        np.testing.assert_allclose(found.routing[:, 5], counts / counts.sum(1, keepdims=True))
        both = counts / counts.sum(1, keepdims=True) / J  # p(task, expert), with equal tasks
        apart = both.sum(1, keepdims=True) * both.sum(0)
        nats = (both[both > 0] * np.log(both[both > 0] / apart[both > 0])).sum()
        assert nats > 0.001
        assert found.information[5] == pytest.approx(nats / math.log(J))
        read = (exam.inputs != 0).sum().item()
        assert counts.sum() == 2 * read

    def test_filling_balances_nothing(self, base, exam):
        """A batch with more filling at its end moves the bias as one with less does."""
        biases = []
        for width in (exam.inputs.shape[1], exam.inputs.shape[1] + 9):
            model = learned(adapt("MoE-LoRA", moe_lora.Params(**TINY), base)).train()
            inputs = F.pad(exam.inputs, (0, width - exam.inputs.shape[1]))
            targets = F.pad(exam.targets, (0, width - exam.inputs.shape[1]), value=IGNORED)
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
            biases.append(torch.stack([layer.router.selection_bias for layer in moe_lora_layers(model).values()]))
        torch.testing.assert_close(biases[0], biases[1])
        assert biases[0].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shared_a", [False, True])
def test_similarity_is_the_cosine_of_the_updates(seed, shared_a):
    torch.manual_seed(seed)
    layer = MoELoRALayer(24, 16, 4, 3, shared_a=shared_a)
    with torch.no_grad():
        for expert in layer.experts[:3]:
            expert.B.normal_()
        layer.experts[1].B.copy_(-2 * layer.experts[0].B)
    deltas = torch.stack([(expert.A @ expert.B).flatten() for expert in layer.experts]).double()
    expected = F.cosine_similarity(deltas[:, None], deltas[None], dim=-1).detach().numpy()
    found = similarity(layer)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not found[3].any()  # still 0
    if shared_a:
        assert found[0, 1] == pytest.approx(-1)


@pytest.mark.parametrize("index", range(E))
def test_switching_off_is_what_the_matrix_says(base, exam, index):
    from engine.experiments._on_workers.moe_lora_training import dissect

    model = learned(adapt("MoE-LoRA", moe_lora.Params(**TINY), base))
    anatomy = dissect(model, exam)
    with torch.no_grad():
        for layer in moe_lora_layers(model).values():
            layer.experts[index].B.zero_()
    np.testing.assert_allclose(exam.take(model).loss, anatomy.off_loss[index], rtol=1e-4)


def test_favourites_are_switched_off_one_by_one(base, exam):
    from engine.experiments._on_workers.moe_lora_training import dissect

    model = learned(adapt("MoE-LoRA", moe_lora.Params(**TINY), base))
    anatomy = dissect(model, exam)
    layers = list(moe_lora_layers(model).values())
    assert all(layer.silenced is None for layer in layers)
    with torch.no_grad():
        for layer, favourite in zip(layers, anatomy.favourite[2], strict=True):
            layer.experts[favourite].B.zero_()
    np.testing.assert_allclose(exam.take(model).loss, anatomy.favourite_off_loss[2], rtol=1e-4)


def test_what_is_published_is_left_untouched(base, result):
    before = [parameter.clone() for parameter in base.model.parameters()]
    moe_lora.run(moe_lora.Params(**TINY | {"steps": 1}), LocalJob())
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters(), strict=True))
    with torch.no_grad():
        model = adapt("MoE-LoRA", moe_lora.Params(**TINY), base)
        ids = torch.arange(1, 9)[None]
        torch.testing.assert_close(model(ids), llama.from_transformers(base.model)(ids))


class TestProperties:
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"kind": "random"},
            {"kind": "noisy", "top_k": 2},
            {"kind": "softmax", "shared_a": True, "bias_rate": 0.0},
            {"experts": 1},
        ],
    )
    def test_hold(self, values):
        found = moe_lora_tests.run(moe_lora_tests.Params(**TINY | values), LocalJob())
        assert len(found.checks) >= 11
        assert [check for check in found.checks if not check.passed] == []

    def test_a_wrong_layer_is_found_out(self, monkeypatch):
        right = MoELoRALayer._concatenated
        monkeypatch.setattr(MoELoRALayer, "_concatenated", lambda *given: 1.01 * right(*given))
        found = moe_lora_tests.run(moe_lora_tests.Params(**TINY), LocalJob())
        assert "Without a loop it gives what a loop gives" in {check.name for check in found.checks if not check.passed}

    def test_padding_that_is_routed_is_found_out(self, monkeypatch):
        monkeypatch.setattr("engine.experiments._on_workers.moe_lora_training.ignore_filling", lambda model: None)
        found = moe_lora_tests.run(moe_lora_tests.Params(**TINY), LocalJob())
        assert "Filling goes to no expert" in {check.name for check in found.checks if not check.passed}


class TestSplit:
    def test_with_the_bias_every_seed_parts_without_it_some_do_not(self):
        pushed = moe_lora_split.run(moe_lora_split.Params(seed=0, others=9), LocalJob())
        left = moe_lora_split.run(moe_lora_split.Params(seed=0, others=9, bias_rate=0), LocalJob())
        assert None not in [pushed.settled, *pushed.others]
        assert 0 < [left.settled, *left.others].count(None) < 10

    @pytest.mark.parametrize("seed", [1, 3, 5])
    @pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
    @pytest.mark.parametrize("similarity", [-0.9, 0.0, 0.9])
    def test_what_is_shown_agrees_with_itself(self, seed, kind, similarity):
        params = moe_lora_split.Params(seed=seed, kind=kind, similarity=similarity)
        found = moe_lora_split.run(params, LocalJob())
        assert found.cosine == pytest.approx(similarity, abs=1e-3)
        assert found.scores.shape == (101, 2, 2)
        assert found.bias.shape == found.chosen.shape == found.loss.shape == (101, 2)
        takes_0 = found.lead > found.handicap[:, None]
        np.testing.assert_array_equal(found.chosen == 0, takes_0)
        assert found.apart
        assert (found.chosen[found.settled :, 0] != found.chosen[found.settled :, 1]).all()
        if found.settled:
            assert found.chosen[found.settled - 1, 0] == found.chosen[found.settled - 1, 1]
        assert (found.loss[-1] < 0.05 * found.loss[0]).all()

    def test_without_the_bias_it_stays_at_nought(self):
        found = moe_lora_split.run(moe_lora_split.Params(bias_rate=0), LocalJob())
        assert not found.bias.any()
        assert not found.apart
        assert found.settled is None

    def test_the_default_seed_shows_the_bias_at_work(self):
        found = moe_lora_split.run(moe_lora_split.Params(), LocalJob())
        assert found.chosen[0, 0] == found.chosen[0, 1]
        assert found.apart
        assert np.abs(found.handicap).max() > 0.05

    def test_other_seeds_are_the_runs_of_those_seeds(self):
        found = moe_lora_split.run(moe_lora_split.Params(seed=4, others=2, rounds=60), LocalJob())
        own = [moe_lora_split.run(moe_lora_split.Params(seed=seed, rounds=60), LocalJob()) for seed in (5, 6)]
        assert found.others == [one.settled for one in own]

    def test_it_can_be_cancelled_between_seeds(self):
        from engine.errors import JobCancelledError

        job = LocalJob()
        job._on_progress = lambda progress: setattr(job, "cancelled", True)
        with pytest.raises(JobCancelledError):
            moe_lora_split.run(moe_lora_split.Params(others=5, rounds=5), job)

    def test_the_result_can_be_written_down(self):
        found = moe_lora_split.run(moe_lora_split.Params(rounds=3, others=1), LocalJob())
        json.dumps(experiments.to_plain(found), allow_nan=False)
        assert dataclasses.is_dataclass(found)


def test_without_expert_reaches_a_single_layer(base):
    """What the favourites' matrix is made with."""
    model = adapt("MoE-LoRA", moe_lora.Params(**TINY), base)
    first, *others = moe_lora_layers(model).values()
    with without_expert(first, 1):
        assert first.silenced == 1
        assert all(layer.silenced is None for layer in others)
