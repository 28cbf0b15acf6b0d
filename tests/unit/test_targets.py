"""Targets: the table and its bounds, what each measures, a run over all of them, its record and its report."""

import dataclasses
import datetime
import inspect
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from engine.__main__ import main
from engine.architecture import ModelConfig
from engine.errors import InputError, JobCancelledError, WorkbenchError
from engine.experiments import _targets_recorded, lora, targets
from engine.experiments._targets_recorded import read_record, recorded_figures, write_record
from engine.experiments._targets_report import on_gpu, report, spread, verdict
from engine.experiments.targets import Params, RecordedFigure, describe, describe_recorded, run
from engine.finetuning import facts as known
from engine.flash import choice
from engine.measure import is_held
from engine.runtime.jobs import LocalJob
from engine.targets import attention, coverage, finetuning, measures, paging, production, quantization, target
from engine.targets.target import Bound, Figure, NotMeasuredError, Row, Target, read_targets

ROOT = Path(__file__).parents[2]
JOB = LocalJob("cpu")


def made(key="one", *, bound=None, group="attention", quantity="stand-in", needs_gpu=False, **settings):
    return Target(
        key, group, f"Target {key}", bound or Bound("at most", 10, "ms"), quantity, "How.", settings, needs_gpu
    )


class TestBounds:
    @pytest.mark.parametrize(
        ("direction", "below", "at", "above"),
        [
            ("at most", True, True, False),
            ("less than", True, False, False),
            ("at least", False, True, True),
            ("more than", False, False, True),
        ],
    )
    def test_the_value_itself_is_on_the_side_that_the_words_say(self, direction, below, at, above):
        bound = Bound(direction, 10, "ms")
        found = [bound.holds(value) for value in (math.nextafter(10, 0), 10.0, math.nextafter(10, 11))]
        assert found == [below, at, above]

    @pytest.mark.parametrize("direction", ["at most", "less than", "at least", "more than"])
    def test_what_is_no_number_keeps_none(self, direction):
        assert not Bound(direction, 10, "ms").holds(math.nan)

    @pytest.mark.parametrize(
        ("value", "unit", "words"),
        [
            (0.35883, "ms", "0.359 ms"),
            (10, "ms", "10 ms"),
            (99.97, "%", "100 %"),
            (6.25, "%", "6.25 %"),
            (1321.4, "ms", "1321 ms"),
            (2.2033, "×", "2.2×"),
            (0, "%", "0 %"),
        ],
    )
    def test_amounts_have_as_many_digits_as_they_need(self, value, unit, words):
        assert Bound("at most", 1, unit).amount(value) == words

    def test_a_figure_next_to_its_bound_is_not_rounded_onto_it(self):
        """94.996 % against "at least 95 %" has failed, and a reader has to see why."""
        assert Bound("at least", 95, "%").amount(94.996) == "94.996 %"
        assert Bound("at least", 95, "%").amount(95) == "95 %"


class TestFigures:
    def test_a_run_that_is_no_number_makes_all_of_them_none(self):
        for values in ([1.0, 2.0, math.nan], [math.nan, 1.0, 2.0], [math.nan]):
            found = Figure.of_runs(values, "seeds", "Odd.")
            assert math.isnan(found.value)
            assert (found.low, found.high, found.runs, found.note) == (None, None, len(values), "Odd.")

    def test_of_several_kinds_the_smallest_median_counts(self):
        found = Figure.of_worst({"a": [5.0, 6.0, 7.0], "b": [1.0, 3.0, 2.0]}, "processes")
        assert (found.value, found.runs, found.note) == (2.0, 6, "a: 6; b: 2; the smaller counts.")
        assert 1 < found.low < 2 < 6 < found.high < 7
        assert math.isnan(Figure.of_worst({"a": [1.0, math.nan], "b": [1.0, 2.0]}, "processes").value)
        assert math.isnan(Figure.of_worst({"a": [1.0, 2.0], "b": [1.0, math.nan]}, "processes").value)


