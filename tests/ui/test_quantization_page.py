"""The quantization lab in Streamlit's own test harness, on the real runtime and the small model."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import streamlit as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine
from engine.experiments import quantization, quantization_model, quantization_sensitivity
from engine.experiments._quantization_speed import recorded_throughput
from tests.ui.lab_pages import SECONDS, finished, words
from ui import clicks
from ui.labs import LABS, QUANTIZATION
from ui.quantization import layer_map, model, predict, sentences, settings, speed
from ui.quantization.explore import VIEWS
from ui.quantization.side_by_side import continuation, heads_sentence

RUN = "_run_quantization_run"
STORYTELLER = Path(engine.__file__).parent / "storyteller"


@pytest.fixture
def lab(open_page):
    """Opens the lab, as a browser with this query string would."""
    return lambda **query: open_page(QUANTIZATION, query)


def look(app, view):
    app.session_state["quantization_view"] = view
    return finished(app)


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


def found(app):
    return app.session_state[RUN].result


def labels(app):
    kinds = (app.selectbox, app.slider, app.select_slider, app.toggle, app.number_input, app.text_area)
    return {widget.label for kind in kinds for widget in kind}


class TestWeights:
    def test_the_pictures_hold_the_numbers_of_the_result(self, lab):
        app = lab()
        result = found(app)
        up, down, ticks = spec(app, "quantization_histograms")["data"]
        assert len(result.levels) == 16
        assert ticks["name"] == f"levels of block {result.block.index:,}"
        assert result.sentence in words(app)
        assert result.block_sentence in words(app)
        assert f"{result.bits_per_weight:.3g}" == "4.5" == app.metric[1].value
        assert app.metric[0].value == sentences.decibels(result.distortion.sqnr_db)
        assert down["name"] == "dequantized"
        assert up["name"] == "original"

    def test_fewer_bits_are_fewer_levels_and_a_larger_error(self, lab):
        app = lab(bits=6)
        before = found(app)
        app.slider(key="quantization_bits").set_value(3)
        finished(app)
        after = found(app)
        assert (len(before.levels), len(after.levels)) == (64, 8)
        assert after.distortion.mse > 10 * before.distortion.mse

    def test_a_smaller_block_saves_what_an_outlier_wrecks(self, lab):
        app = lab(source="normal with outliers", data_type="Integer", block_size=1024)
        before = found(app)
        app.select_slider(key="quantization_block_size").set_value(16)
        finished(app)
        after = found(app)
        assert after.distortion.sqnr_db > before.distortion.sqnr_db + 3
        assert after.bits_per_weight > before.bits_per_weight

    def test_what_is_larger_than_no_quantization_is_called_so(self, lab):
        assert "larger than no quantization: 125%" in words(lab(block_size=2))
        assert "larger than no quantization" not in words(lab())

    def test_a_block_of_a_link_and_the_buttons(self, lab):
        app = lab(block=7)
        assert found(app).block.index == 7
        app.button(key="_quantization_worst").click()
        finished(app)
        assert found(app).block.worst
        app.button(key="_quantization_largest").click()
        finished(app)
        largest = found(app).block
        assert largest.index not in (7,)
        assert app.number_input(key="quantization_block").value is None

    def test_a_block_is_forgotten_with_the_blocks_it_was_one_of(self, lab):
        app = lab(block=3000)
        assert found(app).block.index == 3000
        app.select_slider(key="quantization_block_size").set_value(256)
        finished(app)
        assert app.session_state[RUN].problem is None
        assert app.session_state[RUN].result_params.block == -1

    @pytest.mark.parametrize("query", [{}, {"source": "normal"}], ids=["3,072 blocks", "1,024 blocks"])
    def test_the_strip_frames_the_place_that_it_opens(self, lab, clicked_strip, query):
        """At the brightest cell and at another: cells hold 12 or 13 blocks of 3,072, 4 or 5 of 1,024."""
        app = lab(**query)
        assert len(found(app).block_errors) == 240
        for place in (found(app).block_errors.argmax(), 97):
            app.session_state["place"] = int(place)
            app.run()
            app.button(key="cell").click()
            finished(app)
            result, drawn = found(app), spec(app, "quantization_strip")
            assert result.block.index == result.worst_blocks[place]
            (frame,) = drawn["layout"]["shapes"]
            assert (frame["x0"] + frame["x1"]) / 2 == place
            first, last = re.fullmatch(
                r"blocks ([\d,]+) to ([\d,]+)", drawn["data"][0]["customdata"][0][place]
            ).groups()
            assert int(first.replace(",", "")) <= result.block.index <= int(last.replace(",", ""))
        app.button(key="_quantization_worst").click()
        finished(app)
        (frame,) = spec(app, "quantization_strip")["layout"]["shapes"]
        assert (frame["x0"] + frame["x1"]) / 2 == found(app).block_errors.argmax()

    def test_the_last_block_of_a_size_that_does_not_divide_is_said_to_be_filled_up(self, lab):
        assert "filled up with 64 zeros, which cost no bits" in words(lab(source="normal", block_size=100))
        assert "filled up" not in words(lab(source="normal"))

    def test_pinned_and_current_share_their_axes(self, lab):
        app = lab(pin='{"bits":2,"scale":"per tensor"}', bits=8)
        a, b = spec(app, "quantization_histogramsA"), spec(app, "quantization_histogramsB")
        assert a["layout"]["xaxis"]["range"] == b["layout"]["xaxis"]["range"]
        assert a["layout"]["yaxis"]["range"] == b["layout"]["yaxis"]["range"]
        assert "A: scale per tensor, bits 2 · B: scale per block, bits 8" in words(app)
        errors = [spec(app, f"quantization_errors{side}")["layout"]["xaxis"]["range"] for side in "AB"]
        assert errors[0] == errors[1]

    def test_ours_are_the_codes_of_bitsandbytes(self, lab):
        app = lab(block_size=64)
        checked = app.session_state["_run_quantization_crosscheck"].result
        assert (checked.differing_codes, checked.differing_values) == (0, 0)
        assert ":green-badge" in words(app)
        assert "differ" in words(lab(data_type="FP4 (bitsandbytes)"))

    def test_values_that_differ_are_not_called_the_same(self, lab):
        app = lab(source="normal", double_quantization="true")
        checked = app.session_state["_run_quantization_crosscheck"].result
        assert (":green-badge" in words(app)) == (checked.differing_values == 0)
        assert checked.sentence in words(app)

    def test_what_bitsandbytes_does_not_have_is_said(self, lab):
        app = lab(data_type="Integer")
        assert found(app).crosscheck in words(app)
        assert "_run_quantization_crosscheck" not in app.session_state


@pytest.fixture
def clicked_strip(monkeypatch):
    """Stands for a click on the strip's cell that the session names as ``place``."""

    def cell(key, then, **_):
        if key == "quantization_strip":
            st.button("cell", key="cell", on_click=lambda: then(st.session_state["place"], 0))

    monkeypatch.setattr(clicks, "on_cell_click", cell)


