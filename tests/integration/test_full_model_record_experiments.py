"""What the benchmark of the Whole model lab writes: the experiments' own results, each once."""

import json

from engine.experiments import full_model_ablation, full_model_throughput
from tests.benchmarks import full_model_runs


def test_the_record_holds_what_the_lab_shows(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    monkeypatch.setattr("sys.argv", ["full_model_runs", "--device", "cpu", "--small", "--json", str(path)])
    assert full_model_runs.main() == 0
    written = path.read_text(encoding="utf-8")
    ablation, throughput = json.loads(written)["runs"]
    rows = [full_model_ablation.Row(**row) for row in ablation["result"]["rows"]]
    assert len(rows) == ablation["result"]["total"] == len(full_model_ablation.Params(**ablation["params"]).rows())
    assert all(row.peak_bytes > row.model_bytes > 0 < row.low_ms <= row.median_ms <= row.high_ms for row in rows)
    points = [full_model_throughput.Point(**point) for point in throughput["result"]["points"]]
    assert len(points) == throughput["result"]["total"]
    assert {point.phase for point in points} == set(full_model_throughput.PHASES)
    assert "sentence" not in written
    assert full_model_runs.main() == 0
    assert path.read_text(encoding="utf-8") == written


def test_what_is_recorded_is_what_the_lab_can_be_set_to():
    for name, values in full_model_runs.runs(small=False):
        experiment = {"full_model_ablation": full_model_ablation, "full_model_throughput": full_model_throughput}[name]
        experiment.Params(**values)