class TestTheTable:
    def test_the_contract_is_in_it(self):
        keys = {each.key for each in read_targets()}
        lengths = {f"attention_{of}_{length}" for of in ("time", "memory") for length in (128, 512, 1024)}
        tiers = {
            f"coverage_{tier}_{of}" for tier in ("foundation", "core", "advanced", "expert") for of in coverage._OF
        }
        others = {"lora_parameters", "lora_quality", "quantized_size", "quantized_perplexity", "quantized_output"}
        gpu = {"flash_speedup", "flash_memory", "production_time", "production_memory", "paged_optimizer"}
        assert lengths | tiers | others | gpu <= keys
        assert {each.key for each in read_targets() if each.needs_gpu} == gpu

    def test_each_key_and_name_is_there_once(self):
        for of in ("key", "name"):
            values = [getattr(each, of) for each in read_targets()]
            assert len(set(values)) == len(values)

    @pytest.mark.parametrize("each", read_targets(), ids=lambda each: each.key)
    def test_its_quantity_can_be_measured_with_its_settings(self, each):
        inspect.signature(measures.MEASURES[each.quantity]).bind(JOB, **each.settings)
        assert each.group in targets.GROUPS
        assert each.how.endswith(".")

    def test_bounds_of_coverage_are_those_that_make_test_keeps(self):
        for tier in coverage.read_tiers()["TIERS"]:
            bounds = {
                each.settings["of"]: each.bound
                for each in read_targets()
                if each.quantity == "coverage" and each.settings["tier"] == tier.name
            }
            assert bounds == {
                "lines": Bound("at least", tier.lines, "%"),
                "branches": Bound("at least", tier.branches, "%"),
            }

    def test_without_the_file_one_sentence_says_so(self, monkeypatch):
        read_targets.cache_clear()
        monkeypatch.setattr(target, "_TABLE", ROOT / "tests" / "benchmarks" / "nowhere.py")
        with pytest.raises(InputError, match=r"^tests/benchmarks/nowhere\.py is not there: run this from a checkout"):
            read_targets()

    def test_it_travels_between_processes(self):
        assert pickle.loads(pickle.dumps(read_targets())) == read_targets()

    def test_it_needs_no_torch(self):
        program = "import sys; from engine.targets.target import read_targets; print(len(read_targets())); "
        done = subprocess.run(
            [sys.executable, "-c", program + "print('torch' in sys.modules)"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(len(read_targets())), "False"]


class TestMeasuring:
    def test_attention_time_has_a_spread_around_its_median(self):
        found = attention.forward_time(JOB, 16, 32, 2)
        assert 0 < found.low <= found.value <= found.high
        assert found.runs >= 3

    def test_attention_is_causal(self, monkeypatch):
        masks, forward = [], attention.MultiHeadAttention.forward

        def listen(layer, Q, K, V, mask=None):
            masks.append(mask)
            assert not layer.training
            return forward(layer, Q, K, V, mask)

        monkeypatch.setattr(attention.MultiHeadAttention, "forward", listen)
        attention.forward_time(JOB, 16, 32, 2)
        attention.forward_memory(JOB, 16, 32, 2)
        assert masks
        assert all(mask.tolist() == torch.ones(16, 16).tril().bool().tolist() for mask in masks)

    @pytest.mark.parametrize("length", [64, 256])
    def test_attention_memory_grows_with_the_weights(self, length):
        found = attention.forward_memory(JOB, length, 32, 4)
        weights = 4 * 4 * length**2 / 1e6
        assert weights <= found.value < 6 * weights + 1
        assert found == attention.forward_memory(JOB, length, 32, 4)

    def test_flash_attention_saves_the_matrix(self):
        choice.forget()
        found = attention.peak_saving(JOB, (1, 2, 1024, 32))
        assert 50 < found.value < 100
        assert len(choice._choices) == 1  # it is weighed with the kernel that it chose

    def test_the_speed_up_is_of_both_orders(self, monkeypatch):
        seconds = {
            "Flash": {"FlashAttention": 2.0, "StandardAttention": 4.0},
            "Standard": {"FlashAttention": 1.0, "StandardAttention": 4.0},
        }
        asked = []

        def calls(*call):
            asked.append(call)
            return seconds[call[0]]

        monkeypatch.setattr(attention, "cold_calls", calls)
        found = attention.cold_speedup(JOB, (1, 1, 8, 4), 10, 2)
        assert (found.value, found.runs, found.runs_of) == (2.0, 4, "processes")  # not 3, which no order gives
        assert (found.low, found.high) == (2, 4)
        assert found.note == "FlashAttention first: 2; StandardAttention first: 4; the smaller counts."
        assert asked == [(first, (1, 1, 8, 4), 10, "cpu") for _ in range(2) for first in ("Flash", "Standard")]

    def test_cold_calls_stop_when_asked_to(self, monkeypatch):
        job, asked = LocalJob("cpu"), []

        def calls(*call):
            asked.append(call)
            job.cancelled = True
            return {"FlashAttention": 1.0, "StandardAttention": 1.0}

        monkeypatch.setattr(attention, "cold_calls", calls)
        with pytest.raises(JobCancelledError):
            attention.cold_speedup(job, (1, 1, 8, 4), 10, 2)
        assert len(asked) == 1

    def test_cold_calls_are_of_a_process_that_is_told_what_to_do(self, monkeypatch):
        monkeypatch.setattr(attention, "_COLD_CALLS", "import sys; print('noise'); print([*sys.argv[2:], sys.argv[1]])")
        monkeypatch.setattr(attention.json, "loads", str)
        assert attention.cold_calls("Flash", (1, 1, 8, 4), 10, "cpu") == "['[10, 1, 1, 8, 4]', 'cpu', 'Flash']"

    def test_cold_calls_have_the_device_and_an_end(self, monkeypatch):
        def too_slow(*_, timeout, **__):
            assert is_held("cpu")
            raise subprocess.TimeoutExpired("python", timeout)

        monkeypatch.setattr(attention.subprocess, "run", too_slow)
        with pytest.raises(WorkbenchError, match=r"^The process that makes the cold calls took more than 100 s\.$"):
            attention.cold_calls("Flash", (1, 1, 8, 4), 1, "cpu")
        assert Params.stop_grace > attention._LONGEST
        assert not is_held("cpu")

    @pytest.mark.parametrize(("device", "made_current"), [("cuda:3", ["cuda:3"]), ("cuda", [])])
    def test_cold_calls_are_made_on_the_device_that_they_are_told(self, device, made_current):
        program = """
import sys, torch
current = []
torch.cuda.set_device = lambda device: current.append(str(device))
torch.randn = lambda shape, device: sys.exit(f"{device} {current}")
"""
        command = [sys.executable, "-c", program + attention._COLD_CALLS, "Flash", "[1, 1, 1, 8, 4]", device]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stderr.strip() == f"cuda {made_current}"

    @pytest.mark.parametrize(("program", "last"), [("raise ValueError('no kernel')", "ValueError: no kernel"),
                                                   ("import sys; sys.exit(1)", "it said nothing")])  # fmt: skip
    def test_cold_calls_that_fail_say_why(self, monkeypatch, program, last):
        monkeypatch.setattr(attention, "_COLD_CALLS", program)
        with pytest.raises(WorkbenchError, match=f"^The process that makes the cold calls ended with status 1: {last}"):
            attention.cold_calls("Flash", (1, 1, 8, 4), 1, "cpu")

    def test_lora_has_two_thin_matrices(self):
        assert finetuning.parameter_share(JOB, 1024, 32) == Figure(100 * 2 * 32 / 1024)

    def test_four_bits_and_their_scales_are_a_quarter_with_what_stays(self):
        found = quantization.size_share(JOB, 2, 256)
        assert 100 * 4.127 / 32 < found.value < 50

    @pytest.mark.parametrize("quantity", ["quantized size", "quantized perplexity", "quantized output"])
    def test_four_bits_are_nf4_with_double_quantization(self, monkeypatch, quantity):
        layers, original = [], quantization.quantize_model_4bit

        def listen(model, *arguments, **options):
            found = original(model, *arguments, **options)
            layers.extend(module.weight.quant_state for module in found.modules() if isinstance(module, Linear4bit))
            return found

        monkeypatch.setattr(quantization, "quantize_model_4bit", listen)
        settings = {
            "quantized size": {"layers": 1, "d_model": 64},
            "quantized perplexity": {"tokens": 64, "block_size": 64},
            "quantized output": {"layers": 1, "d_model": 64, "batch": 1, "length": 8, "seeds": 2},
        }
        measures.MEASURES[quantity](JOB, **settings[quantity])
        assert layers
        assert all(state.nested and state.quant_type == "nf4" for state in layers)

    def test_output_errors_differ_by_seed_and_are_small(self):
        found = quantization.output_error(JOB, 1, 64, 2, 16, 3)
        assert 0 < found.low < found.value < found.high < 10
        assert (found.runs, found.runs_of) == (3, "seeds")

    def test_perplexity_rises_a_little(self):
        found = quantization.perplexity_increase(JOB, 1024, 128)
        assert -1 < found.low < found.value < found.high < 10
        assert (found.runs, found.runs_of) == (8, "blocks")
        assert "over 1,024 tokens" in found.note

    def test_one_block_has_no_spread(self):
        found = quantization.perplexity_increase(JOB, 64, 128)
        assert (found.low, found.high, found.runs) == (None, None, 1)

    def test_perplexity_stops_when_asked_to(self):
        job = LocalJob("cpu")
        job.cancelled = True
        with pytest.raises(JobCancelledError):
            quantization.perplexity_increase(job, 128, 64)


QUICK = {"rank": 8, "alpha": 16.0, "rate": 5e-3, "full_rate": 1e-3, "batch_size": 8, "full_at_least": 1.0}


class TestQuality:
    @pytest.fixture(autouse=True)
    def few_facts(self, monkeypatch):
        monkeypatch.setattr(finetuning, "read_facts", lambda: known.read_facts()[:4])

    def test_both_methods_are_asked_what_neither_has_seen(self, monkeypatch):
        asked, original = [], finetuning.answered_rightly

        def listen(model, lessons):
            adapted = any(name.endswith("adapter.A") for name, _ in model.named_parameters())
            asked.append((adapted, {question for question, _ in lessons.pairs}))
            return original(model, lessons)

        monkeypatch.setattr(finetuning, "answered_rightly", listen)
        reports = []
        found = finetuning.relative_quality(LocalJob("cpu", reports.append), steps=24, seeds=(3,), **QUICK)
        unseen = {question for fact in known.read_facts()[:4] for question in fact.paraphrases}
        assert asked == [(True, unseen), (False, unseen)]
        assert [(each.step, each.total) for each in reports] == [(step, 48) for step in range(1, 49)]
        assert found.value > 50
        assert "LoRA answers" in found.note

    def test_each_method_learns_with_its_own_rate_and_the_same_seeds(self, monkeypatch):
        asked = []

        def listen(model, method, lessons, options, **_):
            asked.append((method, options.learning_rate, options.seed, options.batch_size))
            return SimpleNamespace(step=7, train_steps=lambda steps: None)

        monkeypatch.setattr(finetuning.methods, "make_trainer", listen)
        monkeypatch.setattr(finetuning, "answered_rightly", lambda *_: [True])
        finetuning.relative_quality(JOB, steps=7, seeds=(4, 2), **QUICK)
        assert asked == [(method, rate, seed, 8) for seed in (4, 2)
                         for method, rate in (("LoRA", 5e-3), ("full fine-tuning", 1e-3))]  # fmt: skip

    def test_nothing_is_tuned_for_the_seeds_that_are_scored(self):
        """Both methods run as the LoRA lab has them by default, with other seeds than that."""
        (quality,) = (each for each in read_targets() if each.key == "lora_quality")
        lab, asked = {name: field.default for name, field in lora.Params.model_fields.items()}, quality.settings
        assert {name: asked[name] for name in ("rank", "alpha", "steps", "batch_size")}.items() <= lab.items()
        assert asked["rate"] == lora.LEARNING_RATES["LoRA"]
        assert asked["full_rate"] == lora.LEARNING_RATES["full fine-tuning"]
        assert lab["seed"] not in asked["seeds"]
        assert len(set(asked["seeds"])) >= 5
        assert asked["full_at_least"] >= 90

    def test_a_ratio_is_of_one_seed(self):
        found = finetuning._ratio([40, 90, 60], [80, 90, 60], 60)
        assert found.value == 100
        assert 50 < found.low < found.high == 100
        assert found.note == ("LoRA answers 63.3 % of the paraphrases rightly, full fine-tuning 76.7 %, means of 3 "
                              "seeds; the lowest ratio is 50.0 %.")  # fmt: skip

    @pytest.mark.parametrize("bad", [0.0, 89.9])
    def test_a_bad_run_of_full_fine_tuning_raises_no_ratio(self, bad):
        with pytest.raises(WorkbenchError, match=rf"^Full fine-tuning answered only {bad} % of the paraphrases"):
            finetuning._ratio([90.0, 99.0], [100.0, bad], 90)
        assert finetuning._ratio([90.0, 99.0], [100.0, 90.0], 90).value == 100

    def test_it_stops_after_the_step_that_it_is_in(self):
        job = LocalJob("cpu", lambda progress: setattr(job, "cancelled", progress.step == 2))
        with pytest.raises(JobCancelledError):
            finetuning.relative_quality(job, steps=40, seeds=(0,), **QUICK)


class TestOnAGpu:
    """What needs a GPU, with stand-ins where there is none."""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="plain AdamW runs out on a GPU")
    def test_where_plain_adamw_does_not_run_out_nothing_is_shown(self):
        with pytest.raises(WorkbenchError, match="nothing for paging to show"):
            paging.paged_steps(JOB, 3)

    def test_paged_steps_are_counted_after_plain_adamw_ran_out(self, monkeypatch):
        steps = []

        def step(_, optimizer):
            steps.append(optimizer)
            if len(steps) == 1:
                raise torch.cuda.OutOfMemoryError("full")
            return 1.0

        made = []
        monkeypatch.setattr(paging, "simulate_training_step", step)
        monkeypatch.setattr(paging, "PagedAdamW", lambda parameters: made.append(list(parameters)) or "paged")
        assert paging.paged_steps(JOB, 3).value == 3
        assert isinstance(steps[0], torch.optim.AdamW)
        assert steps[1:] == ["paged"] * 3
        (parameters,) = made
        assert {id(each) for each in parameters} == {id(each) for each in steps[0].param_groups[0]["params"]}

    def test_paged_steps_whose_loss_is_no_number_have_failed(self, monkeypatch):
        losses = iter([1.0, math.nan, 1.0])

        def step(_, optimizer):
            if optimizer != "paged":
                raise torch.cuda.OutOfMemoryError("full")
            return next(losses)

        monkeypatch.setattr(paging, "simulate_training_step", step)
        monkeypatch.setattr(paging, "PagedAdamW", lambda parameters: "paged")
        with pytest.raises(WorkbenchError, match="a loss is no finite number"):
            paging.paged_steps(JOB, 3)

    def test_a_paged_optimizer_that_runs_out_has_failed(self, monkeypatch):
        def step(*_):
            raise torch.cuda.OutOfMemoryError("full")

        monkeypatch.setattr(paging, "simulate_training_step", step)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            paging.paged_steps(JOB, 3)

    @pytest.mark.parametrize("each", [each for each in read_targets() if each.needs_gpu], ids=lambda each: each.key)
    def test_without_one_none_is_measured(self, each):
        with pytest.raises(NotMeasuredError, match=r"^Needs a GPU\.$"):
            measures.measure(each, JOB)

    def test_production_counts_weights_gradients_and_state(self, monkeypatch):
        config = ModelConfig(d_model=64, num_layers=1, num_heads=2, use_flashattention=True)
        monkeypatch.setattr(production, "production_config", lambda: config)
        monkeypatch.setattr(production, "_passes_before_choice", lambda model: 1)
        held = 4 * 4 * config.num_parameters / 1e9  # weights, gradients and both of AdamW's means
        small, large = (production.training_memory(JOB, 2, length).value for length in (8, 64))
        assert held < small < 1.5 * held
        assert large > small

    @pytest.mark.parametrize(("batch", "length"), [(2, 8), (3, 16)])
    def test_production_reads_and_learns_as_many_tokens_as_asked(self, monkeypatch, batch, length):
        config = ModelConfig(d_model=64, num_layers=1, num_heads=2, use_flashattention=True)
        seen = []

        def build(device, build=production._build):
            model = build(device)
            model.register_forward_pre_hook(lambda model, given: seen.append(tuple(given[0].shape)))
            return model

        monkeypatch.setattr(production, "production_config", lambda: config)
        monkeypatch.setattr(production, "_passes_before_choice", lambda model: 1)
        monkeypatch.setattr(production, "_build", build)
        production.training_memory(JOB, batch, length)
        production.reading_time(JOB, batch, length)
        assert set(seen) == {(batch, length)}

    def test_production_is_measured_with_the_kernel_that_it_chooses(self, monkeypatch):
        config = ModelConfig(vocab_size=64, d_model=64, num_layers=12, num_heads=2, use_flashattention=True)
        monkeypatch.setattr(production, "production_config", lambda: config)
        modes, original = [], production.measure_time

        def listen(read, *arguments, **options):
            assert [kind.grad for kind in choice._choices] == [False]
            assert not is_held("cpu")
            return original(read, *arguments, **options)

        def build(device, build=production._build):
            model = build(device)
            model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
            return model

        choice.forget()
        monkeypatch.setattr(choice, "LONGEST_WAIT", 60.0)  # another process may measure
        monkeypatch.setattr(production, "measure_time", listen)
        monkeypatch.setattr(production, "_build", build)
        assert production.reading_time(JOB, 1, 16).value > 0
        assert set(modes) == {False}
        choice.forget()
        assert production.training_memory(JOB, 1, 16).value > 0
        assert [kind.grad for kind in choice._choices] == [True]
        choice.forget()