class TestControls:
    def test_only_those_that_matter_are_shown(self, lab):
        app = lab()
        assert "Bits" in labels(app)
        assert not {"Symmetric", "Outliers (%)", "Seed"} & labels(app)
        app.selectbox(key="quantization_data_type").set_value("FP8 (E4M3)")
        finished(app)
        assert "Bits" not in labels(app)
        app.selectbox(key="quantization_data_type").set_value("Integer")
        app.selectbox(key="quantization_source").set_value("normal with outliers")
        finished(app)
        assert {"Bits", "Symmetric", "Outliers (%)", "Outlier size (σ)", "Seed"} <= labels(app)
        assert not {"Model", "Layer"} & labels(app)

    def test_hidden_ones_keep_their_values(self, lab):
        app = lab(bits=3, block_size=128)
        app.selectbox(key="quantization_data_type").set_value("FP4 (E2M1)")
        finished(app)
        app.segmented_control(key="quantization_scale").set_value("per tensor")
        finished(app)
        assert found(app).data_type == "fp4-e2m1"
        app.selectbox(key="quantization_data_type").set_value("NormalFloat")
        app.segmented_control(key="quantization_scale").set_value("per block")
        finished(app)
        assert found(app).data_type == "nf3"
        assert app.session_state[RUN].result_params.block_size == 128

    def test_a_hidden_one_that_comes_back_is_in_the_url_again(self, lab):
        app = lab(outliers=2, source="normal with outliers")
        app.selectbox(key="quantization_source").set_value("normal")
        finished(app)
        app.query_params.pop("quantization_outliers", None)
        app.selectbox(key="quantization_source").set_value("normal with outliers")
        finished(app)
        assert app.slider(key="quantization_outliers").value == 2
        assert float(app.query_params["quantization_outliers"][0]) == 2

    def test_they_outlive_other_views_and_tabs(self, lab):
        app = look(look(lab(source="uniform", bits=5), "Model"), "Weights")
        assert app.session_state[RUN].result_params.source == "uniform"
        assert found(app).data_type == "nf5"

    def test_another_model_forgets_the_layer(self, lab):
        app = lab()
        layers = found(app).layers
        app.selectbox(key="quantization_layer").set_value(layers[3])
        finished(app)
        assert found(app).layer == layers[3]
        app.selectbox(key="_quantization_model_chosen").set_value("smollm2-135m")
        app.run()
        assert app.selectbox(key="quantization_layer").value == ""

    def test_a_block_size_of_a_link(self, lab):
        app = lab(block_size=100)
        assert found(app).padded > 0
        assert app.select_slider(key="quantization_block_size").value == 100
        assert not app.warning
        for wrong in ("1", "4097", "x", "-5"):
            assert "must be a whole number from 2 to 4096" in words(lab(block_size=wrong))

    def test_wrong_values_of_a_link_are_sentences(self, lab):
        app = lab(bits=9, data_type="float3")
        assert "it must be" in words(app)
        assert found(app).data_type == "nf4"

    def test_a_layer_that_is_not_there_has_a_way_out(self, lab):
        app = lab(layer="nowhere")
        assert app.warning
        assert "no weights to show" in words(app)
        app.selectbox(key="quantization_layer").set_value("")
        finished(app)
        assert not app.warning
        assert found(app).layer

    def test_a_block_that_is_not_there_has_a_way_out(self, lab):
        app = lab(block=99999999)
        assert "99999999" in words(app)
        next(button for button in app.button if "largest weight" in button.label).click()
        finished(app)
        assert found(app).num_blocks > 0

    def test_a_quantized_source_is_refused_with_the_reason(self, lab):
        app = lab(model="smollm2-135m-q4")
        beside, main = app.warning
        assert "quantized already" in beside.value
        assert main.value == beside.value


