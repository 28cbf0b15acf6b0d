"""The experiments of the FlashAttention lab in this process: what they say agrees with what is measured."""

import dataclasses
import itertools
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import measure, memory
from engine.attention import attend
from engine.errors import DoesNotFitError, InputError
from engine.experiments import (
    _flash,
    _flash_cache,
    _flash_cost,
    _flash_recorded,
    _flash_sweep,
    flash_accuracy,
    flash_decode,
    flash_online,
    flash_roofline,
    flash_speed,
    flash_tests,
    flash_tiles,
)
from engine.flash.backends import BACKENDS
from engine.runtime.jobs import LocalJob
from engine.runtime.results import weigh

CPU = ("standard", "torch-math", "torch-flash")
SMALL = {"max_length": 256, "heads": 2, "head_dim": 32, "runs": 3, "backends": CPU}
CACHE = {"max_length": 2048, "runs": 3, "backends": CPU}
SWEEPS = [flash_speed, flash_roofline]
RECORDED = [
    flash_speed.Params(causal=causal, head_dim=head_dim, direction=direction)
    for head_dim in (64, 128)
    for causal, direction in ((False, "forward"), (True, "forward"), (True, "forward and backward"))
]
"""What was recorded on an H200."""


def broken(name, **changes):
    return dataclasses.replace(BACKENDS[name], **changes)


def fails(*arguments):
    raise RuntimeError("no kernel image\nand a second line.")


def stop_after(count, timed_out=False):
    """A job that is to stop once it has reported `count` times."""
    reports = []

    def on_progress(progress):
        reports.append(progress)
        if progress.step == count:
            job.cancelled, job.timed_out = True, timed_out

    job = LocalJob("cpu", on_progress)
    return job


