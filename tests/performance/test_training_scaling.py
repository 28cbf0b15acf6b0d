"""Two GPUs train a model together nearly twice as fast as one alone, and learn the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.processes import ProcessGroup
from tests.benchmarks.training_scaling import LARGEST_DISTANCE, SMALL, TARGET, measure, work

ROOT = Path(__file__).parents[2]


def benchmark(record, *options):
    command = [sys.executable, "-m", "tests.benchmarks.training_scaling", "--json", str(record), *options]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert record.exists(), completed.stdout[-2000:] + completed.stderr[-2000:]
    return json.loads(record.read_text(encoding="utf-8"))["runs"], completed


@pytest.mark.slow
def test_the_benchmark_runs_small_on_a_cpu(tmp_path):
    runs, completed = benchmark(tmp_path / "record.json", "--device", "cpu", "--note", "small")
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (run,) = runs
    assert [(row["processes"], row["samples"]) for row in run["rows"]] == [(1, 4), (1, 8), (2, 8)]
    for row in run["rows"]:
        assert len(row["tokens_per_second"]) == row["evidence"]["runs"] == run["size"]["windows"]
        assert row["evidence"]["low_ms"] <= row["evidence"]["median_ms"] <= row["evidence"]["high_ms"]
    for name, alone in (("weak", 0), ("strong", 1)):
        speeds = [run["rows"][index]["tokens_per_second"] for index in (2, alone)]
        assert min(speeds[0]) / max(speeds[1]) <= run[name]["low"] <= run[name]["median"] <= run[name]["high"]
    assert run["apart"] <= LARGEST_DISTANCE / 3
    assert "weak scaling" in completed.stdout


def work_without_averaging(*given):
    """As `work`, where the model is called as it is, so that no process hears of another's gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessGroup, "wrap", lambda processes, model: model)
        work(*given)


@pytest.mark.slow
def test_processes_that_do_not_average_their_gradients_are_found_out():
    _, apart = measure(SMALL._replace(windows=2, steps=1), 2, "cpu", False, work_without_averaging)
    assert apart > 2 * LARGEST_DISTANCE


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_two_gpus_reach_the_target_and_the_same_weights(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (run,), completed = benchmark(tmp_path / "record.json")
    assert run["weak"]["median"] >= 2 * TARGET, completed.stdout
    assert run["apart"] <= LARGEST_DISTANCE, completed.stdout
