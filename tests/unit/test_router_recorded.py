"""What was recorded of a mixture of experts on a GPU agrees with its own arithmetic, and with what is said of it."""

import json

import pytest
import torch
from torch.nn import functional as F

from engine.experiments import _router_recorded
from engine.experiments._router_recorded import OURS, TARGET, recorded_layer
from engine.moe.feed_forward import MoEFeedForward
from tests.benchmarks import moe_feed_forward

DIRECTIONS = ("forward", "forward and backward")


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Puts another record in the place of the recorded one; None takes it away."""

    def put(log):
        path = tmp_path / "record.json"
        if log is not None:
            path.write_text(json.dumps(log), encoding="utf-8")
        monkeypatch.setattr(_router_recorded, "_RECORD", path)
        recorded_layer.cache_clear()

    yield put
    recorded_layer.cache_clear()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_speeds_are_the_work_over_the_time(direction):
    recorded = recorded_layer(direction)
    size = recorded.params
    work = 2 * size.num_tokens * size.top_k * 3 * size.d_model * size.ffn_dim * (1 if direction == "forward" else 3)
    assert {way.load for way in recorded.found.ways} == {"even", "uneven"}
    for way in recorded.found.ways:
        assert way.tflops == pytest.approx(work / way.median_ms / 1e9)
        assert way.low_ms <= way.median_ms <= way.high_ms
        assert way.tflops * 1e12 < recorded.found.peak_flops
    assert recorded.found.busiest["uneven"] > 2 > recorded.found.busiest["even"] >= 1
    assert {"torch", "cuda"} <= recorded.found.versions.keys()


def test_ours_reaches_its_target():
    assert moe_feed_forward.TARGET == TARGET
    assert recorded_layer("forward").found.way(OURS).tflops >= TARGET


def test_without_a_record_there_is_none(record):
    record(None)
    assert recorded_layer("forward") is None


def test_a_way_that_failed_and_a_direction_that_was_left_out_are_not_there(record):
    log = json.loads(_router_recorded._RECORD.read_text(encoding="utf-8"))
    (run,) = log["runs"]
    run["tables"] = [table for table in run["tables"] if table["direction"] == "forward"]
    del run["tables"][0]["rows"]["padded batch, our rows"]
    record(log)
    assert recorded_layer("forward").found.way("padded batch, our rows") is None
    assert recorded_layer("forward").found.way("padded batch, our rows", "uneven") is not None
    assert recorded_layer("forward and backward") is None


@pytest.mark.parametrize("seed", range(3))
def test_transformers_block_errs_where_its_rounded_logits_choose_other_experts(seed):
    """What the page says of its error: of tokens with the same experts it is hardly larger than ours."""
    torch.manual_seed(seed)
    layer = MoEFeedForward(1024, 64, 16, 2).to(torch.bfloat16)
    block = moe_feed_forward.transformers_block(layer, "eager")
    x = torch.randn(1, 2048, 1024).to(torch.bfloat16)
    exact = moe_feed_forward.reference(layer, x, torch.zeros_like(x))[0][0]  # (N, D)
    with torch.no_grad():
        ours, theirs, routing = layer(x)[0], block(x)[0], layer.router.route(x)
        _, _, chosen = block.gate(x)
    elsewhere = (F.one_hot(chosen, 16).sum(1).bool() != (routing.dense_gates() != 0)).any(1)  # (N,)
    assert 0 < elsewhere.float().mean() < 0.02
    error, same = moe_feed_forward.apart, ~elsewhere
    assert error(theirs, exact) > 4 * error(ours, exact)
    assert error(theirs[same], exact[same]) < 1.5 * error(ours[same], exact[same])
