"""What was recorded on a GPU is what the page says of it, and agrees with its own arithmetic."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from engine import measure
from engine.experiments import _flash_recorded, flash_decode, flash_roofline, flash_speed
from engine.experiments._flash import why_above_peak
from engine.experiments._flash_cost import flops, held_bytes, least_ms, model_of
from engine.experiments._flash_recorded import (
    recorded_decode,
    recorded_precisions,
    recorded_roofline,
    recorded_speed,
)
from engine.flash import choice
from tests.benchmarks import flash_attention, flash_sweeps, recording

README = Path(__file__).parents[2] / "README.md"
DIRECTIONS = ("forward", "backward", "forward and backward")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_the_nearest_sweep_is_shown(head_dim, causal, direction):
    found = recorded_speed(flash_speed.Params(head_dim=head_dim, causal=causal, direction=direction))
    assert found.params.grad == (direction != "forward")
    assert found.params.causal == (causal or direction != "forward")  # gradients were recorded under the mask only
    assert found.params.head_dim == (64 if head_dim < 96 else 128)


@pytest.mark.parametrize("params", [flash_speed.Params(causal=c, head_dim=d) for c in (False, True) for d in (64, 128)])
def test_speeds_are_the_work_over_the_time(params):
    recorded = recorded_speed(params)
    assert recorded.found.on_gpu
    assert recorded.found.ended == "finished"
    for point in recorded.found.points:
        work = flops(recorded.params, point.length)
        assert point.tflops == pytest.approx(work / point.median_ms / 1e9)
        assert point.peak_share == pytest.approx(work / point.median_ms * 1e3 / recorded.found.peaks.flops)
        assert point.low_ms <= point.median_ms <= point.high_ms
    said = flash_speed.describe_points(
        recorded.found.points, recorded.found.stops, why_above_peak("bfloat16", on_gpu=True)
    )
    assert recorded.found.sentence == said
    assert {"python", "torch", "cuda", "triton", "flash-attn-4"} <= recorded.found.versions.keys()


@pytest.mark.parametrize("params", [flash_speed.Params(causal=c, direction="backward") for c in (False, True)])
def test_what_was_predicted_is_what_is_predicted_now(params):
    recorded = recorded_speed(params)
    assert len(recorded.found.predicted) == 2
    for point in recorded.found.points:
        assert point.predicted_bytes == held_bytes(recorded.params, point.backend, point.length, on_gpu=True)
        model = model_of(point.backend)
        assert point.predicted_ms == least_ms(recorded.params, model, point.length, recorded.found.peaks)


def test_what_was_tried_and_ran_out_of_memory_failed():
    (stop,) = recorded_speed(flash_speed.Params(direction="backward")).found.stops
    assert (stop.kind, stop.needed_bytes) == ("failed", 0)


def test_what_the_recording_is_there_to_show():
    """On a GPU the matrix costs both time and memory, and from 512 tokens our kernel is faster than PyTorch's."""
    for causal in (False, True):
        found = recorded_speed(flash_speed.Params(causal=causal)).found
        longest = {point.backend: point for point in found.points if point.length == 16384}
        standard, flash = (longest[name] for name in ("standard", "flash-attn-4"))
        assert standard.median_ms > 4 * flash.median_ms
        assert standard.peak_bytes > 100 * flash.peak_bytes
        theirs = {point.length: point.tflops for point in found.points if point.backend == "torch-flash"}
        own = {point.length: point.tflops for point in found.points if point.backend == "triton"}
        assert all(own[length] > 1.05 * theirs[length] for length in theirs if length >= 512)


def test_below_the_roof_are_the_same_points():
    params = flash_speed.Params(causal=False)
    speed, roof = recorded_speed(params), recorded_roofline(params)
    assert isinstance(roof.found, flash_roofline.Result)
    for timed, placed in zip(speed.found.points, roof.found.points, strict=True):
        assert (timed.backend, timed.length) == (placed.backend, placed.length)
        assert placed.flops_per_second == pytest.approx(1e12 * timed.tflops)
        assert placed.intensity == pytest.approx(placed.flops / placed.moved_bytes)
        assert placed.low <= placed.flops_per_second <= placed.high


