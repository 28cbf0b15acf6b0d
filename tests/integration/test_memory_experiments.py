"""The experiments of the memory lab in this process: what they say agrees with what is built and weighed."""

import json
import subprocess
import sys

import pytest
import torch

from engine import memory_measurement
from engine.errors import DoesNotFitError
from engine.experiments import _memory, memory, memory_measure, memory_paged, memory_tests, parse
from engine.memory_budget import GB, budget, building_bytes
from engine.optim import LargeTestModel
from engine.runtime.jobs import LocalJob
from tests.benchmarks import memory_prediction

SMALL = {"shape": "storyteller", "batch": 1, "length": 64}


class TestBudget:
    @pytest.mark.parametrize("shape", list(_memory.SHAPES))
    def test_less_is_trained_in_fewer_bits_and_less_is_held(self, shape):
        found = memory.run(memory.Params(shape=shape), LocalJob())
        peaks = [way.peak.total for way in found.ways]
        assert [way.name for way in found.ways] == ["full fine-tuning", "LoRA", "QLoRA", "generating"]
        assert peaks == sorted(peaks, reverse=True)
        assert found.ways[found.chosen].name == "QLoRA"
        assert max(moment.total for moment in found.moments) == peaks[found.chosen]

    @pytest.mark.parametrize(
        ("values", "name", "weights"),
        [
            ({}, "QLoRA", "nf4, double quantized"),
            ({"weights": "nf4"}, "QLoRA", "nf4"),
            ({"weights": "int8"}, "LoRA, 8-bit", "int8"),
            ({"weights": "bfloat16"}, "LoRA", "bfloat16"),
            ({"weights": "float32"}, "LoRA", "float32"),
            ({"method": "full fine-tuning"}, "full fine-tuning", "bfloat16"),
            ({"method": "full fine-tuning", "weights": "float32"}, "full fine-tuning", "float32"),
        ],
    )
    def test_the_chosen_way_is_the_settings_own(self, values, name, weights):
        params = memory.Params(**values)
        found = memory.compute(params)
        way = found.ways[found.chosen]
        assert (way.name, way.weights) == (name, weights)
        assert way.peak == budget(params.plan()).peak

    def test_what_fits_is_said(self):
        found = memory.compute(memory.Params(card=24))
        assert [way.fits for way in found.ways] == [False, False, True, True]
        assert "QLoRA and generating fit a card of 24 GB" in found.sentence
        assert "None of them fits a card of 8 GB" in memory.compute(memory.Params(shape="Llama 3 70B", card=8)).sentence
        assert "All of them fit" in memory.compute(memory.Params(shape="storyteller", card=8)).sentence

    @pytest.mark.parametrize("card", [8, 24, 80, 141])
    def test_a_larger_card_and_checkpointing_have_room_for_more(self, card):
        rooms = {
            (room.name, room.checkpointing): room.batches for room in memory.compute(memory.Params(card=card)).rooms
        }
        for (name, checkpointing), batches in rooms.items():
            assert list(batches) == sorted(batches, reverse=True)
            if not checkpointing:
                assert all(again >= kept for kept, again in zip(batches, rooms[name, True], strict=True))

    def test_a_rank_above_the_smallest_side_is_refused(self):
        with pytest.raises(ValueError, match="rank"):
            parse("memory", {"shape": "storyteller", "rank": 200})

    def test_a_context_is_known_of_every_shape(self):
        assert set(_memory.CONTEXTS) == set(_memory.SHAPES)
        assert memory.compute(memory.Params(shape="storyteller")).context == 512


class TestMeasure:
    @pytest.mark.parametrize(
        "values",
        [
            {"weights": "bfloat16"},
            {"method": "full fine-tuning", "weights": "float32"},
            {"batch": 2, "checkpointing": True},
        ],
    )
    def test_the_prediction_is_close_to_what_is_measured(self, values):
        found = memory_measure.run(memory_measure.Params(**SMALL | values), LocalJob())
        assert found.peak.name == "peak of a step"
        assert abs(found.peak.error) < 0.05
        assert f"{found.peak.measured / GB:.3f}" in found.sentence
        errors = {row.name: row.error for row in found.rows}
        for name in ("weights, scales, adapters", "optimizer state", "gradients"):
            assert errors[name] == pytest.approx(0, abs=1e-6)
        assert found.loss > 0

    def test_what_would_take_a_processor_too_long_is_refused(self):
        with pytest.raises(DoesNotFitError, match="too many for a processor"):
            memory_measure.run(memory_measure.Params(shape="Llama 7B"), LocalJob())

    def test_it_asks_for_the_memory_that_it_predicts(self):
        params = memory_measure.Params(shape="Llama 3 70B")
        assert params.memory_bytes() > budget(params.plan()).peak.total

    def test_it_asks_for_what_building_takes_where_that_is_more(self):
        """One block before it is quantized can be more than what a step on a few tokens adds."""
        params = memory_measure.Params(
            shape="Llama 3 70B", weights="nf4", rank=1, batch=1, length=16, checkpointing=True
        )
        assert building_bytes(params.plan()) > budget(params.plan()).peak.total
        assert params.memory_bytes() > building_bytes(params.plan())
        assert building_bytes(params.plan()) < 45 * GB

    @pytest.mark.parametrize(
        ("fails", "said"),
        [
            ("build", "while the model was built, for which .* GB .*: no batch is in it yet, choose a smaller shape"),
            ("measure_step", "in a training step, for which .* GB .*: choose a smaller shape, batch or length"),
        ],
    )
    def test_running_out_is_told_by_when_it_happens(self, monkeypatch, fails, said):
        """Running out is played: there may be no GPU here."""

        def run_out(*_):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(memory_measurement, fails, run_out)
        with pytest.raises(DoesNotFitError, match=said):
            memory_measure.run(memory_measure.Params(**SMALL), LocalJob())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": "full fine-tuning"},
        {"shape": "storyteller", "weights": "bfloat16", "checkpointing": True},
        {"shape": "Llama 3 70B", "optimizer": "paged AdamW 8-bit"},
        {"weights": "int8", "targets": "query and value"},
        {"shape": "SmolLM2-135M", "weights": "float32", "rank": 64, "card": 8},
    ],
)
def test_every_property_holds(values):
    checks = memory_tests.run(memory_tests.Params(**values), LocalJob()).checks
    assert not [check for check in checks if not check.passed]
    assert len(checks) >= 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it does run out")