class TestAllTypes:
    def test_every_type_is_a_point_and_the_current_one_is_ringed(self, lab):
        app = lab(view="All types", bits=5)
        result = app.session_state["_run_quantization_rates_run"].result
        drawn = spec(app, "quantization_rates")["data"]
        bound, *families, ring = drawn
        assert sum(len(trace["x"]) for trace in families) == len(result.points)
        assert bound["name"].startswith("bound")
        assert ring["name"] == "yours: NormalFloat, 5 bits"
        current = next(point for point in result.points if point.name == "nf5")
        assert ring["y"] == [current.sqnr_db]
        assert result.sentence in words(app)

    @pytest.mark.parametrize("data_type", ["FP4 (bitsandbytes)", "FP8 (E5M2)"])
    def test_formats_of_one_width_are_ringed_too(self, lab, data_type):
        ring = spec(lab(view="All types", data_type=data_type), "quantization_rates")["data"][-1]
        assert ring["name"] == f"yours: {data_type}"


@pytest.fixture
def clicked_cell(monkeypatch):
    """Stands for a click on the second cell of a map's third row, which the harness cannot make."""

    def cell(key, then, **_):
        if key == "quantization_map":
            st.button("cell", key="cell", on_click=then, args=(1, 2))

    monkeypatch.setattr(clicks, "on_cell_click", cell)