def test_a_cache_is_read_near_the_speed_of_memory():
    recorded = recorded_decode()
    assert isinstance(recorded.found, flash_decode.Result)
    longest = [point for point in recorded.found.points if point.length == recorded.params.max_length]
    assert 0.8 < max(point.bandwidth_share for point in longest) <= 1.1
    assert recorded.found.merge.share.sum() == pytest.approx(1)


def test_half_precision_with_float32_sums_errs_as_tf32_does():
    errors, where = recorded_precisions()
    assert errors["flash, fast"] == pytest.approx(errors["standard, TF32"], rel=0.2)
    assert errors["flash, exact"] < 1e-6
    assert "H200" in where


class TestDecode:
    """The sentence is of its own points: names and figures are put together anew here."""

    @staticmethod
    def rows():
        recorded = recorded_decode()
        longest = recorded.params.max_length
        row = {point.backend: point for point in recorded.found.points if point.length == longest}
        return recorded, row, max(row.values(), key=lambda point: point.bandwidth_share)

    def test_who_comes_near_memory_and_how_many_do_not(self):
        recorded, row, best = self.rows()
        near = [p for p in row.values() if p is not best and p.bandwidth_share >= 0.5]
        far = [p.bandwidth_share for p in row.values() if p.bandwidth_share < 0.5]
        said = recorded.found.sentence
        assert f"“{best.label}” with" in said
        assert f"“{near[0].label}” reaches {near[0].bandwidth_share:.0%}, the other {len(far)} stay" in said
        assert f"at {min(far):.0%} to {max(far):.0%}: reading the cache once is not what takes their time" in said
        assert "does not split the keys of one query" in said

    def test_how_short_a_cache_is_too_short(self):
        recorded, *_ = self.rows()
        points = recorded.found.points
        near = min(point.length for point in points if point.bandwidth_share >= 0.5)
        assert f"Up to {near // 2:,} tokens none reaches half" in recorded.found.sentence

    def test_what_splitting_did_is_said_with_its_lengths(self):
        recorded, row, _ = self.rows()
        ratio = row["whole"].median_ms / row["split"].median_ms
        assert (
            f"At 131,072 tokens our own split is {ratio:.1f} times faster in 16 parts than in one; at 2,048 it is"
            in (recorded.found.sentence)
        )

    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_a_few_points_are_described_as_well(self, on_gpu):
        recorded, row, best = self.rows()

        def said(*points):
            return flash_decode.describe_points(recorded.params, points, on_gpu=on_gpu)

        assert said() == ""
        alone = said(best)
        assert "stay" not in alone
        assert "Up to" not in alone
        two = said(best, row["flex"])
        assert f"“{row['flex'].label}” stays at 3%: reading the cache once is not what takes its time." in two
        assert ("multiprocessors" in two) is on_gpu
        assert "not memory's" in said(row["flex"], row["triton"])
        apart = said(row["whole"], row["split"])
        assert "times faster in 16 parts than in one" in apart
        assert ("Splits are for GPUs" in apart) is not on_gpu


def test_the_figures_of_the_readme_are_those_of_the_record():
    record = json.loads(_flash_recorded._BENCHMARK.read_text(encoding="utf-8"))
    shapes = [shape for run in record["runs"] for shape in run["shapes"] if not shape["queries"]]
    row = next(
        line for line in README.read_text(encoding="utf-8").splitlines() if "attention forward, bfloat16" in line
    )
    for direction, count in (("forward", 16), ("both", 8)):
        rows = [shape["rows"] for shape in shapes if shape["direction"] == direction]
        shares = [100 * each["FlashAttention"]["of_best"] for each in rows]
        assert len(shares) == count
        assert f"{min(shares):.1f} to {max(shares):.1f} %" in row
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        speeds = [
            f"{shape['rows']['FlashAttention']['tflops']:.0f}"
            for shape in shapes
            if (shape["direction"], shape["head_dim"], shape["causal"]) == ("forward", head_dim, causal)
        ]
        assert " / ".join(speeds) in row
    kernels = {point.length: {} for point in recorded_decode().found.points}
    for point in recorded_decode().found.points:
        kernels[point.length][point.backend] = point
    apart = {
        length: each["torch-flash"].median_ms / each["torch-cudnn"].median_ms
        for length, each in kernels.items()
        if each["torch-flash"].low_ms > each["torch-cudnn"].high_ms
    }
    assert f"by {apart[min(apart)]:.2f} to {apart[max(apart)]:.2f} times" in row
    assert f"caches of {min(apart)} to {max(apart)} tokens" in row


