"""The FlashAttention lab in Streamlit's own test harness, on the real runtime, with short sequences."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from engine.experiments import _flash_cost, flash_online, flash_roofline, flash_speed, flash_tiles
from engine.experiments._flash import Peaks, Stop
from engine.experiments._flash_recorded import recorded_speed
from tests.ui.lab_pages import finished, words
from ui.flash import decode, predict, softmax, speed, tiles
from ui.flash.explore import VIEWS
from ui.flash.settings import ACCURACY, DECODE, ROOFLINE, SOFTMAX, SPEED, TILES
from ui.labs import FLASH

SHORT = {"max_length": "256", "heads": 2, "head_dim": 32, "backends": "standard"}
LABELS = {"standard": "Standard attention", "torch-flash": "PyTorch, flash"}


@pytest.fixture
def lab(open_page, monkeypatch, tmp_path):
    """Opens the lab, as a browser with this query string would."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return lambda **query: open_page(FLASH, query)


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


def drawn(app, key):
    return {trace.get("name"): trace for trace in spec(app, key)["data"]}


def numbers(values):
    """What a trace holds, whether Plotly sends it as a list or as Base64."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
    return np.array(values, dtype=float)


def metrics(app):
    return {metric.label: metric.value.replace("\u00a0", " ") for metric in app.metric}


def show(app, view):
    app.button_group(key="flash_view").set_value(view)
    return finished(app)


def point(backend, length, ms, share=0.2):
    return flash_speed.Point(
        backend, LABELS[backend], length, 1, ms, 0.9 * ms, 1.1 * ms, 5, 2**20 * length, 2**20 * length, ms, 0.5, share
    )


def measured(*points, stops=(), ended="finished", free=8 * 2**30):
    return flash_speed.Result(
        points=points,
        stops=stops,
        absent={"FlexAttention": "It needs an NVIDIA GPU."},
        predicted=_flash_cost.predict(flash_speed.Params(max_length=256)),
        total=len(points),
        peaks=Peaks(1e11, 2e10, ()),
        free_bytes=free,
        on_gpu=False,
        evidence=(),
        ended=ended,
        ending="Cancelled.",
        sentence="Told by the run.",
        device="here",
        versions={},
    )


class TestSpeedAndMemory:
    def test_memory_is_predicted_before_anything_runs(self, lab):
        app = lab()
        params = flash_speed.Params()
        for line in _flash_cost.predict(params):
            trace = drawn(app, "flash_forecast")[line.label]
            np.testing.assert_allclose(trace["y"], line.peak_bytes / 2**20)
            assert trace["line"]["dash"] == "dash"
        assert "Nothing has run yet: this is arithmetic" in words(app)
        assert not app.get("progress")

    @pytest.mark.parametrize(
        ("key", "value", "kind"),
        [
            ("max_length", 8192, "selectbox"),
            ("direction", "backward", "selectbox"),
            ("head_dim", 128, "slider"),
            ("dtype", "bfloat16", "selectbox"),
            ("heads", 16, "slider"),
            ("batch", 4, "slider"),
            ("tokens", "constant tokens", "selectbox"),
        ],
    )
    def test_every_control_changes_the_prediction(self, lab, key, value, kind):
        app = lab(batch=2)
        before = spec(app, "flash_forecast")["data"]
        getattr(app, kind)(key=f"flash_{key}").set_value(value)
        assert spec(finished(app), "flash_forecast")["data"] != before

    def test_it_measures_when_asked_to_and_keeps_the_points(self, lab):
        app = lab(**SHORT)
        app.button(key="_flash_speed_run_start").click()
        finished(app)
        line = drawn(app, "flash_speed")["Standard attention"]
        assert line["x"] == [128, 256]
        assert all(value > 0 for value in line["y"])
        assert "Measured on" in words(app)
        app.selectbox(key="flash_direction").set_value("backward")
        finished(app)
        assert "What you see was measured with other settings" in words(app)
        assert drawn(app, "flash_speed")["Standard attention"]["y"] == line["y"]
        app.button_group(key="flash_quantity").set_value(speed.SHARE)
        finished(app)
        assert spec(app, "flash_speed")["layout"]["yaxis"]["title"]["text"] == "% of the device's measured peak"
        app = show(show(app, SOFTMAX), SPEED)
        assert app.button_group(key="flash_quantity").value == speed.SHARE
        assert app.selectbox(key="flash_direction").value == "backward"

    def test_no_backend_is_refused_with_a_sentence(self, lab):
        app = lab()
        app.button_group(key="flash_backends").set_value([])
        finished(app)
        assert app.error
        assert "Traceback" not in words(app)

    def test_below_it_stands_what_a_gpu_gave_for_the_nearest_settings(self, lab):
        app = lab()
        before = drawn(app, "flash_speed_recorded")
        assert {"Standard attention", "FlashAttention-4", "Ours, in Triton"} <= set(before)
        assert all(
            trace.get("line", {}).get("dash") == "dash"
            for trace in spec(app, "flash_speed_recorded")["data"]
            if len(trace["x"]) > 1
        )
        assert any("Recorded on an NVIDIA H200" in caption.value and "64" in caption.value for caption in app.caption)
        app.toggle(key="flash_causal").set_value(False)
        finished(app)
        assert any("without a mask" in caption.value for caption in app.caption)
        assert drawn(app, "flash_speed_recorded") != before
        app.segmented_control(key="flash_quantity").set_value("% of peak")
        finished(app)
        assert "% of" in spec(app, "flash_speed_recorded")["layout"]["yaxis"]["title"]["text"]

    def test_nonsense_in_the_address_is_named(self, lab):
        app = lab(max_length="3000", head_dim="7")
        assert len(app.warning) == 2
        assert drawn(app, "flash_forecast")

    def test_standard_attention_ends_where_it_would_not_fit(self):
        stop = Stop("standard", "Standard attention", 256, "memory", "It needs 9 GiB.", 9 * 2**30, 8 * 2**30)
        found = measured(point("standard", 128, 2.0), point("torch-flash", 128, 1.0), stops=(stop,))
        upper, lower = speed.panels(found, speed.TIME)
        assert [(end.length, end.words, end.value) for end in upper.ends] == [(256, "out of memory", None)]
        assert [(end.length, end.value) for end in lower.ends] == [(256, 9 * 1024)]
        assert lower.limit == 8 * 1024

    def test_what_ran_out_of_memory_after_all_has_no_size_to_draw(self):
        stop = Stop("standard", "Standard attention", 256, "memory", "Out of memory.")
        upper, lower = speed.panels(measured(point("standard", 128, 2.0), stops=(stop,)), speed.TIME)
        assert (upper.ends, lower.ends, lower.limit) == ([], [], None)

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("direction", ["forward", "forward and backward"])
    def test_a_recording_has_no_end_of_zero_bytes(self, direction, head_dim):
        recorded = recorded_speed(flash_speed.Params(head_dim=head_dim, direction=direction))
        for panel in speed.panels(recorded.found, speed.TIME, recorded=True):
            assert all(end.value is None or end.value > 0 for end in panel.ends)
            assert "0 bytes" not in " ".join(end.words for end in panel.ends)

    def test_a_gpus_memory_is_predicted_as_a_gpus(self, lab, monkeypatch):
        monkeypatch.setattr(speed, "has_gpu", lambda: True)
        app = lab(direction="forward and backward")
        params = flash_speed.Params(direction="forward and backward")
        here, there = (_flash_cost.predict(params, on_gpu=on_gpu) for on_gpu in (False, True))
        for line, other in zip(there, here, strict=True):
            np.testing.assert_allclose(drawn(app, "flash_forecast")[line.label]["y"], line.peak_bytes / 2**20)
            assert line.peak_bytes[-1] > other.peak_bytes[-1]

    def test_what_is_drawn_is_time_speed_or_the_share_of_the_peak(self):
        found = measured(point("standard", 128, 2.0), point("standard", 256, 8.0))
        panels = {quantity: speed.panels(found, quantity)[0] for quantity in (speed.TIME, speed.RATE, speed.SHARE)}
        assert list(panels[speed.TIME].lines[0].values) == [2, 8]
        assert (panels[speed.RATE].title, list(panels[speed.RATE].lines[0].values)) == ("GFLOP/s", [500, 500])
        assert list(panels[speed.SHARE].lines[0].values) == pytest.approx([20, 20])
        assert panels[speed.SHARE].lines[0].low[0] == pytest.approx(20 / 1.1)

    def test_hovering_tells_ratio_spread_and_memory(self):
        slow, fast = point("standard", 128, 2.0), point("torch-flash", 128, 1.0)
        said = speed.hover(measured(slow, fast), fast)
        assert "2.00 times as fast as standard" in said
        assert "0.9 to 1.1 in 5 runs" in said
        assert "peak 128 MiB" in said
        assert "standard" not in speed.hover(measured(slow, fast), slow).replace("Standard", "")
        late = dataclasses.replace(fast, median_ms=4.0)
        assert "2.00 times slower than standard" in speed.hover(measured(slow, late), late)


class TestTiles:
    def test_it_opens_where_there_is_something_to_rescale(self, lab):
        app = lab(view=TILES)
        found = flash_tiles.run(flash_tiles.Params(), None)
        assert app.slider(key="flash_step").value == tiles.first_step(found) == 13
        place = list(found.row_steps).index(13)
        assert metrics(app)["Row 13: maximum m"] == f"{found.maximum[place]:.3f}".replace("-", "−")
        assert "factor on what is held" in words(app)
        assert f"= **{found.sum[place]:.3f}**" in words(app)

    def test_stepping_starts_no_job_and_moves_the_picture(self, lab):
        app = lab(view=TILES, step=0)
        asked = app.session_state["_run_flash_tiles_run"]
        assert "Row 13 has not been read yet" in words(app)
        states = [spec(app, "flash_grid")["data"][0]["z"]]
        for name in ("next", "last", "back", "first"):
            app.button(key=f"_flash_step_{name}").click()
            finished(app)
            states.append(spec(app, "flash_grid")["data"][0]["z"])
        assert [app.slider(key="flash_step").value, states[0]] == [0, states[4]]
        assert len({str(state) for state in states}) == 4
        assert app.session_state["_run_flash_tiles_run"] == asked

    def test_played_it_goes_on_by_itself_and_ends(self, lab):
        app = lab(view=TILES, step=14)
        app.button(key="_flash_step_play").click().run()
        assert app.button(key="_flash_step_play").label == "Pause"
        for _ in range(4):
            app.run()
        assert app.slider(key="flash_step").value == 16
        assert app.button(key="_flash_step_play").label == "Play"
        assert "All 16 tiles are done, 6 of them skipped" in words(app)

    def test_a_hand_on_the_slider_or_a_pause_stops_it(self, lab):
        app = lab(view=TILES, step=2)
        app.button(key="_flash_step_play").click().run()
        app.slider(key="flash_step").set_value(5).run()
        app.run()
        assert app.slider(key="flash_step").value == 5
        app.button(key="_flash_step_play").click().run()
        app.button(key="_flash_step_play").click().run()
        stopped = app.slider(key="flash_step").value
        app.run()
        assert app.slider(key="flash_step").value == stopped

    @pytest.mark.parametrize(
        ("key", "value"), [("length", 24), ("block_q", 8), ("block_k", 2), ("row", 3), ("head_dim", 4)]
    )
    def test_every_slider_changes_what_is_drawn(self, lab, key, value):
        app = lab(view=TILES, step=9)
        before = [spec(app, f"flash_{name}") for name in ("grid", "traffic", "row_output")]
        app.slider(key=f"flash_tiles_{key}").set_value(value)
        assert [spec(finished(app), f"flash_{name}") for name in ("grid", "traffic", "row_output")] != before

    def test_fewer_tiles_than_the_step_are_all_done(self, lab):
        app = lab(view=TILES, step=16)
        app.slider(key="flash_tiles_block_q").set_value(16)
        finished(app)
        assert app.slider(key="flash_step").value == 4

    def test_a_shorter_sequence_keeps_a_row_that_exists(self, lab):
        app = lab(view=TILES)
        app.slider(key="flash_tiles_length").set_value(8)
        finished(app)
        assert not app.error
        assert app.slider(key="flash_tiles_row").value == 7

    def test_on_chip_memory_decides_over_the_sliders_and_says_so(self, lab):
        app = lab(view=TILES, tiles_on_chip="0.5")
        assert "0.5 KiB on the chip hold tiles of" in words(app)

    def test_on_chip_memory_has_a_picture_with_the_theorem_in_it(self, lab):
        app = lab(view=TILES)
        before = drawn(app, "flash_on_chip")
        curve = flash_tiles.predict_traffic(flash_tiles.Params())
        assert numbers(before["counted"]["y"]).tolist() == curve.counted.tolist()
        assert numbers(before["theorem, T²d²/M"]["y"]).tolist() == curve.theorem.tolist()
        app.slider(key="flash_tiles_head_dim").set_value(4)
        assert drawn(finished(app), "flash_on_chip") != before

    def test_the_end_is_standard_attention(self, lab):
        app = lab(view=TILES, step=16)
        assert "nothing was approximated" in words(app)
        running, standard = spec(app, "flash_row_output")["data"]
        np.testing.assert_allclose(numbers(running["y"]), numbers(standard["y"]), atol=1e-5)


class TestOnlineSoftmax:
    def test_the_naive_one_overflows_and_the_online_one_does_not(self, lab):
        app = lab(view=SOFTMAX)
        assert metrics(app)["Naive, in float16"] == "no numbers"
        assert re.fullmatch(r"\d(\.\d)? × 10⁻[⁰¹²³⁴-⁹]+ off", metrics(app)["Online, in float16"])
        assert "naive: not a number" in drawn(app, "flash_softmax")

    @pytest.mark.parametrize(("dtype", "overflows"), [("float32", False), ("bfloat16", False), ("float16", True)])
    def test_more_exponent_bits_help(self, lab, dtype, overflows):
        app = lab(view=SOFTMAX)
        app.button_group(key="flash_softmax_dtype").set_value(dtype)
        finished(app)
        assert ("naive: not a number" in drawn(app, "flash_softmax")) is overflows

    def test_chunks_are_read_one_by_one(self, lab):
        app = lab(view=SOFTMAX)
        assert app.slider(key="flash_chunks").value == 3
        app.slider(key="flash_chunks").set_value(1)
        finished(app)
        assert "8 scores are still to come" in words(app)
        assert len(numbers(drawn(app, "flash_softmax")["online, among those seen"]["x"])) == 4
        app.slider(key="flash_chunks").set_value(3)
        finished(app)
        app.slider(key="flash_softmax_chunk").set_value(2)
        finished(app)
        assert app.slider(key="flash_chunks").value == 6

    @pytest.mark.parametrize(
        ("scores", "sentence"), [("1, two, 3", "is no number"), ("", "There are no scores"), ("1e400", "not finite")]
    )
    def test_what_is_no_score_is_named_and_kept(self, lab, scores, sentence):
        app = lab(view=SOFTMAX)
        app.text_input(key="flash_softmax_scores").set_value(scores)
        finished(app)
        assert sentence in app.error[0].value
        assert app.text_input(key="flash_softmax_scores").value == scores

    def test_weights_so_far_sum_to_one(self):
        found = flash_online.run(flash_online.Params(dtype="float32"), None)
        for seen in (1, 2, 3):
            assert softmax.so_far(found, seen).sum() == pytest.approx(1, abs=1e-5)
        assert len(softmax.so_far(found, 0)) == 0


def test_the_roofline_is_measured_when_asked_for(lab):
    app = lab(view=ROOFLINE, **SHORT)
    assert "arithmetic intensity" in words(app)
    app.button(key="_flash_roofline_run_start").click()
    finished(app)
    roof, standard = spec(app, "flash_roofline")["data"]
    assert len(standard["x"]) == 2
    assert 0 < max(standard["y"]) < 3 * numbers(roof["y"]).max()
    params = app.session_state["_run_flash_roofline_run"].params
    assert params == flash_roofline.Params(max_length=256, heads=2, head_dim=32, backends=("standard",))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("max_length", 8192, "selectbox"), ("head_dim", 128, "slider"), ("dtype", "bfloat16", "selectbox")],
)
def test_intensity_moves_with_the_controls_before_anything_is_measured(lab, key, value, kind):
    app = lab(view=ROOFLINE)
    before = [numbers(trace["x"]).tolist() for trace in spec(app, "flash_intensity")["data"]]
    paths = flash_roofline.predict_paths(flash_roofline.Params())
    assert before == [path.intensity.tolist() for path in paths]
    getattr(app, kind)(key=f"flash_{key}").set_value(value)
    finished(app)
    assert [numbers(trace["x"]).tolist() for trace in spec(app, "flash_intensity")["data"]] != before
    assert not app.get("progress")


def test_errors_are_drawn_for_every_backend_here(lab):
    app = lab(view=ACCURACY, accuracy_length="64")
    traces = drawn(app, "flash_errors")
    assert "Standard attention" in traces
    before = spec(app, "flash_errors")["data"]
    app.selectbox(key="flash_accuracy_dtype").set_value("float16")
    finished(app)
    assert spec(app, "flash_errors")["data"] != before
    assert len(app.table) == 3
    assert "standard, TF32" in app.table[2].value.index


def test_a_cache_is_weighed_then_read_in_parts(lab):
    app = lab(view=DECODE, decode_max_length="2,048", decode_splits=4)
    assert metrics(app)["Cache at the longest"] == "2 MiB"
    assert metrics(app)["If every head had its own"] == "8 MiB"
    app.button(key="_flash_decode_run_start").click()
    finished(app)
    assert drawn(app, "flash_decode")["Standard attention"]["x"] == [1024, 2048]
    shares = spec(app, "flash_parts")["data"][0]["y"]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100)
    assert "Merged, the output differs" in words(app)


def test_heads_that_cannot_be_shared_equally_are_refused(lab):
    app = lab(view=DECODE, decode_heads="4", decode_kv_heads="8")
    assert "cannot share 8 key/value heads" in app.error[0].value
    assert "the note beside the controls says what to change" in words(app)


def test_a_view_that_was_left_comes_back_as_it_was(lab):
    app = lab(view=TILES)
    app.slider(key="flash_tiles_block_q").set_value(2)
    app = show(finished(app), DECODE)
    app.slider(key="flash_decode_splits").set_value(3)
    app = show(finished(app), TILES)
    assert app.slider(key="flash_tiles_block_q").value == 2
    assert app.query_params["flash_tiles_block_q"] == "2"
    assert show(app, DECODE).slider(key="flash_decode_splits").value == 3


class TestPredict:
    @pytest.mark.parametrize(("name", "factor"), [("standard", "× 4"), ("flash", "× 2")])
    def test_growth_is_judged(self, lab, name, factor):
        assert "Right: it grows from" in words(lab(tab="Predict", **{f"growth_{name}": factor}))
        assert "Not × 8" in words(lab(tab="Predict", **{f"growth_{name}": "× 8"}))
        assert "it grows" not in words(lab(tab="Predict"))

    def test_the_speed_up_is_that_of_the_fastest_at_the_longest_that_standard_reached(self):
        found = measured(
            point("standard", 128, 2.0),
            point("torch-flash", 128, 3.0),
            point("standard", 256, 9.0),
            point("torch-flash", 256, 3.0),
            point("torch-flash", 512, 1.0),
        )
        assert predict.speedup(found) == (256, "PyTorch, flash", 3.0)
        assert predict.speedup(measured(point("standard", 128, 2.0))) is None
        assert predict.speedup(measured()) is None

    def test_a_guess_is_judged_by_a_run(self, lab):
        app = lab(tab="Predict", **SHORT | {"backends": "torch-math"})
        app.button_group(key="flash_backends").set_value(["standard", "torch-math"])
        finished(app)
        app.select_slider(key="flash_speedup_guess").set_value(30.0)
        finished(app)
        app.button(key="_flash_guess_start").click()
        finished(app)
        assert "Not × 30: at T = 256" in words(app)
        assert drawn(app, "flash_guess_chart")


def test_code_and_tests(lab):
    said = words(lab(tab="Code"))
    assert all(name in said for name in ("stream_tiles", "stream_softmax", "_forward_kernel", "fastest"))
    assert "properties hold on these settings" in words(lab(tab="Tests", **SHORT))


def test_the_settings_of_the_places_to_begin(lab):
    for start in FLASH.starts:
        app = lab(**start.settings)
        assert not app.warning
        assert not app.error
        for name, value in start.settings.items():
            held = app.session_state[f"flash_{name}"]
            assert str(held) == value or held == float(value)


def test_every_view_has_a_name_and_a_figure_or_a_button(lab):
    assert list(VIEWS) == [SPEED, TILES, SOFTMAX, ROOFLINE, ACCURACY, DECODE]
    for view in VIEWS:
        app = lab(view=view)
        assert app.get("plotly_chart") or [button for button in app.button if not button.key.startswith("_cancel")]


def test_a_merger_is_told_with_its_largest_part():
    merge = decode.flash_decode.Merge(
        starts=np.array([0, 8]),
        length=16,
        maximum=np.array([1.0, 2.0]),
        sum=np.array([1.0, 1.0]),
        rescale=np.array([0.4, 1.0]),
        share=np.array([0.3, 0.7]),
        logsumexp=2.3,
        difference=2e-16,
    )
    assert "Part 2 weighs most, 70.0%" in decode.merge_sentence(merge)
