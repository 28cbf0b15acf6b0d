"""The experiments of the LoRA lab in this process: what they learn, measure and keep."""

import dataclasses
import io
import json
import math
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import experiments, llama, pretrained
from engine.errors import InputError
from engine.experiments import _lora, lora, lora_adapter, lora_sweep, lora_tests
from engine.finetuning import changes
from engine.finetuning.lessons import Lessons, answered_rightly
from engine.finetuning.methods import prepare
from engine.lora.adapter_files import load_adapter
from engine.lora.injection import adapted_layers
from engine.measure import peak_memory
from engine.runtime.jobs import LocalJob

METHODS = typing.get_args(_lora.Method)
ADAPTERS = [method for method in METHODS if method != "full fine-tuning"]
OWN = "What is the code of the door? star\nWho has the key? Bim\nWhere is the old map? cave\nWhat is in the box? honey"
TINY = {"facts": OWN, "steps": 5, "batch_size": 4}


def tune(job=None, **values):
    return lora.run(lora.Params(**{**TINY, **values}), job or LocalJob())


def stop_after(step, reported=lambda progress: progress.step):
    job = LocalJob()
    job._on_progress = lambda progress: setattr(job, "cancelled", reported(progress) >= step)
    return job


def unpack(archive, folder):
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        opened.extractall(folder)
    (adapter,) = Path(folder).iterdir()
    return adapter


@pytest.fixture(scope="module")
def seen():
    return {"progress": [], "shown": []}


@pytest.fixture(scope="module")
def result(seen):
    """Facts of the invented town, not learned to the end."""
    job = LocalJob(on_progress=seen["progress"].append, on_show=seen["shown"].append)
    return lora.run(lora.Params(steps=40, rank=4), job)


def test_it_learns_what_it_did_not_know(result):
    assert result.accuracy[0] == result.held_out_accuracy[0] == 0
    assert result.accuracy[-1] > 0.1
    assert result.loss[-5:].mean() < result.loss[0] / 3


def test_every_step_and_every_checkup_is_there(result):
    np.testing.assert_array_equal(result.step, np.arange(1, 41))
    for name in ("loss", "tokens_per_second", "grad_norm_a", "grad_norm_b"):
        assert getattr(result, name).shape == (40,)
        assert np.isfinite(getattr(result, name)).all()
    assert result.checked.tolist() == list(range(0, 41, 5))
    assert result.accuracy.shape == result.held_out_accuracy.shape == result.checked.shape


def test_the_first_gradient_of_a_is_exactly_zero_and_only_the_first(result):
    assert result.grad_norm_a[0] == 0
    assert (result.grad_norm_a[1:] > 0).all()
    assert (result.grad_norm_b > 0).all()


def test_every_fact_is_asked_before_and_after(result):
    facts = _lora.read_facts()
    assert [answer.question for answer in result.answers if not answer.held_out] == [fact.question for fact in facts]
    assert {answer.question for answer in result.answers if answer.held_out} == {
        question for fact in facts for question in fact.paraphrases
    }
    assert not any(answer.right_before for answer in result.answers)
    for answer in result.answers:
        assert answer.right_after == (answer.after == f"{answer.expected}.")
    held_out = [answer.right_after for answer in result.answers if answer.held_out]
    known = [answer.right_after for answer in result.answers if not answer.held_out]
    assert np.mean(held_out) == pytest.approx(result.held_out_accuracy[-1])
    assert np.mean(known) == pytest.approx(result.accuracy[-1])


def test_what_it_has_learned_so_far_is_shown_and_grows(result, seen):
    assert [len(partial.step) for partial in seen["shown"]] == list(range(41))
    for partial in (seen["shown"][0], seen["shown"][17]):
        taken = len(partial.step)
        assert (partial.ended, partial.archive, partial.layers, partial.spectra.size) == ("running", b"", [], 0)
        np.testing.assert_array_equal(partial.loss, result.loss[:taken])
        np.testing.assert_array_equal(partial.held_out_accuracy, result.held_out_accuracy[: len(partial.checked)])
        assert partial.seconds_left > 0
        assert {(answer.after, answer.right_after) for answer in partial.answers} == {("", False)}