class TestScripts:
    """What the benchmarks write is what is read, and is completed on its own device only."""

    @staticmethod
    def run(script, monkeypatch, *arguments):
        monkeypatch.setattr("sys.argv", [script.__name__, "--device", "cpu", "--small", *arguments])
        return script.main()

    def test_a_record_is_written_read_and_gets_another_run(self, tmp_path, monkeypatch, capsys):
        path = tmp_path / "record.json"
        choice.forget()
        for count in (1, 2):
            self.run(flash_attention, monkeypatch, "--json", str(path), "--directions", "forward", "--head-dims", "64")
            record = json.loads(path.read_text(encoding="utf-8"))
            assert record.keys() == json.loads(_flash_recorded._BENCHMARK.read_text(encoding="utf-8")).keys()
            assert len(record["runs"]) == count
        choice.forget()
        for shape in record["runs"][1]["shapes"]:
            best, chosen = shape["in_turn_ms"][shape["best"]], shape["in_turn_ms"]["FlashAttention"]
            assert len(best) == len(chosen) == 3
            assert shape["rows"]["FlashAttention"]["of_best"] == pytest.approx(sum(best) / sum(chosen))
        assert "in turn:" in capsys.readouterr().out
        monkeypatch.setattr(_flash_recorded, "_BENCHMARK", path)
        errors, where = recorded_precisions()
        assert errors == record["runs"][0]["precisions"]
        assert record["device"] in where

    def test_sweeps_are_written_and_read(self, tmp_path, monkeypatch):
        path = tmp_path / "sweeps.json"
        wanted = [sweep for sweep in flash_sweeps.sweeps(small=True) if sweep[0] == "flash_decode"]
        wanted += [sweep for sweep in flash_sweeps.sweeps(small=True) if sweep[0] == "flash_speed"][:1]
        monkeypatch.setattr(flash_sweeps, "sweeps", lambda small: wanted)
        self.run(flash_sweeps, monkeypatch, "--json", str(path))
        written = path.read_text(encoding="utf-8")
        assert "predicted" not in written
        assert "sentence" not in written
        self.run(flash_sweeps, monkeypatch, "--json", str(path))
        assert path.read_text(encoding="utf-8") == written
        monkeypatch.setattr(_flash_recorded, "_SWEEPS", path)
        _flash_recorded._sweeps.cache_clear()
        try:
            assert recorded_decode().found.sentence
            assert recorded_speed(flash_speed.Params()).found.sentence
        finally:
            _flash_recorded._sweeps.cache_clear()

    @pytest.mark.parametrize(
        ("script", "name"), [(flash_attention, "flash_attention_h200"), (flash_sweeps, "flash_sweeps_h200")]
    )
    def test_a_record_of_another_device_is_refused_and_left_alone(self, script, name, tmp_path, monkeypatch):
        path = tmp_path / "record.json"
        shutil.copy(_flash_recorded._FOLDER / f"{name}.json", path)
        before = path.read_bytes()
        with pytest.raises(SystemExit, match=r"recorded on NVIDIA H200 with .*triton 3\.6\.0.* and this is CPU"):
            self.run(script, monkeypatch, "--json", str(path))
        assert path.read_bytes() == before

    def test_a_record_of_other_versions_is_refused(self, tmp_path):
        found = {"device": measure.device_name("cpu"), "versions": measure.versions()}
        recording.check_same_place(tmp_path, found, "cpu")
        found["versions"] = found["versions"] | {"torch": "0.1"}
        with pytest.raises(SystemExit, match=r"torch 0\.1"):
            recording.check_same_place(tmp_path, found, "cpu")