class TestSweeps:
    @pytest.mark.parametrize("direction", ["forward", "backward", "forward and backward"])
    def test_every_backend_is_measured_at_every_length(self, direction):
        shown, reports = [], []
        job = LocalJob("cpu", reports.append, shown.append)
        found = flash_speed.run(flash_speed.Params(**SMALL, direction=direction), job)
        assert [(point.length, point.backend) for point in found.points] == [(T, b) for T in (128, 256) for b in CPU]
        assert [len(draft.points) for draft in shown] == [1, 2, 3, 4, 5, 6]
        assert [report.step for report in reports] == [0, 1, 2, 3, 4, 5, 6]
        assert {report.total for report in reports} == {6} == {found.total}
        assert (found.ended, found.stops, found.absent) == ("finished", (), {})
        for point in found.points:
            assert 0 < point.low_ms <= point.median_ms <= point.high_ms
            assert point.runs == 3
            assert point.peak_bytes > 0
        assert "256 tokens" in found.sentence
        assert "CPU" in found.device
        weigh(found)

    @pytest.mark.parametrize("module", SWEEPS)
    def test_flops_follow_from_the_time(self, module):
        params = module.Params(**SMALL, causal=False)
        point = module.run(params, LocalJob()).points[-1]
        flops = 4 * params.heads * 256**2 * params.head_dim
        if module is flash_speed:
            assert point.tflops == pytest.approx(flops / point.median_ms / 1e9)
        else:
            assert point.flops == flops
            assert point.low <= point.flops_per_second <= point.high

    @pytest.mark.parametrize("module", SWEEPS)
    def test_what_does_not_exist_here_is_named_with_its_reason(self, module):
        values = SMALL | {"backends": ("standard", "triton", "flash-attn-4")}
        found = module.run(module.Params(**values), LocalJob())
        assert set(found.absent) == {BACKENDS["triton"].label, BACKENDS["flash-attn-4"].label}
        assert all(reason.endswith(".") for reason in found.absent.values())
        assert {point.backend for point in found.points} == {"standard"}

    @pytest.mark.parametrize("module", SWEEPS)
    def test_with_no_backend_at_all_the_reasons_are_given(self, module):
        with pytest.raises(InputError, match=r"None of the chosen backends .* GPU"):
            module.run(module.Params(**SMALL | {"backends": ("triton",)}), LocalJob())

    @pytest.mark.parametrize("module", SWEEPS)
    def test_a_backend_that_fails_is_named_and_left_out_and_the_others_go_on(self, module, monkeypatch):
        monkeypatch.setitem(BACKENDS, "torch-math", broken("torch-math", kernel=fails))
        found = module.run(module.Params(**SMALL), LocalJob())
        (stop,) = found.stops
        assert (stop.backend, stop.length, stop.kind) == ("torch-math", 128, "failed")
        assert stop.reason == "It failed at 128 tokens with RuntimeError: no kernel image."
        assert [(point.length, point.backend) for point in found.points] == [
            (T, b) for T in (128, 256) for b in ("standard", "torch-flash")
        ]
        assert (found.ended, found.total) == ("finished", 5)

    @pytest.mark.parametrize("module", SWEEPS)
    def test_running_out_of_memory_after_all_is_a_failure(self, module, monkeypatch):
        def runs_out(*arguments):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setitem(BACKENDS, "torch-math", broken("torch-math", kernel=runs_out))
        (stop,) = module.run(module.Params(**SMALL), LocalJob()).stops
        assert (stop.kind, stop.needed_bytes) == ("failed", 0)
        assert stop.reason == "Out of memory at 128 tokens: it took more than was predicted."

    def test_a_shape_that_a_backend_does_not_take_is_a_gap_and_not_the_end(self, monkeypatch):
        def refusal(case):
            return "Not 128." if case.Tq == 128 else None

        monkeypatch.setitem(BACKENDS, "torch-math", broken("torch-math", why_not=refusal))
        found = flash_speed.run(flash_speed.Params(**SMALL), LocalJob())
        assert [(stop.length, stop.kind, stop.reason) for stop in found.stops] == [(128, "cannot", "Not 128.")]
        assert sum(point.backend == "torch-math" for point in found.points) == 1

    @pytest.mark.parametrize("module", SWEEPS)
    @pytest.mark.parametrize(("timed_out", "ended"), [(False, "cancelled"), (True, "timed out")])
    def test_what_is_stopped_keeps_its_points(self, module, timed_out, ended):
        found = module.run(module.Params(**SMALL), stop_after(2, timed_out))
        assert found.ended == ended
        assert len(found.points) == 2
        assert "after 2 of 6 points" in found.ending

    def test_standard_attention_is_not_tried_where_it_would_not_fit(self, monkeypatch):
        params = flash_speed.Params(max_length=1024, runs=3, backends=CPU)
        tried = []

        def kernel(Q, *rest):
            tried.append(Q.shape[-2])
            return BACKENDS["torch-flash"].kernel(Q, *rest)

        monkeypatch.setitem(BACKENDS, "standard", broken("standard", kernel=kernel))
        free = 100 * 2**20
        monkeypatch.setattr(memory, "free", lambda device: free)
        found = flash_speed.run(params, LocalJob())
        stops = {stop.backend: stop for stop in found.stops}
        assert set(stops) == {"standard", "torch-math"}
        for stop in stops.values():
            assert (stop.kind, stop.free_bytes) == ("memory", free)
            assert stop.needed_bytes > _flash_cost.SAFE * free
            assert "Out of memory" in stop.reason
            assert stop.reason.endswith("so it was not tried.")
        assert max(tried) < stops["standard"].length
        assert max(point.length for point in found.points if point.backend == "torch-flash") == 1024
        assert BACKENDS["standard"].label in found.sentence

    @pytest.mark.parametrize("module", SWEEPS)
    @pytest.mark.parametrize("tokens", ["fixed batch", "constant tokens"])
    def test_a_length_that_takes_the_whole_device_is_refused_with_the_largest_that_fits(
        self, module, tokens, monkeypatch
    ):
        monkeypatch.setattr(memory, "free", lambda device: 10 * 2**20)
        values = SMALL | {"max_length": 65536, "tokens": tokens}
        with pytest.raises(DoesNotFitError, match="the longest that fits is") as caught:
            module.run(module.Params(**values), LocalJob())
        fitting = int(re.search(r"fits is ([\d,]+)", str(caught.value))[1].replace(",", ""))
        _flash_cost.check_fits(module.Params(**values | {"max_length": fitting}), memory.free("cpu"))
        with pytest.raises(DoesNotFitError):
            _flash_cost.check_fits(module.Params(**values | {"max_length": 2 * fitting}), memory.free("cpu"))

    def test_where_no_length_fits_another_way_out_is_named(self, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda device: 10_000)
        with pytest.raises(DoesNotFitError, match="no length fits, choose a smaller batch or fewer heads"):
            flash_speed.run(flash_speed.Params(**SMALL), LocalJob())

    def test_what_would_take_too_long_is_not_begun(self, monkeypatch):
        monkeypatch.setattr(_flash_sweep, "POINT_SECONDS", 1e-6)
        found = flash_speed.run(flash_speed.Params(**SMALL), LocalJob())
        assert not found.points
        assert {(stop.length, stop.kind) for stop in found.stops} == {(128, "time")}
        assert found.total == 3

    @pytest.mark.parametrize("direction", ["forward", "forward and backward"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_predicted_memory_is_close_to_what_is_measured(self, direction, dtype, causal, monkeypatch):
        monkeypatch.setattr(measure, "measure_time", lambda *arguments, **words: None)
        params = flash_speed.Params(
            max_length=512, heads=4, runs=3, dtype=dtype, direction=direction, causal=causal, backends=CPU
        )
        sweep = _flash_sweep.Sweep(params, LocalJob(), _flash.Peaks(1.0, 1.0, ()), weigh=True)
        for backend in ("standard", "torch-math"):
            found = sweep._measure(BACKENDS[backend], 512)
            assert found.peak_bytes == pytest.approx(_flash_cost.held_bytes(params, backend, 512), rel=0.12), backend
        found = sweep._measure(BACKENDS["torch-flash"], 512)
        workspace = found.peak_bytes - _flash_cost.held_bytes(params, "flash", 512)
        assert 0 <= workspace < 4 * 2**20  # the threads' own tiles, whatever the length

    @pytest.mark.parametrize("asked", RECORDED)
    def test_predicted_memory_of_a_gpu_is_close_to_what_was_recorded(self, asked):
        recorded = _flash_recorded.recorded_speed(asked)
        long = [point for point in recorded.found.points if point.length >= 2048]
        assert {"standard", "torch-math", "torch-flash"} <= {point.backend for point in long}
        for point in long:
            held = _flash_cost.held_bytes(recorded.params, point.backend, point.length, on_gpu=True)
            assert held == pytest.approx(point.peak_bytes, rel=0.1), (point.backend, point.length)

    @pytest.mark.parametrize("asked", RECORDED)
    def test_no_recorded_kernel_without_the_matrix_beats_the_model(self, asked):
        recorded = _flash_recorded.recorded_speed(asked)
        params, peaks = recorded.params, recorded.found.peaks
        assert (params.causal, params.head_dim, params.direction) == (asked.causal, asked.head_dim, asked.direction)
        flash = [point for point in recorded.found.points if _flash_cost.model_of(point.backend) == "flash"]
        assert len(flash) >= 5 * len(params.lengths)
        for point in flash:
            least = _flash_cost.least_ms(params, "flash", point.length, peaks)
            assert point.median_ms >= 0.95 * least, (point.backend, point.length)
        nearest = min(point.median_ms / _flash_cost.least_ms(params, "flash", point.length, peaks) for point in flash)
        assert nearest < 1.6  # it is not met by saying little

    @pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_flash_attention_is_counted_to_move_every_tensor_once(self, causal, dtype, size):
        shape = {"heads": 2, "batch": 3, "head_dim": 16, "dtype": dtype, "causal": causal}
        tensor, statistics = 2 * 3 * 512 * 16 * size, 2 * 3 * 512 * 4

        def moved(direction):
            return _flash_cost.moved_bytes(flash_speed.Params(**shape, direction=direction), "flash", 512)

        assert moved("forward") == 4 * tensor + statistics  # Q, K, V, O
        assert moved("backward") == 8 * tensor + statistics  # those, dO, dQ, dK, dV
        assert moved("forward and backward") == moved("forward") + moved("backward")

    @pytest.mark.parametrize("direction", ["forward", "backward", "forward and backward"])
    def test_predicted_lines_have_the_growth_that_the_lab_is_about(self, direction):
        standard, flash = flash_speed.predict(flash_speed.Params(max_length=65536, direction=direction))
        assert (standard.name, flash.name) == ("standard", "flash")
        assert np.isnan(standard.ms).all()
        assert standard.peak_bytes[-1] / standard.peak_bytes[-2] == pytest.approx(4, rel=0.02)
        np.testing.assert_allclose(flash.peak_bytes[1:] / flash.peak_bytes[:-1], 2)

    @pytest.mark.parametrize(
        ("share", "dtype", "on_gpu", "said"),
        [
            (0.5, "float32", False, "50% of what a large product reaches"),
            (1.4, "float32", False, "other work held that product up"),
            (1.4, "bfloat16", True, "other work held that product up"),
            (1.4, "float32", True, "tensor cores"),
        ],
    )
    def test_without_standard_attention_the_fastest_is_held_against_the_peak(self, share, dtype, on_gpu, said):
        point = flash_speed.Point("flex", "flex", 512, 1, 1.0, 1.0, 1.0, 5, 1, 1, 0.1, 1.0, share)
        why = _flash.why_above_peak(dtype, on_gpu=on_gpu)
        assert said in flash_speed.describe_points((point,), (), why)

    @pytest.mark.parametrize("direction", ["forward", "forward and backward"])
    def test_what_flash_attention_would_choose_is_the_fastest_that_is_correct(self, direction, monkeypatch):
        def times(function, device, *, dtype, shape, runs):
            name = next(calls)
            return measure.Evidence(
                1.0 if name == "torch-math" else 2.0, 0.5, 3.0, runs, "none", device, str(dtype), shape, {}
            )

        def slightly_wrong(Q, K, V, causal, scale):
            return BACKENDS["torch-flash"].kernel(Q, K, V, causal, 1.1 * scale)

        params = flash_speed.Params(**SMALL, direction=direction)
        monkeypatch.setattr(_flash_sweep, "measure_peaks", lambda *_: _flash.Peaks(1e12, 1e11, ()))
        monkeypatch.setattr(measure, "measure_time", times)
        calls = itertools.cycle(CPU)
        label = BACKENDS["torch-math"].label
        assert f"it would take {label}" in flash_speed.run(params, LocalJob()).sentence
        monkeypatch.setitem(BACKENDS, "torch-math", broken("torch-math", kernel=slightly_wrong))
        calls = itertools.cycle(CPU)
        said = flash_speed.run(params, LocalJob()).sentence
        assert f"it would take {BACKENDS['standard'].label}" in said
        assert f"{label} is faster, but errs more than that" in said
        assert "if errors are what they are at 128 tokens" in said

    @pytest.mark.parametrize(
        ("wrong", "said"), [(1, "A is faster, but errs more"), (2, "A and B are faster, but err more")]
    )
    def test_who_is_faster_but_wrong_is_named(self, wrong, said):
        points = tuple(
            flash_speed.Point(name, name, 256, 1, ms, ms, ms, 5, 1, 1, 0.1, 1.0, 0.5)
            for ms, name in enumerate(("A", "B", "C"), 1)
        )
        correct = {point.backend for point in points[wrong:]}
        words = flash_speed.describe_choice(flash_speed.Params(max_length=256), points, correct)
        assert f"would take {points[wrong].label}" in words
        assert said in words
        assert "faster, but" not in flash_speed.describe_choice(flash_speed.Params(), points, {"A"})

    @pytest.mark.parametrize(
        ("direction", "dtype", "on_gpu", "chooses"),
        [
            ("forward", "float32", False, True),
            ("forward and backward", "bfloat16", True, True),
            ("forward", "float32", True, False),
            ("backward", "bfloat16", True, False),
            ("backward", "float32", False, False),
        ],
    )
    def test_a_choice_is_told_only_of_what_flash_attention_ranks(self, direction, dtype, on_gpu, chooses):
        assert flash_speed.chooses(flash_speed.Params(direction=direction, dtype=dtype), on_gpu=on_gpu) is chooses

    def test_of_the_backward_pass_alone_no_choice_is_told(self):
        found = flash_speed.run(flash_speed.Params(**SMALL, direction="backward"), LocalJob())
        assert found.ended == "finished"
        assert "FlashAttention takes" not in found.sentence

    @pytest.mark.parametrize(
        ("device", "seconds", "begun"), [("cpu", 10.0, True), ("cuda:0", 3.0, True), ("cuda:0", 4.0, False)]
    )
    def test_every_call_of_a_point_counts_towards_its_time(self, device, seconds, begun):
        params = flash_speed.Params(**SMALL)
        sweep = _flash_sweep.Sweep(params, LocalJob("cpu"), _flash.Peaks(1e15, 1e15, ()), weigh=True)
        sweep._job = LocalJob(device)
        sweep._last["standard"] = _flash_sweep.Timing(256, 1.0, seconds)
        stop = sweep._too_long(BACKENDS["standard"], 256)
        assert (stop is None) is begun

    @pytest.mark.parametrize("overhead", [0.0, 0.3])
    def test_the_share_of_time_is_true_where_time_grows_as_the_work_does(self, overhead, monkeypatch):
        params = flash_speed.Params(**SMALL | {"max_length": 2048})
        clock, seen = [0.0], []
        monkeypatch.setattr(_flash_sweep.time, "perf_counter", lambda: clock[0])

        def measured(sweep, backend, length):
            slowness = 1 + CPU.index(backend.name)
            run = slowness * _flash_cost.flops(params, length) / 1e9
            clock[0] += overhead + (params.runs + 4) * run
            return _flash_sweep.Measured(backend, length, SimpleNamespace(median_ms=1e3 * run), 0)

        monkeypatch.setattr(_flash_sweep.Sweep, "_measure", measured)
        sweep = _flash_sweep.Sweep(params, LocalJob(), _flash.Peaks(1e15, 1e15, ()), weigh=False)
        for found in sweep:
            told = sweep.share_of_time().get("share_of_time")
            assert (told is None) == (found.length == 128)
            seen.append((clock[0], told))
        for elapsed, told in seen:
            assert told is None or told == pytest.approx(elapsed / clock[0])
        assert seen[-1][1] == 1.0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_inputs_are_drawn_in_their_own_format(self, dtype, monkeypatch):
        drawn = []
        monkeypatch.setattr(measure, "measure_time", lambda *arguments, **words: drawn.append(words["dtype"]))
        params = flash_speed.Params(**SMALL, dtype=str(dtype).removeprefix("torch."), direction="backward")
        sweep = _flash_sweep.Sweep(params, LocalJob(), _flash.Peaks(1.0, 1.0, ()), weigh=False)
        held = measure.peak_memory(lambda: sweep._draw(1024), "cpu")
        assert held == _flash_cost.input_bytes(params, 1024)

    def test_a_spread_that_overlaps_is_no_difference(self):
        def point(backend, low, median, high, peak):
            return flash_speed.Point(backend, backend, 512, 1, median, low, high, 5, peak, peak, 0.1, 1.0, 0.5)

        near = flash_speed.describe_points((point("standard", 1, 2, 3, 40), point("flex", 0.5, 1.5, 2.5, 10)), (), "")
        assert "no difference" in near
        apart = flash_speed.describe_points((point("standard", 2, 3, 4, 40), point("flex", 0.9, 1, 1.1, 10)), (), "")
        assert "3.0 times as long" in apart
        assert "4 times as much" in apart
        matrix = flash_speed.describe_points(
            (
                point("standard", 2, 3, 4, 40),
                point("torch-math", 0.1, 0.2, 0.3, 50),
                point("flex", 0.9, 1, 1.1, 10),
            ),
            (),
            "",
        )
        assert "3.0 times as long" in matrix
        slower = flash_speed.describe_points((point("standard", 0.9, 1, 1.1, 40), point("flex", 2, 3, 4, 10)), (), "")
        assert "3.0 times faster" in slower


class TestRoofline:
    def test_points_lie_where_flops_and_bytes_put_them(self):
        params = flash_roofline.Params(**SMALL)
        found = flash_roofline.run(params, LocalJob())
        paths = flash_roofline.predict_paths(params)
        assert found.peaks.ridge == pytest.approx(found.peaks.flops / found.peaks.bandwidth)
        for point in found.points:
            assert point.intensity == pytest.approx(point.flops / point.moved_bytes)
            assert point.roof == pytest.approx(min(found.peaks.flops, point.intensity * found.peaks.bandwidth))
            path = next(path for path in paths if path.name == point.model)
            assert point.intensity == pytest.approx(path.intensity[list(path.lengths).index(point.length)])
        assert {point.model for point in found.points if point.backend == "torch-flash"} == {"flash"}
        assert "main memory" in found.memory
        weigh(found)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_flash_attention_moves_right_and_standard_attention_stays(self, head_dim):
        standard, flash = flash_roofline.predict_paths(flash_roofline.Params(max_length=65536, head_dim=head_dim))
        assert flash.intensity[-1] > 3.5 * flash.intensity[0]
        assert standard.intensity[-1] < 2 * standard.intensity[0]
        assert (flash.intensity > standard.intensity).all()

    @pytest.mark.parametrize("head_dim", [64, 256])
    @pytest.mark.parametrize("causal", [False, True])
    def test_how_far_each_moves_is_said_in_figures(self, head_dim, causal):
        paths = flash_roofline.predict_paths(
            flash_roofline.Params(max_length=8192, head_dim=head_dim, causal=causal, dtype="bfloat16")
        )
        said = flash_roofline.describe_paths(paths)
        for path in paths:
            factor = path.intensity[-1] / path.intensity[0]
            first, last = (flash_roofline.intensity_in_words(path.intensity[place]) for place in (0, -1))
            assert f"{path.label} from {first} to {last} (× {factor:.1f})" in said
        assert "from 128 to 8,192 tokens" in said

    @pytest.mark.parametrize(
        ("share", "model", "dtype", "on_gpu", "said"),
        [
            (0.02, "standard", "bfloat16", True, "far from it, so something else is the limit"),
            (0.6, "standard", "bfloat16", True, "reaches 60% of it"),
            (1.04, "standard", "bfloat16", True, "reaches 104% of it"),
            (1.5, "standard", "float32", False, "caches serve what is counted as memory"),
            (1.5, "flash", "float32", False, "other work held that product up"),
            (1.5, "flash", "float32", True, "tensor cores"),
        ],
    )
    def test_a_limit_is_claimed_only_of_what_comes_near_it(self, share, model, dtype, on_gpu, said):
        params = flash_roofline.Params(max_length=256, dtype=dtype)
        peaks = _flash.Peaks(1e12, 1e11, ())
        intensity = 1.0 if model == "standard" else 100.0
        roof = min(1e12, intensity * 1e11)
        reached = share * roof
        point = flash_roofline.Point(
            "b", "B", model, 256, 1, 1.0, 1.0, intensity, reached, 0.9 * reached, reached, roof
        )
        words = flash_roofline._describe(params, peaks, (point,), on_gpu=on_gpu)
        assert said in words
        assert ("would be the limit" in words) is (share < 1.05)
        assert ("the count does not hold on this device" in words) is (share > 1.05)
        assert ("something else" in words) is (share < 0.3)

    @pytest.mark.parametrize(
        ("intensity", "limit"), [(9.0, "where memory and not arithmetic"), (11.0, "where arithmetic and not memory")]
    )
    def test_which_of_both_is_the_limit_turns_at_the_ridge(self, intensity, limit):
        peaks = _flash.Peaks(1e12, 1e11, ())
        roof = min(1e12, intensity * 1e11)
        point = flash_roofline.Point("b", "B", "flash", 256, 1, 1.0, 1.0, intensity, roof / 2, roof / 2, roof / 2, roof)
        assert f"{limit} would be the limit" in flash_roofline._describe(
            flash_roofline.Params(), peaks, (point,), on_gpu=True
        )

    @pytest.mark.parametrize("asked", RECORDED)
    def test_on_the_recorded_gpu_the_matrix_is_held_up_by_memory_and_flash_attention_by_arithmetic(self, asked):
        found = _flash_recorded.recorded_roofline(asked).found
        standard, flash = found.sentence.split("At 16,384 tokens ")[1:]
        assert standard.startswith("standard attention")
        assert "where memory and not arithmetic would be the limit" in standard
        assert flash.startswith("flash attention")
        assert "where arithmetic and not memory would be the limit" in flash
        assert "far from it" not in flash
        for point in found.points:
            if point.model == "flash":
                assert point.flops_per_second <= _flash_cost.ABOVE * point.roof, (point.backend, point.length)

    @pytest.mark.parametrize(
        ("causal", "passes"), [(True, "passes over the matrix such as the mask's."), (False, "passes over the matrix.")]
    )
    def test_passes_that_are_not_counted_are_named_for_what_holds_the_matrix(self, causal, passes):
        params, peaks = flash_roofline.Params(causal=causal), _flash.Peaks(1e12, 1e11, ())

        def words(model):
            point = flash_roofline.Point("b", "B", model, 256, 1, 1.0, 1.0, 1.0, 1e9, 1e9, 1e9, 1e11)
            return flash_roofline._describe(params, peaks, (point,), on_gpu=True)

        assert passes in words("standard")
        assert "passes over the matrix" not in words("flash")

    def test_half_as_many_bytes_a_number_double_the_intensity(self):
        whole, half = (
            flash_roofline.predict_paths(flash_roofline.Params(dtype=dtype))[0].intensity
            for dtype in ("float32", "bfloat16")
        )
        np.testing.assert_allclose(half, 2 * whole)


class TestTiles:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("length", "block_q", "block_k"), [(16, 4, 4), (13, 5, 3), (8, 8, 1), (5, 64, 64)])
    def test_the_followed_row_ends_at_standard_attention(self, length, block_q, block_k, causal, seed):
        for row in (0, length // 2, length - 1):
            params = flash_tiles.Params(
                length=length, block_q=block_q, block_k=block_k, causal=causal, seed=seed, row=row
            )
            found = flash_tiles.run(params, LocalJob())
            np.testing.assert_allclose(found.row_output, found.row_reference, atol=1e-5)
            assert found.difference < 1e-14
            steps = len(found.row_steps)
            assert found.row_scores.shape == found.row_probabilities.shape == (steps, found.block_k)
            assert len(found.query_block) == found.grid[0] * found.grid[1]
            assert (found.query_block[found.row_steps] == row // found.block_q).all()
            weigh(found)

    @pytest.mark.parametrize("causal", [False, True])
    def test_each_step_is_the_arithmetic_that_the_page_writes_out(self, causal):
        found = flash_tiles.run(flash_tiles.Params(causal=causal, row=9), LocalJob())
        shown = ~found.skipped[found.row_steps]
        scores = np.where(np.isnan(found.row_scores), -np.inf, found.row_scores)
        maximum = np.maximum(found.maximum_before, scores.max(1))
        np.testing.assert_allclose(found.maximum, maximum)
        np.testing.assert_allclose(found.rescale[shown], np.exp(found.maximum_before - maximum)[shown], rtol=1e-5)
        added = np.nansum(found.row_probabilities, 1)
        np.testing.assert_allclose(found.sum, found.rescale * found.sum_before + added, rtol=1e-5)
        np.testing.assert_array_equal(found.sum_before[1:], found.sum[:-1])
        np.testing.assert_array_equal(found.output_before[1:], found.output[:-1])
        np.testing.assert_allclose(found.row_output, found.output[-1] / found.sum[-1], rtol=1e-5)
        assert found.logsumexp == pytest.approx(found.maximum[-1] + np.log(found.sum[-1]), rel=1e-5)

    def test_what_the_mask_hides_is_skipped_and_not_read(self):
        found = flash_tiles.run(flash_tiles.Params(), LocalJob())
        np.testing.assert_array_equal(found.skipped, found.key_block > found.query_block)
        np.testing.assert_array_equal(found.partial, found.key_block == found.query_block)
        assert (np.diff(found.bytes_read)[found.skipped[1:]] == 0).all()
        assert found.flash_bytes == found.bytes_read[-1] + found.bytes_written[-1]
        whole = flash_tiles.run(flash_tiles.Params(causal=False), LocalJob())
        assert not whole.skipped.any()
        assert whole.flash_bytes > found.flash_bytes

    def test_more_on_chip_memory_makes_larger_tiles_and_moves_less(self):
        small, large = (flash_tiles.run(flash_tiles.Params(length=64, on_chip=size), LocalJob()) for size in (0.5, 4.0))
        assert small.block_q < large.block_q
        assert small.flash_bytes > large.flash_bytes

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("length", "head_dim"), [(16, 8), (64, 8), (64, 32)])
    def test_bytes_fall_with_on_chip_memory_and_the_theorem_falls_beside_them(self, length, head_dim, causal):
        params = flash_tiles.Params(length=length, head_dim=head_dim, causal=causal)
        curve = flash_tiles.predict_traffic(params)
        assert (np.diff(curve.counted) <= 0).all()
        np.testing.assert_allclose(curve.theorem[1:] / curve.theorem[:-1], 0.5)
        size = next(int(size) for size in curve.on_chip if size >= 128)
        found = flash_tiles.run(params.model_copy(update={"on_chip": size / 1024}), LocalJob())
        assert found.flash_bytes == curve.counted[list(curve.on_chip).index(size)]
        assert found.standard_bytes == curve.standard
        assert f"{curve.counted[0] / curve.counted[-1]:.1f} times" in curve.sentence

    def test_tiles_of_one_row_are_said_to_move_more(self):
        found = flash_tiles.run(flash_tiles.Params(block_q=1), LocalJob())
        assert found.flash_bytes > found.standard_bytes
        assert "times more than standard" in found.sentence


class TestOnline:
    @pytest.mark.parametrize("chunk", [1, 3, 64])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_online_is_right_where_the_naive_one_overflows(self, chunk, dtype, seed):
        params = flash_online.Params(scores="random", length=20, factor=100, chunk=chunk, dtype=dtype, seed=seed)
        found = flash_online.run(params, LocalJob())
        epsilon = torch.finfo(getattr(torch, dtype)).eps
        assert found.online_error < 20 * epsilon
        assert found.reference.sum() == pytest.approx(1)
        overflows = found.scores > found.exp_limit
        assert overflows.any()
        assert set(found.overflowed) == set(np.flatnonzero(overflows))
        assert np.isnan(found.naive_error)
        assert "fails" in found.sentence
        assert found.chunks[-1].stop == 20
        assert found.chunks[-1].maximum == found.scores.max()
        weigh(found)

    def test_small_scores_agree_three_ways(self):
        found = flash_online.run(flash_online.Params(factor=1), LocalJob())
        assert not found.overflowed
        np.testing.assert_allclose(found.naive, found.reference, atol=1e-3)
        np.testing.assert_allclose(found.online, found.reference, atol=1e-3)
        assert "Nothing overflows" in found.sentence

    @pytest.mark.parametrize(("scores", "why"), [("11 11 11", "sum is infinite"), ("-30 -40", "0 / 0")])
    def test_the_other_two_ways_to_fail_are_told(self, scores, why):
        found = flash_online.run(flash_online.Params(scores=scores, factor=1), LocalJob())
        assert found.overflowed == ()
        assert why in found.sentence
        assert found.online_error < 1e-3

    def test_each_chunk_is_the_arithmetic_that_the_page_writes_out(self):
        found = flash_online.run(flash_online.Params(dtype="float32"), LocalJob())
        for chunk in found.chunks:
            scores = found.scores[chunk.start : chunk.stop]
            assert chunk.maximum == max(chunk.maximum_before, scores.max())
            assert chunk.rescale == pytest.approx(np.exp(chunk.maximum_before - chunk.maximum))
            assert chunk.sum == pytest.approx(chunk.rescale * chunk.sum_before + np.exp(scores - chunk.maximum).sum())


class TestAccuracy:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_errors_are_the_formats_own_and_within_the_bound(self, dtype, seed):
        params = flash_accuracy.Params(length=96, heads=2, dtype=dtype, seed=seed, backends=CPU)
        found = flash_accuracy.run(params, LocalJob())
        assert [error.backend for error in found.errors] == list(CPU)
        epsilon = torch.finfo(getattr(torch, dtype)).eps
        for error in found.errors:
            assert error.histogram.sum() == pytest.approx(1)
            assert 0.01 * epsilon < error.rms < 4 * epsilon
            assert error.rms <= error.maximum
            assert error.within_bound
            assert error.ratio == pytest.approx(error.rms / found.errors[0].rms)
        assert found.bound == 2 * found.errors[0].rms
        assert "costs no exactness" in found.sentence
        weigh(found)

    def test_precisions_err_more_the_fewer_bits_they_have(self):
        found = flash_accuracy.run(flash_accuracy.Params(length=64, backends=CPU), LocalJob())
        assert [precision.name for precision in found.precisions] == ["float32", "float16", "bfloat16"]
        errors = [precision.rms for precision in found.precisions]
        assert errors == sorted(errors)
        assert 4 < errors[2] / errors[1] < 16  # three bits apart

    def test_on_a_gpu_flash_attention_stands_among_the_formats(self):
        params = flash_accuracy.Params(length=64)
        inputs = [torch.randn(1, 4, 64, 64) for _ in range(3)]
        names = [one.name for one in flash_accuracy._precisions(params, inputs, "cuda:0")]
        assert names == ["float32", "FlashAttention, exact", "TF32", "FlashAttention, fast", "float16", "bfloat16"]

    def test_a_backend_that_is_wrong_is_caught(self, monkeypatch):
        def slightly_wrong(Q, K, V, causal, scale):
            return BACKENDS["torch-math"].kernel(Q, K, V, causal, 1.1 * scale)

        monkeypatch.setitem(BACKENDS, "torch-flash", broken("torch-flash", kernel=slightly_wrong))
        found = flash_accuracy.run(flash_accuracy.Params(length=64, backends=CPU), LocalJob())
        assert [error.within_bound for error in found.errors] == [True, True, False]
        assert f"More than twice standard attention's error: {BACKENDS['torch-flash'].label}" in found.sentence

    def test_a_backend_that_fails_is_named_and_the_others_are_compared(self, monkeypatch):
        monkeypatch.setitem(BACKENDS, "torch-math", broken("torch-math", kernel=fails))
        found = flash_accuracy.run(flash_accuracy.Params(length=64, backends=CPU), LocalJob())
        assert list(found.failed) == [BACKENDS["torch-math"].label]
        assert [error.backend for error in found.errors] == ["standard", "torch-flash"]


class TestDecode:
    def test_every_way_reads_every_cache(self):
        shown = []
        found = flash_decode.run(flash_decode.Params(**CACHE), LocalJob(on_show=shown.append))
        ways = [*CPU, "whole", "split"]
        assert [(point.length, point.backend) for point in found.points] == [(T, w) for T in (1024, 2048) for w in ways]
        assert len(shown) == found.total == 10
        for point in found.points:
            assert point.cache_bytes == 2 * 2 * point.length * 64 * 4
            assert point.bandwidth == pytest.approx(point.cache_bytes / point.median_ms * 1e3)
        assert "2,048 tokens" in found.sentence
        weigh(found)

    @pytest.mark.parametrize(
        ("on_gpu", "said"), [(True, "reading alone is faster than copying"), (False, "own caches")]
    )
    def test_more_than_a_copy_has_a_reason_of_the_device(self, on_gpu, said):
        def words(share):
            point = flash_decode.Point("flex", "Flex", 1024, 1.0, 0.9, 1.1, 5, 2**20, 1e9, share)
            return flash_decode.describe_points(flash_decode.Params(), (point,), on_gpu=on_gpu)

        assert said in words(1.03)
        assert said not in words(0.9)

    @pytest.mark.parametrize("splits", [1, 5, 64])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_the_merge_is_exact_and_its_shares_are_the_weights_of_the_parts(self, splits, seed):
        params = flash_decode.Params(**CACHE, splits=splits, seed=seed)
        merged = flash_decode._merge(params, "cpu")
        Q, K, V = (tensor.double() for tensor in _flash_cache.draw_cache(params, 1024, "cpu"))
        _, weights = attend(Q, K, V)
        starts = [*merged.starts, merged.length]
        expected = [weights[0, 0, 0, a:b].sum().item() for a, b in itertools.pairwise(starts)]
        np.testing.assert_allclose(merged.share, expected, atol=1e-12)
        assert merged.difference < 1e-13

    def test_one_part_is_not_measured_twice(self):
        params = flash_decode.Params(**CACHE | {"max_length": 1024}, splits=1)
        assert [point.backend for point in flash_decode.run(params, LocalJob()).points] == [*CPU, "split"]

    def test_what_is_stopped_keeps_its_points(self):
        found = flash_decode.run(flash_decode.Params(**CACHE), stop_after(3))
        assert (found.ended, len(found.points)) == ("cancelled", 3)
        assert "after 3 of 10 points" in found.ending

    def test_a_backend_that_fails_is_named_and_the_others_go_on(self, monkeypatch):
        monkeypatch.setitem(BACKENDS, "torch-flash", broken("torch-flash", kernel=fails))
        found = flash_decode.run(flash_decode.Params(**CACHE), LocalJob())
        assert [(stop.backend, stop.kind) for stop in found.stops] == [("torch-flash", "failed")]
        assert found.total == len(found.points) + 1 == 9

    def test_a_cache_that_does_not_fit_is_refused_with_the_largest_that_does(self, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda device: 2**23)
        with pytest.raises(DoesNotFitError, match=r"A cache of 262,144 tokens takes 0.3 GB, .* fits is 4,096 tokens"):
            flash_decode.run(flash_decode.Params(max_length=2**18), LocalJob())
        monkeypatch.setattr(memory, "free", lambda device: 10_000)
        with pytest.raises(DoesNotFitError, match="none fits"):
            flash_decode.run(flash_decode.Params(), LocalJob())

    def test_what_repeats_the_cache_ends_earlier(self, monkeypatch):
        params = flash_decode.Params(**CACHE)
        monkeypatch.setattr(memory, "free", lambda device: 3.2 * flash_decode._needed(params, 2048))
        found = flash_decode.run(params, LocalJob())
        assert [(stop.backend, stop.length, stop.kind) for stop in found.stops] == [("standard", 2048, "memory")]
        assert "repeats the cache" in found.stops[0].reason


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"causal": False, "length": 33},
        {"dtype": "bfloat16", "head_dim": 128},
        {"dtype": "float16", "block_q": 7, "block_k": 100, "seed": 3},
        {"length": 16, "head_dim": 16, "heads": 1, "block_k": 1},
    ],
)
def test_every_property_holds(values):
    found = flash_tests.run(flash_tests.Params(**values), LocalJob())
    assert not [check for check in found.checks if not check.passed]
    assert len(found.checks) >= 5 + 2 * len(CPU)
    assert BACKENDS["triton"].label in found.absent