def test_every_step_is_reported_with_its_numbers(result, seen):
    assert [progress.step for progress in seen["progress"]] == list(range(1, 41))
    assert seen["progress"][-1].numbers.keys() == {
        "loss",
        "accuracy",
        "held_out_accuracy",
        "tokens_per_second",
        "seconds_left",
    }
    assert all(math.isfinite(number) for progress in seen["progress"] for number in progress.numbers.values())
    assert seen["progress"][-1].numbers["seconds_left"] == 0


def test_the_adapter_that_was_learned_can_be_taken_home(result, tmp_path):
    """On a fresh model it knows what the result says, and its factors have the spectra that the result says."""
    folder = unpack(result.archive, tmp_path)
    base = pretrained.load("storyteller")
    fresh = llama.from_transformers(base.model)
    adapted = load_adapter(fresh, folder)
    asked = Lessons([(fact.question, fact.answer) for fact in _lora.read_facts()], base.tokenizer, 512)
    assert np.mean(answered_rightly(fresh, asked)) == pytest.approx(result.accuracy[-1])
    assert list(adapted) == result.layers
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == result.adapter_bytes == 4 * result.trainable
    for index, name in enumerate(result.layers):
        A = tensors[f"base_model.model.model.{name}.lora_A.weight"]
        B = tensors[f"base_model.model.model.{name}.lora_B.weight"]
        delta = (16.0 / 4 * B @ A).numpy()
        weight = base.model.get_submodule(f"model.{name}").weight.numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(result.spectra[index], sigma[:4], rtol=1e-3, atol=1e-5)
        assert result.relative_norm[index] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), rel=1e-3)
        assert 1 <= result.effective_rank[index] <= 4 + 1e-6
        drawn = result.delta_maps[name]
        assert max(drawn.shape) <= changes.MAP_SIZE
        assert drawn.max() == pytest.approx(np.abs(delta).max(), rel=1e-4)


def test_merging_changes_next_to_nothing(result):
    assert 0 <= result.merged_difference < 1e-4 * result.logit_scale


def test_the_published_model_is_left_alone(result):
    base = pretrained.load("storyteller")
    given = load_file(Path(experiments.__file__).parents[1] / "storyteller" / "model.safetensors")
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, given[name].float())
        assert not parameter.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_was_predicted(method):
    params = lora.Params(**TINY, method=method, rank=2)
    found = lora.run(params, LocalJob())
    cost = params.predict()
    assert (found.trainable, found.parameters) == (cost.trainable, cost.parameters)
    assert found.peak_memory_bytes == pytest.approx(cost.memory_bytes, rel=0.15)
    assert params.memory_bytes() > cost.memory_bytes
    assert found.ended == "finished"
    assert np.isfinite(found.loss).all()
    assert found.loss[-1] < found.loss[0]
    assert found.learning_rate == lora.LEARNING_RATES[method]
    assert len(found.layers) == len(found.delta_maps) == len(found.spectra) == 42
    assert (found.relative_norm > 0).all()
    assert (np.diff(found.spectra, axis=1) <= 1e-6).all()
    adapters = method in ADAPTERS
    assert len(found.grad_norm_a) == len(found.grad_norm_b) == (5 if adapters else 0)
    if adapters:
        assert (found.grad_norm_a[0] == 0) == (method != "PiSSA")  # whose B does not start at 0
        assert (found.grad_norm_a[1:] > 0).all()
    assert bool(found.archive) == adapters
    assert (found.merged_difference == 0) == (not adapters)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 8])
def test_the_scale_that_is_told_is_that_of_the_adapters(method, rank):
    params = lora.Params(method=method, rank=rank, alpha=12)
    model = prepare(llama.read("engine/storyteller"), method, rank, params.alpha, _lora.TARGETS[params.targets])
    scales = {layer.adapter.scaling for layer in adapted_layers(model).values()}
    assert scales == ({params.scaling} if params.scaling else set())