WHOLE = {"engine/moe/routing.py": (10, 10), "engine/moe/rows.py": (10, 10)}
"""A report of all of the expert tier."""


class TestCoverage:
    @pytest.fixture(autouse=True)
    def root(self, monkeypatch, tmp_path):
        """A repository of a few files, as old as the morning of 2026-01-02."""
        tiers = coverage.read_tiers()
        for name in (
            "engine/moe/rows.py",
            "engine/moe/routing.py",
            "tests/unit/test_rows.py",
            "ui/run.py",
            "app_pages/home.py",
            "app.py",
        ):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (datetime.datetime(2026, 1, 2, 3, 4).timestamp(),) * 2)
        monkeypatch.setattr(coverage, "_REPORT", tmp_path / "coverage.json")
        monkeypatch.setattr(coverage, "ROOT", tmp_path)
        monkeypatch.setattr(coverage, "read_tiers", lambda: tiers)
        return tmp_path

    @pytest.fixture
    def written(self, tmp_path):
        """Writes a report of these files, of 10 lines and 10 branches each."""

        def write(timestamp="2026-01-02T12:30:00", **covered):
            files = {
                name: {
                    "summary": {
                        "covered_lines": lines,
                        "num_statements": 10,
                        "covered_branches": branches,
                        "num_branches": 10,
                    }
                }
                for name, (lines, branches) in covered.items()
            }
            (tmp_path / "coverage.json").write_text(json.dumps({"meta": {"timestamp": timestamp}, "files": files}))

        return write

    def test_shares_are_the_tiers(self, written):
        written(**{"engine/moe/routing.py": (9, 5), "engine/moe/rows.py": (10, 10), "engine/masks.py": (0, 0)})
        assert coverage.covered_share(JOB, "expert", "lines").value == 95
        assert coverage.covered_share(JOB, "expert", "branches").value == 75

    def test_it_says_when_it_was_written(self, written):
        written(**WHOLE)
        note = coverage.covered_share(JOB, "expert", "lines").note
        assert note == "By the run of make test of 2026-01-02 12:30."

    @pytest.mark.parametrize("changed", ["engine/moe/rows.py", "tests/unit/test_rows.py", "app.py"])
    def test_one_that_is_older_than_a_source_or_a_test_is_stale(self, written, root, changed):
        os.utime(root / changed, (datetime.datetime(2026, 1, 2, 12, 31).timestamp(),) * 2)
        written(**WHOLE)
        with pytest.raises(NotMeasuredError) as raised:
            coverage.covered_share(JOB, "expert", "lines")
        assert str(raised.value) == (
            f"Stale: {changed} was changed 2026-01-02 12:31, after the run of make test of 2026-01-02 12:30. "
            "Run make test."
        )

    @pytest.mark.parametrize(
        ("gone", "words"),
        [("engine/moe/routing.py", "lacks engine/moe/routing.py"), ("engine/moe/rows.py", "lacks engine/moe/rows.py")],
    )
    def test_one_without_a_file_of_the_tier_is_partial(self, written, gone, words):
        written(**{name: shares for name, shares in WHOLE.items() if name != gone})
        with pytest.raises(NotMeasuredError, match=rf"^Partial: the report of the tests {words}\. Run make test, all"):
            coverage.covered_share(JOB, "expert", "lines")

    def test_one_of_a_file_that_is_gone_is_partial(self, written):
        written(**WHOLE, **{"engine/moe/old.py": (10, 10)})
        with pytest.raises(NotMeasuredError, match=r"still has engine/moe/old\.py\."):
            coverage.covered_share(JOB, "expert", "lines")

    def test_without_a_report_it_says_what_to_do(self, monkeypatch, tmp_path):
        monkeypatch.setattr(coverage, "_REPORT", tmp_path / "coverage.json")
        with pytest.raises(NotMeasuredError, match=r"^Not measured yet: run make test\.$"):
            coverage.covered_share(JOB, "core", "lines")

    def test_a_report_without_the_tier_is_none(self, written):
        written(**{"engine/masks.py": (10, 10)})
        with pytest.raises(NotMeasuredError, match=r"lacks engine/moe/routing\.py and 1 more\. Run make test, all"):
            coverage.covered_share(JOB, "expert", "lines")


