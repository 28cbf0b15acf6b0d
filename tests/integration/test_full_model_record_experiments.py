"""What the benchmark of the Whole model lab writes is what the lab reads."""

import json
import math

import pytest

from engine.experiments import _full_model_recorded, full_model, full_model_ablation, full_model_throughput
from engine.experiments._full_model_recorded import recorded_ablation, recorded_throughput
from tests.benchmarks import full_model_runs


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A small one, of this machine."""
    path = tmp_path_factory.mktemp("record") / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["full_model_runs", "--device", "cpu", "--small", "--json", str(path)])
        for _ in range(2):  # the second finds all of it there
            assert full_model_runs.main() == 0
    return path


@pytest.fixture
def read(monkeypatch):
    """Has the lab read another record."""

    def from_path(path):
        monkeypatch.setattr(_full_model_recorded, "_RECORD", path)
        _full_model_recorded._runs.cache_clear()

    yield from_path
    _full_model_recorded._runs.cache_clear()


def test_what_is_written_is_read(record, read):
    read(record)
    assert "sentence" not in record.read_text(encoding="utf-8")
    ablation, throughput = (find(full_model.Params()) for find in (recorded_ablation, recorded_throughput))
    assert len(ablation.found.rows) == ablation.found.total == len(ablation.params.rows())
    for row in ablation.found.rows:
        assert 0 < row.model_bytes < row.peak_bytes
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
    assert ablation.found.sentence == full_model_ablation.describe_rows(ablation.found.rows)
    assert len(throughput.found.points) == throughput.found.total
    assert {point.phase for point in throughput.found.points} == set(full_model_throughput.PHASES)
    assert throughput.found.sentence == full_model_throughput.describe_points(throughput.found.points)
    assert ablation.params.d_model == throughput.params.d_model == full_model_runs.TINY["d_model"]


def test_of_two_the_nearest_in_size_is_read(record, read, tmp_path):
    log = json.loads(record.read_text(encoding="utf-8"))
    log["runs"] += [run | {"params": run["params"] | full_model_runs.LARGEST} for run in log["runs"]]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(log), encoding="utf-8")
    read(path)
    for find in (recorded_ablation, recorded_throughput):
        widths = [find(full_model.Params(d_model=width, batch_size=16)).params.d_model for width in (32, 512)]
        assert widths == [full_model_runs.TINY["d_model"], full_model_runs.LARGEST["d_model"]]


def test_a_row_that_diverged_has_no_number(record, read, tmp_path):
    log = json.loads(record.read_text(encoding="utf-8"))
    log["runs"][0]["result"]["rows"][0]["last_loss"] = [None]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(log), encoding="utf-8")
    read(path)
    assert math.isnan(recorded_ablation(full_model.Params()).found.rows[0].last_loss[0])


def test_without_a_record_there_is_none(read, tmp_path):
    read(tmp_path / "record.json")
    assert recorded_ablation(full_model.Params()) is None
    assert recorded_throughput(full_model.Params()) is None


def test_what_is_to_be_recorded_is_what_the_lab_can_be_set_to():
    for name, values in full_model_runs.runs(small=False):
        experiment = {"full_model_ablation": full_model_ablation, "full_model_throughput": full_model_throughput}[name]
        experiment.Params(**values)