@pytest.mark.parametrize("budget", [8, 141])
@pytest.mark.parametrize("large_batch", [False, True])
def test_without_a_gpu_both_optimizers_complete_and_the_result_says_why(large_batch, budget):
    found = memory_paged.run(memory_paged.Params(large_batch=large_batch, budget=budget), LocalJob())
    assert [attempt.completed for attempt in found.attempts] == [True, True]
    assert (found.budget_bytes, found.limit_bytes, found.attempts[1].paged_bytes) == (0, 0, 0)
    assert f"Nothing runs out here, with {budget} GB or any budget" in found.sentence


@pytest.mark.parametrize(
    ("given", "limit", "said"),
    [
        (24 * GB, "the budget", "need 26.00 GB; 24.00 are allowed, the budget. Plain AdamW ran out"),
        (
            10 * GB,
            "half of what cuda:0 has free",
            "10.00 are allowed, half of what cuda:0 has free, which is less than",
        ),
    ],
)
def test_the_sentence_says_which_budget_it_was(given, limit, said):
    """As a GPU would find it: the model that is told of has no weights here."""
    model = LargeTestModel(1, 1, torch.device("cpu"), given, limit)
    attempts = [
        memory_paged.Attempt("AdamW", False, "out of memory", 1, 0, (), 1.0),
        memory_paged.Attempt("paged AdamW", True, "", 1, 13 * GB, (1.0, 0.9, 0.8), 1.0),
    ]
    sentence = memory_paged._sentence(attempts, round(6.5 * GB), model, 24)
    assert said in sentence
    assert "paged AdamW took its 3 steps with 13.00 GB of its state paged." in sentence


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [3, 24, 141])
def test_plain_runs_out_where_paged_completes_and_the_limit_is_lifted(budget):
    before = torch.cuda.get_per_process_memory_fraction()
    found = memory_paged.run(memory_paged.Params(budget=budget), LocalJob("cuda:0"))
    assert 0 < found.budget_bytes <= budget * GB
    assert (found.budget_bytes == budget * GB) == (", the budget." in found.sentence)
    plain, paged = found.attempts
    assert (plain.completed, paged.completed) == (False, True)
    assert "out of memory" in plain.message
    assert found.budget_bytes < 4 * found.weight_bytes
    assert paged.peak_bytes <= found.limit_bytes
    assert paged.paged_bytes == 2 * found.weight_bytes
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(before)


def test_the_benchmark_writes_what_the_lab_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    monkeypatch.setattr(
        sys, "argv", ["-", "--device", "cpu", "--small", "--rows", "LoRA", "QLoRA", "--json", str(path)]
    )
    assert memory_prediction.main() == 0
    found = _memory.read(path)
    assert {row.row for row in found.rows} == {"LoRA", "QLoRA"}
    assert all(abs(row.error) < 0.1 for row in found.rows)
    assert found.paged["limit_bytes"] == 0
    assert "recorded on an CPU" in found.provenance
    assert "4 rows, worst error" in capsys.readouterr().out


def test_a_row_that_fails_leaves_the_others(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    monkeypatch.setitem(memory_prediction.ROWS, "broken", {"method": "LoRA", "targets": ("nothing",)})
    monkeypatch.setattr(
        sys, "argv", ["-", "--device", "cpu", "--small", "--rows", "broken", "LoRA", "--json", str(path)]
    )
    assert memory_prediction.main() == 1
    rows = json.loads(path.read_text())["rows"]
    assert ["error" in row for row in rows] == [True, False, False]
    assert len(_memory.read(path).rows) == 2


def test_the_web_process_needs_no_torch_for_it():
    code = "import sys, ui.memory.explore, engine.experiments.memory_paged; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