def test_what_coverage_counts_of_every_tier_is_there():
    """The files of the repository itself: a tier whose paths are gone would never be whole."""
    for tier in coverage.read_tiers()["TIERS"]:
        assert all(path.is_file() for path in coverage._python_files(tier.paths))


@pytest.fixture
def table(monkeypatch):
    """Has the table be these targets, and each be measured by the function of its quantity."""

    def put(*chosen, **functions):
        monkeypatch.setattr(targets, "read_targets", lambda: chosen)
        monkeypatch.setattr(measures, "MEASURES", functions)

    return put


def value(number):
    return lambda job, **_: Figure(number, number - 1, number + 1, 10)


class TestARun:
    def test_verdicts_are_by_the_bound(self, table):
        table(made("met", quantity="ten"), made("missed", quantity="eleven"), ten=value(10.0), eleven=value(11.0))
        found = run(Params(), JOB)
        assert [row.verdict for row in found.rows] == ["passed", "failed"]
        assert found.failed
        assert found.ended == "finished"
        assert found.sentence == "1 of the 2 targets that were measured here is met; missed: Target missed."

    def test_what_raises_has_failed_and_the_others_go_on(self, table):
        def broken(job):
            raise ValueError("no such kernel\nand a long story")

        def refused(job):
            raise WorkbenchError("This cannot be.")

        table(made("a", quantity="broken"), made("b", quantity="refused"), made("c", quantity="ten"),
              broken=broken, refused=refused, ten=value(10.0))  # fmt: skip
        found = run(Params(), JOB)
        assert [(row.verdict, row.note) for row in found.rows] == [
            ("failed", "ValueError: no such kernel"),
            ("failed", "This cannot be."),
            ("passed", ""),
        ]
        assert found.rows[0].figure is None

    def test_what_cannot_be_measured_here_neither_passes_nor_fails(self, table):
        table(made("gpu", needs_gpu=True, group="gpu"), made("met", quantity="ten"), ten=value(10.0))
        found = run(Params(), JOB)
        assert [row.verdict for row in found.rows] == ["not measured", "passed"]
        assert not found.failed
        assert found.sentence == "1 of the 1 targets that were measured here is met. Of the others, 1 needs a GPU."

    def test_only_the_groups_that_are_asked_for(self, table):
        table(made("a", quantity="ten"), made("b", quantity="ten", group="lora"), ten=value(10.0))
        found = run(Params(groups=("lora",)), JOB)
        assert [row.target.key for row in found.rows] == ["b"]

    def test_rows_fill_in_one_after_the_other(self, table):
        table(*(made(key, quantity="ten") for key in "abc"), ten=value(10.0))
        shown, told = [], []
        run(Params(), LocalJob("cpu", told.append, shown.append))
        assert [sum(row.figure is not None for row in draft.rows) for draft in shown] == [0, 1, 2]
        assert [[row.note for row in draft.rows].index("Being measured.") for draft in shown] == [0, 1, 2]
        assert {draft.ended for draft in shown} == {"running"}
        assert [progress.step for progress in told] == [1, 2, 3]

    def test_the_share_of_the_time_rises_to_one(self, table):
        def long(job, **_):
            for step in range(4):
                job.report(step + 1, 4)
            return Figure(1.0)

        table(made("a", quantity="ten"), made("b", quantity="LoRA quality"), made("c", quantity="ten", needs_gpu=True),
              **{"ten": value(10.0), "LoRA quality": long})  # fmt: skip
        told = []
        run(Params(), LocalJob("cpu", told.append))
        shares = [progress.numbers["share_of_time"] for progress in told]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
        assert shares[0] < 0.05

    @pytest.mark.parametrize("timed_out", [False, True])
    def test_a_run_that_is_stopped_keeps_what_it_has(self, table, timed_out):
        job = LocalJob("cpu")

        def last(_, **__):
            job.cancelled, job.timed_out = True, timed_out
            return Figure(1.0)

        table(made("a", quantity="last"), made("b", quantity="last"), made("c", needs_gpu=True, group="gpu"), last=last)
        found = run(Params(), job)
        assert [row.verdict for row in found.rows] == ["passed", "not measured", "not measured"]
        assert [row.note for row in found.rows] == ["", "", "Needs a GPU."]
        assert found.ended == ("timed out" if timed_out else "cancelled")
        assert found.ending.endswith("after 1 of 3 targets, which are shown.")

    def test_a_measurement_that_is_stopped_has_not_failed(self, table):
        def stop(job, **_):
            raise JobCancelledError("Cancelled.")

        table(made("a", quantity="ten"), made("b", quantity="stop"), ten=value(10.0), stop=stop)
        assert [row.verdict for row in run(Params(), JOB).rows] == ["passed", "not measured"]

    def test_it_asks_for_the_memory_of_what_is_measured(self, monkeypatch):
        asked = [("coverage",), ("attention",), ("lora",), ("lora", "gpu"), tuple(targets.GROUPS)]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert [Params(groups=groups).memory_bytes() for groups in asked] == [0, 2e8, 1e9, 8e9, 8e9]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert [Params(groups=groups).memory_bytes() for groups in asked] == [0, 2e8, 1e9, 1e9, 1e9]
        assert Params(groups=("gpu",)).memory_bytes() == 0