@pytest.mark.usefixtures("clicked_cell")
class TestLayerMap:
    @pytest.mark.parametrize("held", [None, "", "model.layers.4.mlp.up_proj"])
    def test_a_layer_is_opened_with_its_weights(self, lab, held):
        """Whatever the Layer control still holds from the last time it was drawn."""
        app = lab(view="Layer map", bits=3)
        if held is not None:
            app.session_state["quantization_layer"] = held
        result = app.session_state["_run_quantization_map_run"].result
        drawn = spec(app, "quantization_map")["data"][0]
        assert result.sentence in words(app)
        assert len(drawn["customdata"]) == len(result.blocks) == 6
        app.button(key="cell").click()
        finished(app)
        assert found(app).layer == result.names[2][1]
        assert app.query_params["quantization_layer"] == result.names[2][1]
        back = look(app, "Layer map")
        frame = spec(back, "quantization_map")["layout"]["shapes"][0]
        assert (frame["x0"], frame["y0"]) == (0.5, 1.5)

    def test_a_layer_of_a_model_that_was_chosen_here_is_opened(self, lab):
        app = lab(view="Layer map")
        app.session_state["_quantization_model_of_layer"] = "smollm2-135m"  # of the weights that were seen before
        app.session_state["quantization_source"] = "uniform"
        finished(app)
        app.button(key="cell").click()
        finished(app)
        assert found(app).layer == app.session_state["_run_quantization_map_run"].result.names[2][1]

    def test_what_keeps_its_precision_is_listed(self, lab):
        app = lab(view="Layer map")
        result = app.session_state["_run_quantization_map_run"].result
        assert result.left
        assert all(left.reason in words(app) for left in result.left)


class TestModel:
    def test_nothing_runs_before_the_button(self, lab):
        app = lab(view="Model")
        assert "Run the sweep to see" in words(app)
        assert not app.progress
        assert "Data type" not in labels(app)

    def test_the_invitation_promises_no_more_tokens_than_there_may_be(self, lab):
        assert "reads up to 2,048 tokens of stories each time" in words(lab(view="Model"))
        own = "The cat sat on the mat and the dog ran to the big red house. " * 8
        assert "reads up to 512 tokens of your text each time" in words(lab(view="Model", text=own, tokens=512))

    def test_a_sweep_ends_with_its_points(self, lab):
        app = lab(view="Model", methods="rounding", data_types="NormalFloat", widths=8, tokens=256)
        app.button(key="_quantization_model_start").click()
        finished(app)
        result = app.session_state["_run_quantization_model_run"].result
        assert [(point.data_type, point.bits) for point in result.points] == [("NormalFloat", 8)]
        line = spec(app, "quantization_perplexity")["data"][0]
        assert sorted(line["y"]) == sorted(point.perplexity for point in result.points)
        assert result.sentence in words(app)
        app.slider(key="quantization_tokens").set_value(512)
        finished(app)
        assert "a sweep with other settings" in words(app)

    def test_a_sweep_can_be_cancelled_and_keeps_its_points(self, lab):
        app = lab(view="Model", tokens=4096)
        app.session_state["quantization_widths"] = [8, 4, 2]
        finished(app)
        app.button(key="_quantization_model_start").click().run()
        end = time.monotonic() + SECONDS
        while not re.search(r"[1-9]\d* of \d+ quantized", words(app)):
            assert time.monotonic() < end
            time.sleep(0.1)
            app.run()
        app.button(key="_cancel_quantization_model_run").click()
        finished(app)
        result = app.session_state["_run_quantization_model_run"].result
        assert 1 <= len(result.points) < result.total
        assert result.ended == "cancelled"
        assert result.ending in words(app)
        assert "Finished points are kept" in words(app)

    def test_no_method_is_a_sentence_and_no_run(self, lab):
        app = lab(view="Model")
        app.get_by_key("quantization_methods").set_value([])
        finished(app)
        assert app.error
        assert app.button(key="_quantization_model_start").disabled

    def test_a_text_that_is_too_short_is_refused(self, lab):
        app = lab(view="Model", text="too short")
        assert app.error
        assert app.text_area(key="quantization_text").value == "too short"