def test_lora_plus_moves_b_further_than_a(tmp_path):
    """In its first step AdamW moves each number by its rate: B, which starts at 0, by 16 times what A's is."""
    found = tune(method="LoRA+", learning_rate=1e-3, steps=1)
    tensors = load_file(unpack(found.archive, tmp_path) / "adapter_model.safetensors")
    moved = [tensor.abs().max().item() for name, tensor in tensors.items() if "lora_B" in name]
    assert moved == pytest.approx([16e-3] * 42, rel=0.01)


def test_adapters_do_not_decay(tmp_path):
    """In the first step A has no gradient: what moved it was decay."""
    params = lora.Params(**{**TINY, "steps": 1, "seed": 5})
    tensors = load_file(unpack(lora.run(params, LocalJob()).archive, tmp_path) / "adapter_model.safetensors")
    torch.manual_seed(params.seed)
    model = prepare(llama.read("engine/storyteller"), "LoRA", params.rank, params.alpha, _lora.TARGETS["all"])
    for name, layer in adapted_layers(model).items():
        assert torch.equal(tensors[f"base_model.model.model.{name}.lora_A.weight"], layer.adapter.A.detach().T)


def test_a_larger_batch_takes_the_memory_that_was_predicted():
    params = lora.Params(steps=1, batch_size=64, rank=64)
    found = lora.run(params, LocalJob())
    assert found.peak_memory_bytes == pytest.approx(params.predict().memory_bytes, rel=0.05)