class TestSentences:
    def rows(self, **verdicts):
        return [Row(made(key, needs_gpu=key.startswith("gpu")), found) for key, found in verdicts.items()]

    def test_nothing_is_measured_yet(self):
        rows = self.rows(a="not measured", gpu="not measured")
        assert describe(rows) == "None of the 2 targets is measured here yet."

    def test_everything_is_counted(self):
        rows = self.rows(a="passed", b="passed", c="failed", gpu1="not measured", gpu2="not measured", d="not measured")
        assert describe(rows) == (
            "2 of the 3 targets that were measured here are met; missed: Target c. Of the others, 2 need a GPU and 1 "
            "is not measured yet."
        )

    def test_what_a_gpu_met_is_said_before_anything_is_measured(self):
        rows = self.rows(a="not measured", b="not measured", c="not measured")
        recorded = {
            "a": RecordedFigure(Figure(1.0), "NVIDIA H200", "2026-01-01"),
            "b": RecordedFigure(Figure(11.0), "NVIDIA H200", "2026-01-01"),
        }
        assert describe_recorded(rows, recorded) == (
            "None of the 3 targets is measured here yet. Of 2 that were recorded on a GPU (H200), 1 is met; 1 is not "
            "recorded yet."
        )
        assert describe_recorded(rows[:2], recorded).endswith("Of 2 that were recorded on a GPU (H200), 1 is met.")
        uncounted = [*rows[:2], Row(made("share", group="coverage"))]
        assert describe_recorded(uncounted, recorded).endswith("(H200), 1 is met.")
        assert describe_recorded(rows, {}).endswith("and nothing is recorded of a GPU.")