class TestSensitivity:
    def test_every_kind_is_measured_and_ranked(self, lab):
        app = lab(view="Sensitivity", bits=2, unit="kind", tokens=256)
        app.button(key="_quantization_sensitivity_start").click()
        finished(app)
        result = app.session_state["_run_quantization_sensitivity_run"].result
        bars = spec(app, "quantization_sensitivity_ranking")["data"][0]
        assert bars["x"] == sorted((100 * part.increase for part in result.parts), reverse=True)
        assert result.sentence in words(app)

    def test_many_bits_are_advised_against(self, lab):
        assert "try 3 or 2" in words(lab(view="Sensitivity"))
        assert "try 3 or 2" not in words(lab(view="Sensitivity", bits=2))


class TestSpeed:
    def test_the_recording_is_drawn_and_told(self, lab):
        app = lab(view="Speed")
        recorded = recorded_throughput()
        drawn = spec(app, "quantization_speed_quantize")["data"]
        theirs, whole, kernel, copy = drawn
        for trace, way in ((theirs, "bitsandbytes"), (whole, "quantize()"), (kernel, "kernel")):
            assert trace["y"] == [
                one.gb_per_s
                for one in recorded.measured
                if (one.operation, one.way, one.data_type) == ("quantize", way, "nf4")
            ]
        assert copy["y"] == list(recorded.copies.values())
        assert recorded.provenance in words(app)
        assert speed.quantizing(recorded, "nf4") in words(app)

    def test_a_target_is_reached_by_what_reaches_it(self):
        recorded = recorded_throughput()
        for name in ("nf4", "fp4-bnb"):
            (slow, _), (fast, _) = (recorded.speedups(way, name) for way in ("quantize()", "kernel"))
            assert slow < 4
            assert fast > 3.9
            said = speed.quantizing(recorded, name)
            assert f"{slow:.2f} to" in said
            assert f"{fast:.2f} to" in said
            assert ("by the kernel alone" in said) == (fast >= 4)
            slower = replace(recorded, measured=[replace(one, gb_per_s=100.0) for one in recorded.measured])
            assert "by neither" in speed.quantizing(slower, name)


class TestSideBySide:
    def test_texts_maps_and_numbers(self, lab):
        app = lab(view="Side by side", bits=2, new_tokens=12)
        result = app.session_state["_run_quantization_side_run"].result
        assert result.sentence in words(app)
        assert result.map_sentence in words(app)
        agreeing = 12 if result.first_difference is None else result.first_difference
        assert app.metric[0].value == f"{agreeing} of {len(result.original_tokens)}"
        heads = spec(app, "quantization_side_heads")
        layer, head = np.unravel_index(result.moved_by_head.argmax(), result.moved_by_head.shape)
        assert result.moved == result.moved_by_head.max()
        assert f"layer {layer}, head {head} on the prompt, the one" in words(app).replace("**", "")
        assert (heads["layout"]["shapes"][0]["x0"], heads["layout"]["shapes"][0]["y0"]) == (head - 0.5, layer - 0.5)
        app.session_state["quantization_attention_layer"] = 2
        app.session_state["quantization_attention_head"] = 5
        finished(app)
        assert "layer 2, head 5" in words(app)

    def test_a_head_of_a_link_stays(self, lab):
        app = lab(view="Side by side", new_tokens=4, attention_head=1)
        shown = app.session_state["_run_quantization_side_run"].result_params
        assert (shown.attention_layer, shown.attention_head) == (0, 1)

    def test_changes_of_the_attention_have_ticks_that_differ(self, lab):
        app = lab(view="Side by side", attention_head=1, bits=8, new_tokens=4)
        bar = spec(app, "quantization_side_moved")["data"][0]["colorbar"]
        assert bar["tickformat"] == "+.2~p"

    def test_a_head_that_is_not_there_is_a_sentence(self, lab):
        app = lab(view="Side by side", attention_head=200, new_tokens=4)
        assert "200" in words(app)