def test_a_backend_that_looks_ahead_or_fails_is_red(monkeypatch):
    def looks_ahead(Q, K, V, causal, scale):
        return BACKENDS["torch-math"].kernel(Q, K, V, False, scale)

    monkeypatch.setitem(BACKENDS, "torch-flash", broken("torch-flash", kernel=looks_ahead))
    monkeypatch.setitem(BACKENDS, "triton", broken("triton", why_not=lambda case: None, kernel=fails))
    checks = flash_tests.run(flash_tests.Params(length=64), LocalJob()).checks
    red = {check.name for check in checks if not check.passed}
    assert {f"{BACKENDS['torch-flash'].label}: no looking ahead", f"{BACKENDS['triton'].label}: runs"} <= red


@pytest.mark.parametrize("module", [flash_speed, flash_roofline, flash_decode])
def test_what_crosses_to_the_web_process_is_plain(module):
    job = LocalJob(on_show=lambda draft: pickle.loads(pickle.dumps(draft)))
    values = {"max_length": 1024, "runs": 3, "backends": ("torch-flash",)}
    result = pickle.dumps(module.run(module.Params(**values), job))
    assert b"torch._" not in result
    assert b"engine.measure" not in result
    assert "torch" in sys.modules


@pytest.mark.gpu
@pytest.mark.timeout(600)  # a sweep waits while another process measures
class TestOnGpu:
    @pytest.mark.parametrize("direction", ["forward", "forward and backward"])
    def test_standard_attention_ends_and_flash_goes_on(self, direction):
        params = flash_speed.Params(max_length=65536, heads=16, dtype="bfloat16", direction=direction, runs=3)
        found = flash_speed.run(params, LocalJob("cuda:0"))
        ends = {stop.backend: stop for stop in found.stops}
        assert ends["standard"].kind == ends["torch-math"].kind == "memory"
        assert ends["standard"].needed_bytes > _flash_cost.SAFE * ends["standard"].free_bytes
        assert max(point.length for point in found.points if point.backend == "torch-flash") == 65536
        for point in found.points:
            if point.backend in ("standard", "torch-math"):
                assert point.peak_bytes <= 1.2 * point.predicted_bytes + 2**26

    @pytest.mark.parametrize("direction", ["backward", "forward and backward"])
    def test_every_backend_has_a_timed_backward_pass(self, direction):
        params = flash_speed.Params(max_length=512, dtype="bfloat16", direction=direction, runs=3)
        found = flash_speed.run(params, LocalJob("cuda:0"))
        assert [stop for stop in found.stops if stop.kind == "failed"] == []

    def test_accuracy_and_checks_hold(self):
        found = flash_accuracy.run(flash_accuracy.Params(), LocalJob("cuda:0"))
        assert all(error.within_bound for error in found.errors)
        errors = {precision.name: precision.rms for precision in found.precisions}
        assert errors["FlashAttention, exact"] < 2 * errors["float32"] + 1e-6
        assert errors["FlashAttention, fast"] < 2 * errors["TF32"]
        assert errors["FlashAttention, fast"] < errors["float16"]
        checks = flash_tests.run(flash_tests.Params(dtype="bfloat16"), LocalJob("cuda:0")).checks
        assert not [check for check in checks if not check.passed]