class TestRecords:
    def test_what_is_written_is_read_again(self, table, tmp_path):
        def broken(job):
            raise ValueError("no such kernel")

        table(made("a", quantity="ten"), made("b", quantity="broken"), made("c", needs_gpu=True),
              ten=value(9.5), broken=broken)  # fmt: skip
        found = run(Params(), JOB)
        write_record(found, tmp_path / "record.json")
        again = read_record(tmp_path / "record.json")
        assert again == {
            "a": RecordedFigure(found.rows[0].figure, found.device, found.date),
            "b": RecordedFigure(None, found.device, found.date, "ValueError: no such kernel"),
        }
        log = json.loads((tmp_path / "record.json").read_text())
        assert log["versions"]["torch"] == torch.__version__
        assert [row["verdict"] for row in log["rows"]] == ["passed", "failed"]

    @pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
    def test_what_is_no_number_has_failed_and_is_recorded_as_json_has_it(self, table, tmp_path, odd):
        table(made("a", quantity="odd"), made("b", quantity="wide"),
              odd=lambda job: Figure(odd, note="Odd."), wide=lambda job: Figure(1.0, 0.5, math.inf, 2))  # fmt: skip
        found = run(Params(), JOB)
        assert (found.rows[0].verdict, found.rows[0].note) == ("failed", "What was measured is no number. Odd.")
        write_record(found, tmp_path / "record.json")
        json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
        again = read_record(tmp_path / "record.json")
        assert again["a"].figure is None
        assert again["b"].figure == Figure(1.0, 0.5, None, 2)

    def test_without_a_record_there_is_nothing(self, tmp_path):
        assert read_record(tmp_path / "nowhere.json") == {}

    def test_benchmarks_speak_where_the_record_does_not(self, monkeypatch, tmp_path):
        monkeypatch.setattr(_targets_recorded, "_RECORD", tmp_path / "targets.json")
        recorded_figures.cache_clear()
        before = dict(recorded_figures())
        by_key = {each.key: each for each in read_targets()}
        lengths = {f"attention_{of}_{length}" for of in ("time", "memory") for length in (128, 512, 1024)}
        assert set(before) == lengths | {"flash_speedup", "flash_memory", "paged_optimizer"}
        assert all(by_key[key].bound.holds(each.figure.value) for key, each in before.items())
        assert all("H200" in each.provenance for each in before.values())
        runs = json.loads((ROOT / "engine" / "recorded" / "flash_attention_h200.json").read_text())["runs"]
        (last,) = [each["contract"]["ten_cold_calls_s"] for each in runs if each.get("contract")][-1:]
        ratios = [seconds["StandardAttention"] / seconds["FlashAttention"] for seconds in last.values()]
        assert len(ratios) == 2
        assert before["flash_speedup"].figure.value == min(ratios)

        row = {"key": "flash_speedup", "figure": dataclasses.asdict(Figure(7.0)), "note": ""}
        log = {"device": "NVIDIA H200", "recorded": "2031-01-01", "rows": [row]}
        (tmp_path / "targets.json").write_text(json.dumps(log))
        recorded_figures.cache_clear()
        after = recorded_figures()
        recorded_figures.cache_clear()
        assert after["flash_speedup"] == RecordedFigure(Figure(7.0), "NVIDIA H200", "2031-01-01")
        assert after["flash_memory"] == before["flash_memory"]