class TestPredicting:
    def test_the_answer_comes_after_the_guess(self, lab):
        app = lab(tab="Predict")
        assert "With 3?" in words(app)
        assert "the bit was worth" not in words(app)
        app.toggle(key="quantization_sqnr_answer").set_value(True)
        finished(app)
        answer = app.session_state["_run_quantization_fewer_run"].result
        assert answer.data_type == "nf3"
        assert sentences.decibels(answer.distortion.sqnr_db) in words(app)

    def test_formats_without_a_smaller_width_say_so(self, lab):
        for query in ({"data_type": "FP8 (E4M3)"}, {"bits": 2}):
            assert "no width with one bit less" in words(lab(tab="Predict", **query))

    def test_the_width_at_which_it_breaks(self, lab):
        app = lab(tab="Predict", break_guess="8 bits", data_type="Integer", scale="per tensor")
        app.button(key="_quantization_guess_start").click()
        finished(app)
        result = app.session_state["_run_quantization_guess_run"].result
        width = predict.breaks_at(result)
        broken = {point.bits for point in result.points if point.perplexity >= 1.5 * result.original.perplexity}
        assert width == max(broken, default=None)
        assert f"at {width} bits" in words(app)

    def test_a_guess_after_the_answer_was_seen_is_none(self, lab):
        app = lab(tab="Predict", break_guess="8 bits", data_type="Integer", scale="per tensor")
        app.button(key="_quantization_guess_start").click()
        finished(app)
        judged = words(app)
        width = predict.breaks_at(app.session_state["_run_quantization_guess_run"].result)
        other = next(bits for bits in (2, 3, 4, 8) if bits not in (8, width))
        app.segmented_control(key="quantization_break_guess").set_value(str(other if width == 8 else width)).run()
        finished(app)
        assert ("Right: it breaks" in words(app)) == ("Right: it breaks" in judged)

    def test_it_is_measured_only_after_a_guess(self, lab):
        assert lab(tab="Predict").button(key="_quantization_guess_start").disabled


class TestCodeAndTests:
    def test_the_source_is_the_engine_s(self, lab):
        said = [block.value for block in lab(tab="Code").code]
        assert any("def normal_float" in code for code in said)
        assert any("def quantize_gptq" in code for code in said)
        assert any("def int8_product" in code for code in said)

    @pytest.mark.parametrize("query", [{}, {"data_type": "Integer", "symmetric": "false", "source": "uniform"}])
    def test_every_property_holds(self, lab, query):
        app = lab(tab="Tests", **query)
        assert app.success
        assert not app.error


def test_every_start_of_the_lab_is_a_setting_that_there_is(lab):
    for start in QUANTIZATION.starts:
        app = lab(**start.settings)
        assert not app.warning
        assert not app.error


def test_starts_fit_on_their_cards():
    assert max(len(start.label) for lab in LABS for start in lab.starts) <= 36


def test_views_are_named_once():
    assert len(set(VIEWS)) == len(VIEWS) == 7


