"""What was recorded on a GPU is what the page says of it, and agrees with its own arithmetic."""

import pytest

from engine.experiments import flash_decode, flash_roofline, flash_speed
from engine.experiments._flash import why_above_peak
from engine.experiments._flash_cost import flops
from engine.experiments._flash_recorded import (
    recorded_decode,
    recorded_precisions,
    recorded_roofline,
    recorded_speed,
)

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
    assert recorded.found.sentence.startswith(said)


def test_what_the_recording_is_there_to_show():
    """On a GPU the matrix costs both time and memory, and our own kernel is as fast as PyTorch's."""
    for causal in (False, True):
        found = recorded_speed(flash_speed.Params(causal=causal)).found
        longest = {point.backend: point for point in found.points if point.length == 16384}
        standard, flash, ours = (longest[name] for name in ("standard", "flash-attn-4", "triton"))
        assert standard.median_ms > 4 * flash.median_ms
        assert standard.peak_bytes > 100 * flash.peak_bytes
        assert ours.tflops > 0.6 * longest["torch-flash"].tflops


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