class TestTheReport:
    def test_every_row_is_there_with_its_verdict_in_words(self, table):
        table(made("a", quantity="ten"), made("b", quantity="eleven"), made("c", needs_gpu=True, group="gpu"),
              ten=value(10.0), eleven=value(11.0))  # fmt: skip
        found = run(Params(), JOB)
        text = report(found, {"c": RecordedFigure(Figure(5.0), "NVIDIA H200", "2026-01-01")})
        lines = [line for line in text.splitlines() if " | " in line]
        cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
        assert cells == [
            ["target", "bound", "measured", "10–90 %", "verdict", "recorded on a GPU"],
            ["Target a", "at most 10 ms", "10 ms", "9 – 11, 10 runs", "✓ passed", "not recorded yet"],
            ["Target b", "at most 10 ms", "11 ms", "10 – 12, 10 runs", "✗ failed", "not recorded yet"],
            ["Target c", "at most 10 ms", "—", "—", "– needs a GPU", "✓ 5 ms (H200, 2026-01-01)"],
        ]
        assert found.sentence in text
        assert found.device in text
        assert f"torch {torch.__version__}" in text
        assert "- Target a; Target b. How." in text

    def test_what_does_not_vary_has_no_spread(self):
        assert spread(made(), Figure(1.0)) == "—"
        assert spread(made(), None) == "—"
        assert spread(made(bound=Bound("more than", 1.5, "×")), Figure(2.0, 1.5, 2.5, 4, "processes")) == (
            "1.5 – 2.5, 4 processes"
        )

    def test_a_row_without_a_reason_is_not_measured_yet(self):
        assert verdict(Row(made())) == "– not measured yet"

    def test_what_a_gpu_gave_says_whether_it_keeps_the_bound(self):
        there = {"device": "NVIDIA H200", "date": "2026-01-01"}
        assert on_gpu(made(), RecordedFigure(Figure(10.5), **there)) == "✗ 10.5 ms (H200, 2026-01-01)"
        assert on_gpu(made(), RecordedFigure(None, **there)) == "✗ failed (H200, 2026-01-01)"
        assert on_gpu(made(group="coverage"), None) == "—"