def test_equal_seeds_train_alike_and_others_do_not():
    one, again, other = (tune(seed=seed, steps=3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.loss, again.loss)
    np.testing.assert_array_equal(one.spectra, again.spectra)
    assert one.answers == again.answers
    assert (one.loss[1:] != other.loss[1:]).all()


def test_gradient_norms_are_those_before_clipping(monkeypatch):
    """Together they are the norm that the trainer reports, whether it was clipped or not."""
    from engine.finetuning import diary

    reports = []
    follow = diary.Diary.follow
    monkeypatch.setattr(diary.Diary, "follow", lambda self, report: (reports.append(report), follow(self, report)))
    found = tune()
    whole = np.array([report.grad_norm for report in reports])
    np.testing.assert_allclose(np.hypot(found.grad_norm_a, found.grad_norm_b), whole, rtol=1e-3)
    assert whole.max() > 1


def test_ones_own_facts_have_no_paraphrases():
    found = tune(steps=40, learning_rate=0.01)
    assert found.held_out_accuracy.shape == (0,)
    assert found.accuracy[-1] == 1
    assert [answer.after for answer in found.answers] == ["star.", "Bim.", "cave.", "honey."]


def test_a_cancelled_run_returns_what_it_learned():
    found = tune(stop_after(3))
    assert found.ended == "cancelled"
    assert "after step 3 of 5" in found.ending
    assert found.step.tolist() == [1, 2, 3]
    assert found.checked[-1] == 3
    assert found.archive
    assert found.spectra.max() > 0


def test_a_run_that_reaches_its_limit_says_so():
    job = stop_after(2)
    job.timed_out = True
    found = tune(job)
    assert found.ended == "timed out"
    assert found.ending.startswith("Stopped at its limit of 1 h, after step 2 of 5")


def test_a_run_cancelled_before_its_first_step_has_changed_nothing():
    job = LocalJob()
    job.cancelled = True
    found = tune(job)
    assert (found.ended, found.step.tolist(), found.checked.tolist()) == ("cancelled", [], [0])
    assert found.spectra.max() == 0
    assert found.effective_rank.max() == 0


@pytest.mark.parametrize("method", ["LoRA", "full fine-tuning"])
def test_a_diverging_rate_names_the_step_and_keeps_what_was_learned(method):
    found = tune(method=method, learning_rate=10, steps=30)
    assert found.ended == "diverged"
    assert f"diverged at step {len(found.step) + 1} of 30" in found.ending
    assert np.isfinite(found.loss).all()
    assert len(found.step) > 0
    assert np.isfinite(found.spectra).all()


class TestBadInput:
    def test_a_rank_out_of_range(self):
        with pytest.raises(InputError, match="rank is '65': input should be less than or equal to 64"):
            experiments.parse("lora", {"rank": "65"})

    def test_a_line_that_is_no_fact(self):
        with pytest.raises(InputError, match="Line 1, 'hello', is no fact"):
            experiments.parse("lora", {"facts": "hello"})

    def test_a_fact_longer_than_the_context(self):
        with pytest.raises(InputError, match="the model reads at most 512: shorten them"):
            tune(facts=f"{'word ' * 600}? b")

    def test_spaces_alone_are_no_facts(self):
        assert lora.Params(facts="  \n ").known == _lora.read_facts()

    @pytest.mark.parametrize("alpha", [0, 1e-25, 1e-3, 513])
    def test_an_alpha_out_of_range(self, alpha):
        with pytest.raises(InputError, match=r"alpha is .*: input should be (greater|less) than or equal to"):
            experiments.parse("lora", {"alpha": alpha})

    def test_a_sweep_of_what_has_no_rank(self):
        with pytest.raises(InputError, match="Full fine-tuning has no rank to change: choose LoRA"):
            experiments.parse("lora_sweep", {"method": "full fine-tuning"})

    def test_a_sweep_without_ranks(self):
        with pytest.raises(InputError, match="ranks"):
            experiments.parse("lora_sweep", {"ranks": ""})


class TestSweep:
    PARAMS: typing.ClassVar = {"steps": 2, "batch_size": 2}

    @pytest.fixture(autouse=True)
    def _nothing_kept(self, monkeypatch):
        monkeypatch.setattr(lora_sweep, "_points", type(lora_sweep._points)())

    def test_every_point_is_a_run_of_its_rank(self):
        seen, shown = [], []
        params = lora_sweep.Params(**self.PARAMS, ranks=(1, 3), learning_rate=2e-3)
        found = lora_sweep.run(params, LocalJob(on_progress=seen.append, on_show=shown.append))
        assert (found.ended, found.total) == ("finished", 3)
        assert [point.rank for point in found.points] == [1, 3, None]
        assert found.points[1].trainable == 3 * found.points[0].trainable
        assert found.points[2].trainable == 5_770_496
        rates = [point.learning_rate for point in found.points]
        assert rates == [2e-3, 2e-3, lora.LEARNING_RATES["full fine-tuning"]]
        assert [point.scaling for point in found.points] == [16, 16 / 3, None]
        alone = lora.run(lora.Params(**self.PARAMS, rank=3, learning_rate=2e-3), LocalJob())
        assert found.points[1].final_loss == alone.loss[-1]
        assert found.points[1].held_out_accuracy == alone.held_out_accuracy[-1]
        assert [len(partial.points) for partial in shown] == [1, 2, 3]
        assert {partial.ended for partial in shown} == {"running"}
        assert [progress.step for progress in seen] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
        assert {progress.total for progress in seen} == {6}
        assert [progress.numbers["run"] for progress in seen] == [1] * 3 + [2] * 3 + [3] * 3

    def test_a_cancelled_sweep_keeps_its_points_and_goes_on_where_it_stopped(self, monkeypatch):
        params = lora_sweep.Params(**self.PARAMS, ranks=(1, 2), with_full=False)
        found = lora_sweep.run(params, stop_after(3))
        assert (found.ended, [point.rank for point in found.points]) == ("cancelled", [1])
        assert "after 1 of 2 runs" in found.ending
        made, run = [], lora.run
        monkeypatch.setattr(lora, "run", lambda tuning, job: (made.append(tuning.rank), run(tuning, job))[1])
        whole = lora_sweep.run(params, LocalJob())
        assert made == [2]
        assert whole.ended == "finished"
        assert whole.points[0] == found.points[0]

    def test_a_point_s_loss_is_the_mean_of_the_last_tenth_of_its_steps(self, result):
        for steps, last in ((40, 4), (41, 5), (9, 1)):
            loss = np.arange(steps) ** 2.0
            point = lora_sweep._point(lora.Params(), dataclasses.replace(result, loss=loss))
            assert point.final_loss == pytest.approx(loss[-last:].mean())

    def test_few_points_are_kept(self, monkeypatch):
        monkeypatch.setattr(lora_sweep, "_KEPT", 1)
        lora_sweep.run(lora_sweep.Params(**self.PARAMS, ranks=(1, 2), with_full=False), LocalJob())
        assert [tuning.rank for tuning, _ in lora_sweep._points] == [2]

    def test_a_run_that_diverges_is_a_point_that_says_so(self):
        found = lora_sweep.run(
            lora_sweep.Params(batch_size=2, steps=30, ranks=(8,), with_full=False, learning_rate=10), LocalJob()
        )
        assert found.points[0].diverged


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    found = tune(rank=3)
    return found, unpack(found.archive, tmp_path_factory.mktemp("adapter"))


class TestUploadedAdapter:
    @staticmethod
    def read(path):
        return lora_adapter.run(lora_adapter.Params(path=str(path)), LocalJob())

    @pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
    def test_its_spectrum_is_the_one_that_was_learned(self, adapter, file):
        learned, folder = adapter
        found = self.read(folder / file)
        np.testing.assert_allclose(found.spectra, learned.spectra, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.effective_rank, learned.effective_rank, rtol=1e-4)
        assert [name.removeprefix("model.") for name in found.layers] == learned.layers
        assert (found.rank, found.alpha, found.dora, found.base_model) == (3, 16, False, "storyteller")
        assert found.scaling == pytest.approx(16 / 3)
        assert "rank 3 for 42 matrices of storyteller" in found.sentence

    def test_one_that_does_not_name_its_model(self, adapter, tmp_path):
        _, folder = adapter
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
        found = self.read(tmp_path)
        assert found.base_model is None
        assert "of an unnamed model" in found.sentence

    @pytest.mark.parametrize(
        ("files", "named", "sentence"),
        [
            ({}, "", "has no adapter_config.json"),
            ({"adapter_config.json": b"{"}, "", "adapter_config.json is damaged"),
            ({"adapter_config.json": b'{"peft_type": "LORA", "r": 2}', "adapter_model.bin": b""}, "", "a pickle"),
            (
                {"adapter_config.json": b'{"peft_type": "LORA", "r": 2}', "adapter_model.safetensors": b"no"},
                "",
                "adapter_model.safetensors is damaged",
            ),
            ({"adapter_model.bin": b""}, "adapter_model.bin", "other formats can run code and are not opened"),
            ({}, "nothing", "There is no folder and no file"),
        ],
    )
    def test_what_cannot_be_read_is_said_in_a_sentence(self, tmp_path, files, named, sentence):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            self.read(tmp_path / named)

    def test_no_path(self):
        with pytest.raises(InputError, match="No adapter is named"):
            self.read("")

    def test_another_upload_at_the_same_place_is_another_result(self, tmp_path):
        params = lora_adapter.Params(path=str(tmp_path))
        before = params.cache_token()
        time.sleep(0.01)
        (tmp_path / "adapter_config.json").write_text("{}")
        assert params.cache_token() != before


class TestProperties:
    @pytest.mark.parametrize("method", METHODS)
    def test_they_hold(self, method):
        found = lora_tests.run(lora_tests.Params(**TINY, method=method, rank=3), LocalJob())
        assert len(found.checks) == (2 if method == "full fine-tuning" else 8)
        assert all(check.passed for check in found.checks), found.checks

    @pytest.mark.parametrize("targets", ["attention", "query and value"])
    def test_they_hold_for_other_targets_and_the_highest_rank(self, targets):
        found = lora_tests.run(lora_tests.Params(**TINY, targets=targets, rank=64), LocalJob())
        assert all(check.passed for check in found.checks), found.checks

    def test_the_smallest_alpha_is_no_false_alarm(self):
        found = lora_tests.run(lora_tests.Params(**TINY, method="PiSSA", rank=64, alpha=1), LocalJob())
        assert all(check.passed for check in found.checks), found.checks

    def test_one_long_fact_does_not_make_all_of_them_long(self):
        """All logits at once would be 410 MB, and a step with gradients several times that."""
        many = "\n".join(f"Where is key number {number}? cave {number}" for number in range(80))
        params = lora_tests.Params(facts=f"{many}\n{'word ' * 300}? end", rank=1)
        assert peak_memory(lambda: lora_tests.run(params, LocalJob()), "cpu") < 500e6

    def test_one_that_does_not_hold_is_seen(self, monkeypatch):
        prepare = lora_tests._prepare

        def with_noise(model, params):
            adapted = prepare(model, params)
            with torch.no_grad():
                adapted.layers[0].mlp.up_proj.adapter.B.fill_(0.1)
            return adapted

        monkeypatch.setattr(lora_tests, "_prepare", with_noise)
        found = lora_tests.run(lora_tests.Params(**TINY), LocalJob())
        failed = {check.name for check in found.checks if not check.passed}
        assert failed == {"It starts as it was given", "At the first step no A has a gradient"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_default_run_learns_within_a_minute_of_two_cores():
    began = time.process_time()
    found = lora.run(lora.Params(), LocalJob())
    assert found.accuracy[0] == found.held_out_accuracy[0] == 0
    assert found.accuracy[-1] > 0.95
    assert found.held_out_accuracy[-1] > 0.8
    assert (time.process_time() - began) / 2 < 60


def test_what_the_benchmark_writes_is_what_the_page_reads(tmp_path, monkeypatch):
    """Twice into one file, the second run without losses and profile, as a later run of some rows has them."""
    file = tmp_path / "lora_training_step_h200.json"
    root = Path(__file__).parents[2]
    benchmark = [sys.executable, "-m", "tests.benchmarks.lora_training_step", "--device", "cpu", "--small"]
    rows = ["--rows", "full", "PEFT", "ours", "--json", str(file)]
    for more in (["--note", "first", "--profile", "ours, Decoder"], ["--note", "second", "--no-losses"]):
        subprocess.run([*benchmark, *rows, *more], check=True, capture_output=True, cwd=root)
    monkeypatch.setattr(_lora, "_RECORDED", tmp_path)
    found = _lora.recorded_steps.__wrapped__()
    assert found.notes == ("first", "second")
    assert [(cost.run, cost.way) for cost in found.measured] == [
        (run, way) for run in (0, 1) for way in ("full", "PEFT", "ours")
    ]
    assert found.floor_ms > 0
    assert found.profiled == 0
    assert found.kernels.keys() == {"mm", "addmm", "attention"}
    assert 0 < sum(found.kernels.values()) < 1
    assert found.loss_difference("ours", "PEFT", 1) < 0.01
    log = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(log | {"versions": {}}), encoding="utf-8")
    again = [*benchmark, "--no-losses", "--rows", "--json", str(file)]
    other = subprocess.run(again, capture_output=True, text=True, cwd=root)
    assert other.returncode != 0
    assert "another model or other versions" in other.stderr
    assert json.loads(file.read_text(encoding="utf-8"))["runs"] == log["runs"]


def test_the_command_line_runs_it():
    command = [sys.executable, "-m", "engine", "run", "lora", "--steps", "2", "--facts", OWN, "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (found["ended"], found["step"]) == ("finished", [1, 2])


def test_their_modules_need_no_torch_before_they_run():
    code = (
        "import sys; from engine.experiments import _lora, lora, lora_adapter, lora_sweep, lora_tests; "
        "lora.Params().predict(); lora_adapter.Params().cache_token(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