@pytest.mark.parametrize(
    ("block", "kind", "said"),
    [("3", "q_proj", "layer 3, q_proj"), ("encoder 3", "fc1", "encoder 3, fc1"), ("outside", "lm_head", "lm_head")],
)
def test_a_layer_has_a_short_name(block, kind, said):
    assert sentences.layer_label(block, kind) == said


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["self_attn.q_proj", "mlp.up_proj", "lm_head"], ["q_proj", "up_proj", "lm_head"]),
        (
            ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
            ["query", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
        ),
        (["a.b.w", "c.b.w"], ["a.b.w", "c.b.w"]),
    ],
)
def test_kinds_are_told_apart_by_their_last_parts(kinds, said):
    assert sentences.kind_labels(kinds) == said
    assert len(set(said)) == len(said)


@pytest.fixture
def constant(tmp_path):
    """A model with a layer that every format holds exactly."""
    source = AutoModelForCausalLM.from_pretrained(STORYTELLER)
    source.model.layers[0].mlp.down_proj.weight.data.fill_(-0.25)
    source.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(STORYTELLER).save_pretrained(tmp_path)
    return str(tmp_path)


def test_an_exact_layer_has_no_distance_to_the_bound(lab, constant):
    app = lab(model=constant)
    assert [metric.value for metric in app.metric[:3:2]] == ["exact", "—"]
    assert "nothing left" not in words(app)


@pytest.mark.parametrize(
    ("now", "fewer", "said"),
    [
        (20.0, 14.0, "the bit was worth 6.0 dB. At the bound for Gaussian weights each bit is worth 6.0 dB"),
        (float("inf"), float("inf"), "these weights are held exactly without that bit as well as with it"),
        (float("inf"), 14.0, "with that bit they are held exactly"),
        (14.0, float("inf"), "these weights are held exactly without that bit"),
    ],
)
def test_what_a_bit_is_worth_where_nothing_is_lost(now, fewer, said):
    assert predict.worth(now, fewer) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(20.73, "20.7 dB"), (-3.0, "−3.0 dB"), (float("inf"), "exact"), (float("-inf"), "nothing left")],
)
def test_decibels_in_words(value, said):
    assert sentences.decibels(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(5.2774, "5.277"), (42031.0, "42,000"), (697.44, "697.4"), (float("inf"), "∞")]
)
def test_perplexities_have_no_powers_of_ten(value, said):
    assert sentences.perplexity(value) == said


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (5.0, 5.001, "stays the same"),
        (5.0, 5.5, "rises by 10.0%"),
        (5.0, 4.0, "falls by 20.0%"),
        (5.0, 50.0, "is 10 times as high"),
        (5.0, float("inf"), "is beyond counting"),
        (float("nan"), 5.0, "has nothing to be compared with"),
    ],
)
def test_a_change_of_perplexity_in_words(before, after, said):
    assert sentences.change(before, after) == said


def sensitive(*changes, blocks=8):
    parts = [
        quantization_sensitivity.PartCost(f"layer{i}", "0", "k", 1, 5 * (1 + increase), increase, error, 0.0)
        for i, (increase, error) in enumerate(changes)
    ]
    return SimpleNamespace(parts=parts, text_blocks=blocks)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            [(0.5, 0.1), (0.02, 0.02), (0.01, 0.001), (-0.02, 0.001), (-0.001, 0.01)],
            [
                "Of 5 layers 3 raise the perplexity (blue), 2 lower it (orange).",
                "8 blocks",
                ": 2 raise it, 1 lower it.",
            ],
        ),
        (
            [(0.0, 0.0), (0.0, 0.0), (0.01, 0.001)],
            ["1 raise", "0 lower", "2 leave it as it is", ": 1 raise it, 0 lower"],
        ),
        ([(0.5, 0.1), (NAN, NAN), (INF, NAN)], ["Of 3 layers 1 raise", "2 leave no finite", ": 1 raise it, 0 lower"]),
        ([(NAN, NAN), (INF, NAN)], ["None of the 2 layers", "finite perplexity"]),
    ],
)
def test_harm_is_told_from_chance_by_how_much_the_text_disagrees(changes, said):
    sentence = sentences.chance_sentence(sensitive(*changes))
    assert all(part in sentence for part in said), sentence
    assert not re.search(r"\b(nan|inf)", sentence)