class TestTheCommand:
    def test_where_nothing_is_measured_that_is_said_and_1(self, table, capsys):
        table(made("a", needs_gpu=True, group="gpu"), made("b", needs_gpu=True, group="gpu"))
        assert main(["targets", "--device", "cpu"]) == 1
        assert capsys.readouterr().out.splitlines()[-1] == "None of the 2 targets is measured here yet."

    def test_all_met_is_0_and_what_is_not_measured_does_not_fail(self, table, capsys):
        table(made("a", quantity="ten"), made("c", needs_gpu=True, group="gpu"), ten=value(10.0))
        assert main(["targets", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "✓ passed" in out
        assert out.splitlines()[-1] == (
            "1 of the 1 targets that were measured here is met. Of the others, 1 needs a GPU."
        )

    def test_a_target_that_is_missed_is_1(self, monkeypatch, capsys):
        (parameters,) = (each for each in read_targets() if each.key == "lora_parameters")
        assert parameters.bound == Bound("less than", 10, "%")
        monkeypatch.setattr(targets, "read_targets", lambda: (parameters,))
        assert main(["targets", "--device", "cpu"]) == 0
        stricter = dataclasses.replace(parameters, bound=Bound("less than", 6.25, "%"))
        monkeypatch.setattr(targets, "read_targets", lambda: (stricter,))
        assert main(["targets", "--device", "cpu"]) == 1
        assert "missed: LoRA, parameters." in capsys.readouterr().out

    def test_the_record_is_written(self, table, tmp_path, capsys):
        table(made("a", quantity="ten"), ten=value(10.0))
        assert main(["targets", "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 0
        assert read_record(tmp_path / "x.json")["a"].figure == Figure(10.0, 9.0, 11.0, 10)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--groups", "attention,everything"], "groups"),
            (["--json", "/nowhere/x.json"], "there is no folder '/nowhere'"),
            (["--device", "nonsense"], "'nonsense' is no device"),
            (["--quickly"], "targets takes no '--quickly'."),
        ],
    )
    def test_what_makes_no_sense_is_one_sentence(self, capsys, arguments, words):
        assert main(["targets", *arguments]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""

    def test_the_benchmark_is_the_same(self, monkeypatch):
        from tests.benchmarks import performance_targets

        asked = []
        monkeypatch.setattr("engine.__main__.main", lambda arguments: asked.append(arguments) or 1)
        monkeypatch.setattr(sys, "argv", ["performance_targets", "--device", "cpu"])
        assert performance_targets.main() == 1
        assert asked == [["targets", "--device", "cpu"]]
        assert read_targets() == performance_targets.TARGETS