@pytest.mark.parametrize(("blocks", "said"), [(1, "one block"), (7, "7 blocks")])
def test_a_short_text_cannot_tell_harm_from_chance(blocks, said):
    sentence = sentences.chance_sentence(sensitive((0.5, 0.001), blocks=blocks))
    assert f"The text has {said}, too few" in sentence
    assert "standard errors" not in sentence


@pytest.mark.parametrize(("size", "share"), [(20, 0.29), (100, 0.91)])
def test_outliers_are_called_the_part_of_the_signal_that_they_are(lab, size, share):
    """k·s² of k·s² + N − k: 66 of 65,536 weights."""
    assert share == pytest.approx(66 * size**2 / (66 * size**2 + 65536 - 66), abs=0.005)
    app = lab(source="normal with outliers", outlier_size=size)
    assert f"The 66 outliers are {share:.0%} of that signal" in words(app)
    rest = (1 - 66 / 65536) / found(app).distortion.mse  # of variance 1
    said = re.search(r"other weights alone is ([\d.]+) dB above", words(app))
    assert float(said[1]) == pytest.approx(10 * np.log10(rest), abs=0.1)
    assert "outliers are" not in words(lab(source="normal with outliers", outliers=0))


def sweep(*points):
    return SimpleNamespace(
        points=[
            quantization_model.Point("rounding", kind, bits, bits + 0.5, value, 0.0, 0.0, 0.0)
            for kind, bits, value in points
        ]
    )


def test_worse_than_guessing_is_said_where_the_vocabulary_is_known():
    bad, good = sweep(("Integer", 2, 42030.0)), sweep(("Integer", 2, 4000.0), ("NormalFloat", 2, float("nan")))
    assert "Above 4,096" in sentences.guessing_sentence(bad, "storyteller")
    assert not sentences.guessing_sentence(good, "storyteller")
    assert not sentences.guessing_sentence(bad, "somebody/else")


def test_two_rankings_at_two_bits_are_explained():
    assert "not what the model loses" in sentences.two_bits_sentence(
        sweep(("Integer", 2, 9.0), ("NormalFloat", 2, 8.0))
    )
    assert not sentences.two_bits_sentence(sweep(("Integer", 2, 9.0), ("NormalFloat", 3, 8.0)))


def test_a_bit_less_is_there_from_three_bits_on():
    assert predict.fewer(quantization.Params(bits=3)).bits == 2
    assert predict.fewer(quantization.Params(bits=2)) is None
    assert predict.fewer(quantization.Params(data_type="FP8 (E4M3)", bits=6)) is None


def test_continuations_mark_the_first_token_that_differs():
    tokens = ["␣named", "␣Tim", "."]
    assert "orange" not in continuation(tokens, None)
    marked = continuation(tokens, 1)
    assert marked.index("named") < marked.index(":orange-badge[Tim]") < marked.rindex(".")


def test_the_head_that_moved_most_is_named():
    moved = np.zeros((2, 3))
    moved[1, 2] = 0.6
    assert "layer 1, head 2, with 60.0%" in heads_sentence(moved)
    assert "10.0% of the attention" in heads_sentence(moved)


def test_a_sweep_counts_its_models():
    assert model.count(quantization_model.Params(data_types=("Integer", "NormalFloat"), widths=(8, 4, 2))) == 18
    assert model.count(quantization_model.Params(methods=("GPTQ",), data_types=("Integer",), widths=(4, 3))) == 2


def test_the_map_grows_with_the_model_up_to_a_screen():
    assert layer_map.height(6) < layer_map.height(12) <= layer_map.height(30) == layer_map.height(100)


def test_sizes_are_those_that_the_parameters_allow():
    for size in settings.SIZES:
        assert quantization.Params(block_size=size).block_size == size
