"""The quantization lab's experiments on whole models: the map, perplexity, sensitivity, and two models side by side."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import llama, pretrained
from engine.catalogue import MINILM
from engine.data import TokenBlocks
from engine.errors import InputError, JobCancelledError
from engine.experiments import (
    _quantization_perplexity,
    _quantization_source,
    parse,
    quantization,
    quantization_map,
    quantization_model,
    quantization_sensitivity,
    quantization_side_by_side,
)
from engine.generation import generate
from engine.pretraining.run import read_stories
from engine.quantization.grouping import per_block
from engine.quantization.methods import quantize_layers
from engine.quantization.perplexity import Perplexity, measure_perplexity, read_blocks
from engine.runtime.jobs import LocalJob
from tests.tiny_models import save

LAYER = "model.layers.3.self_attn.o_proj"
OWN = "The cat sat on the mat and the dog ran to the big red house on the hill. " * 8
QUICK = {"tokens": 512, "methods": ("rounding",), "data_types": ("Integer",), "widths": (3,)}


@pytest.fixture(autouse=True)
def _nothing_is_finished_yet(monkeypatch):
    for experiment in (quantization_model, quantization_sensitivity):
        monkeypatch.setattr(experiment, "_finished", _quantization_perplexity.Finished())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("tiny"), "llama"))


def sweep(job=None, **values):
    return quantization_model.run(quantization_model.Params(**{**QUICK, **values}), job or LocalJob())


def sensitivity(job=None, **values):
    return quantization_sensitivity.run(quantization_sensitivity.Params(**{"tokens": 256, **values}), job or LocalJob())


def compare(job=None, **values):
    return quantization_side_by_side.run(
        quantization_side_by_side.Params(**{"new_tokens": 12, **values}), job or LocalJob()
    )


def stop_after(steps, **handlers):
    job = LocalJob(**handlers)
    job._on_progress = lambda progress: setattr(job, "cancelled", progress.step >= steps)
    return job


class TestModel:
    def test_a_point_is_what_the_engine_measures(self):
        found = sweep()
        model = pretrained.load()
        stories = read_stories(_quantization_perplexity.SHIPPED / "heldout.txt")
        blocks = TokenBlocks(read_blocks(stories, model.tokenizer, 256).ids[:2])
        quantized = quantize_layers(model.model, "int3", per_block(64))
        assert found.tokens == 512
        assert found.original.perplexity == pytest.approx(measure_perplexity(model.model, blocks).value, rel=1e-4)
        (point,) = found.points
        assert point.perplexity == pytest.approx(measure_perplexity(quantized, blocks).value, rel=1e-4)
        assert point.perplexity == pytest.approx(math.exp(point.loss))
        assert point.bits_per_weight == 3.5
        assert found.ended == "finished"
        assert 0.8 < found.weights < 0.83

    def test_better_methods_bring_two_bits_back_to_life(self):
        found = sweep(methods=("rounding", "GPTQ", "AWQ"), data_types=("NormalFloat",), widths=(2,))
        by_method = {point.method: point for point in found.points}
        assert by_method["GPTQ"].loss < by_method["rounding"].loss - 2
        assert by_method["AWQ"].loss < by_method["rounding"].loss
        for better in ("GPTQ", "AWQ"):
            assert by_method[better].output_error < by_method["rounding"].output_error
        for point in (found.original, *found.points):
            assert _quantization_perplexity.in_words(point.perplexity) in found.sentence
        for way in (
            "GPTQ (2.50)",
            "AWQ (2.55)",
            "round to nearest (RTN) (2.50)",
        ):  # AWQ has a scale for each input besides
            assert way in found.sentence
        assert "e+" not in found.sentence
        assert found.calibration_tokens == 4096

    @pytest.mark.parametrize("tokens", [64, 200, 65_536])
    def test_calibration_text_is_not_measured_on(self, tokens, monkeypatch):
        read = []

        def watch(model, blocks, **values):
            read.append(blocks)
            return {}

        monkeypatch.setattr("engine.quantization.calibration.collect_statistics", watch)
        model = replace(pretrained.load())  # nothing is kept of a new one
        _quantization_perplexity.calibration(model)
        (learned,) = read
        assert torch.equal(learned.ids, _quantization_perplexity.calibration_blocks(model).ids)
        assert len(learned) * learned.block_size == _quantization_perplexity.calibration_tokens(model) == 4096
        measured = _quantization_perplexity.read_text(quantization_model.Params(tokens=tokens), model).blocks
        length = measured.ids.shape[1]
        windows = learned.ids.unfold(1, length, 1).reshape(-1, length)
        assert not any((windows == row).all(-1).any() for row in measured.ids)

    def test_the_output_error_is_the_mean_over_the_layers(self):
        model = pretrained.load()
        statistics = _quantization_perplexity.calibration(model)
        layers = quantize_layers(model.model, "int3", per_block(64), statistics=statistics).quantization.layers
        errors = [layer.output_error for layer in layers]
        (point,) = sweep().points
        assert point.output_error == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        assert max(errors) > 2 * point.output_error

    @pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float16, 16), (torch.bfloat16, 16)])
    def test_the_original_takes_the_bits_that_its_numbers_need(self, tiny, tmp_path, dtype, bits):
        AutoModelForCausalLM.from_pretrained(tiny).to(dtype).save_pretrained(tmp_path)
        pretrained.load(tiny).tokenizer.save_pretrained(tmp_path)
        found = sweep(model=str(tmp_path), text=OWN).original
        assert (found.data_type, found.bits, found.bits_per_weight) == (f"{bits}-bit", bits, bits)

    def test_the_default_goes_from_8_bits_to_2(self):
        assert sorted(quantization_model.Params().widths) == [2, 3, 4, 5, 6, 8]

    def test_points_come_in_order_grow_and_are_kept(self, tiny):
        shown, reported = [], []
        job = LocalJob(on_progress=reported.append, on_show=shown.append)
        settings = {
            "model": tiny,
            "text": OWN,
            "widths": (2, 8, 4),
            "data_types": ("Integer", "NormalFloat"),
            "methods": ("rounding", "AWQ"),
        }
        found = sweep(job, **settings)
        assert [(point.bits, point.data_type, point.method) for point in found.points] == list(
            itertools.product((8, 4, 2), ("Integer", "NormalFloat"), ("rounding", "AWQ"))
        )
        assert [len(partial.points) for partial in shown] == list(range(13))
        assert all(partial.ended == "running" for partial in shown)
        assert [progress.step for progress in reported] == list(range(13))
        assert found.points[:5] == shown[5].points
        again = sweep(**settings | {"widths": (8,)})
        assert again.points == found.points[:4]  # the seconds too: nothing was measured again
        assert again.original == found.original

    def test_what_it_has_is_returned_when_it_is_stopped_and_gone_on_from(self, tiny):
        settings = {"model": tiny, "text": OWN, "widths": (6, 4, 3)}
        part = sweep(stop_after(2), **settings)
        assert (part.ended, len(part.points), part.total) == ("cancelled", 2, 3)
        assert "2 of 3" in part.ending
        whole = sweep(**settings)
        assert whole.points[:2] == part.points
        assert whole.ended == "finished"

    def test_it_stops_within_a_point(self):
        """A layer later, not a model later."""
        seen = []
        original = quantize_layers

        class Impatient:
            device, timed_out = "cpu", False

            @property
            def cancelled(self):
                return len(seen) > 8

            def report(self, *_, **__):
                pass

            def show(self, draft):
                pass

        def watched(*args, on_layer, **values):
            def follow(*report):
                seen.append(report)
                on_layer(*report)

            return original(*args, on_layer=follow, **values)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.quantization.methods.quantize_layers", watched)
            found = sweep(Impatient())
        assert (found.ended, found.points) == ("cancelled", [])
        assert len(seen) == 9

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"block_size": 32}, {"block_size": 16}),
            ({"scale": "per block"}, {"scale": "per channel"}),
            ({"double_quantization": False}, {"double_quantization": True}),
            ({"symmetric": True}, {"symmetric": False}),
            ({"text": OWN}, {"text": "And more of it. " + OWN}),
            ({"tokens": 64}, {"tokens": 128}),
        ],
    )
    def test_other_settings_are_other_points(self, tiny, one, other):
        values = {"model": tiny, "text": OWN}
        assert sweep(**values | one).points[0].loss != sweep(**values | other).points[0].loss

    def test_a_text_of_ones_own(self):
        found = sweep(text=OWN, tokens=128)
        assert found.tokens == 128
        assert "your own text" in found.text
        assert found.original.perplexity != sweep(tokens=128).original.perplexity

    @pytest.mark.parametrize("text", ["Too short.", "It has characters enough, but not many a token: " + "a" * 10])
    def test_a_text_that_is_too_short(self, text):
        with pytest.raises(InputError, match=r"too few to measure perplexity on: (give|paste text of) 65"):
            quantization_model.run(parse("quantization_model", {"text": text}), LocalJob())

    def test_only_spaces_are_no_text(self):
        assert quantization_model.Params(text="  \n ").text == ""

    def test_an_encoder_has_no_perplexity(self):
        for run in (sweep, sensitivity, compare):
            with pytest.raises(InputError, match="is an encoder"):
                run(model=MINILM)

    @pytest.mark.parametrize("values", [{"widths": ()}, {"widths": (1,)}, {"methods": ("luck",)}, {"tokens": 63}])
    def test_what_makes_no_sense(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            sweep(**values)

    @pytest.mark.parametrize("loss", [1e4, math.nan])
    def test_a_model_without_a_finite_perplexity_is_said_to_have_none(self, tiny, monkeypatch, loss):
        monkeypatch.setattr(_quantization_perplexity, "measure", lambda *_: Perplexity(loss, 2 * 64, (loss, loss)))
        found = sweep(model=tiny, text=OWN)
        assert not math.isfinite(found.original.perplexity)
        assert found.sentence.startswith("Even as it is, the model has no finite perplexity on this text")
        assert not re.search(r"\b(nan|inf)\b", found.sentence)

    @pytest.mark.parametrize(
        ("value", "words"),
        [(5.2768, "5.277"), (697.37, "697.4"), (42_029.97, "42,000"), (1e6, "1,000,000"), (math.inf, "∞")],
    )
    def test_a_perplexity_in_words(self, value, words):
        assert _quantization_perplexity.in_words(value) == words
        assert _quantization_perplexity.in_words(math.nan) == "no number"


class TestMap:
    def test_every_layer_has_the_error_that_its_own_page_shows(self):
        found = quantization_map.run(quantization_map.Params(bits=3), LocalJob())
        assert (found.blocks, len(found.kinds)) == ([str(block) for block in range(6)], 7)
        assert np.isfinite(found.sqnr_db).all()
        np.testing.assert_allclose(found.relative_error, 10 ** (-found.sqnr_db / 20))
        row, column = found.blocks.index("3"), found.kinds.index("self_attn.o_proj")
        assert found.names[row][column] == LAYER
        assert found.sqnr_db[row, column] == pytest.approx(
            quantization.run(quantization.Params(layer=LAYER, bits=3), LocalJob()).distortion.sqnr_db
        )
        assert found.relative_error.max() == found.relative_error[np.array(found.names) == found.worst][0]
        assert found.bits_per_weight == 3.5
        assert [entry.name for entry in found.left] == ["model.embed_tokens.weight"]

    def test_layers_outside_of_blocks_have_a_row(self, tiny):
        found = quantization_map.run(quantization_map.Params(model=tiny), LocalJob())
        assert found.blocks == ["0", "1", "2", "outside"]
        assert found.names[-1][found.kinds.index("lm_head")] == "lm_head"
        assert np.isnan(found.sqnr_db).sum() == found.names[-1].count("") + 3
        assert found.done == found.total == 22

    def test_no_two_layers_have_one_place(self):
        layers = [
            *(
                f"{stack}.layers.{number}.{kind}"
                for stack in ("encoder", "decoder")
                for number in (0, 1)
                for kind in "ab"
            ),
            "pooler.dense",
            "cls.transform.dense",
        ]
        places = _quantization_source.places_of(layers)
        assert list(places) == layers
        assert len(set(places.values())) == len(layers)
        assert places["encoder.layers.1.b"] == ("encoder 1", "b")
        assert places["cls.transform.dense"] == ("outside", "cls.transform.dense")
        assert _quantization_source.places_of(["model.layers.3.mlp.up_proj"]) == {
            "model.layers.3.mlp.up_proj": ("3", "mlp.up_proj")
        }

    def test_every_layer_of_an_encoder_is_on_the_map(self):
        found = quantization_map.run(quantization_map.Params(model=MINILM), LocalJob())
        assert sum(name != "" for row in found.names for name in row) == found.done == found.total

    def test_it_grows_and_can_be_stopped(self):
        shown = []
        job = LocalJob(on_show=shown.append)
        job._on_progress = lambda progress: setattr(job, "cancelled", progress.step == 5)
        found = quantization_map.run(quantization_map.Params(), job)
        assert [partial.done for partial in shown] == [1, 2, 3, 4, 5]
        assert (found.done, found.ended) == (5, "cancelled")
        assert np.isfinite(found.relative_error).sum() == 5
        assert "5 of 42" in found.ending


class TestSensitivity:
    def test_each_part_is_quantized_alone(self):
        found = sensitivity(unit="kind", bits=2)
        assert [part.name for part in found.parts] == found.kinds
        model = pretrained.load()
        text = _quantization_perplexity.read_text(quantization_model.Params(tokens=256), model)
        alone = quantize_layers(model.model, "nf2", per_block(64), layers=lambda name: name.endswith("o_proj"))
        part = found.parts[found.kinds.index("self_attn.o_proj")]
        assert part.perplexity == pytest.approx(measure_perplexity(alone, text.blocks).value, rel=1e-4)
        assert part.increase == pytest.approx(part.perplexity / found.original_perplexity - 1)
        assert found.text_blocks == 1
        assert math.isnan(part.error)
        assert part.weights == 6 * 256 * 256
        assert found.quantized_perplexity > max(one.perplexity for one in found.parts)

    def test_every_change_has_its_standard_error_over_the_text(self):
        found = sensitivity(unit="kind", bits=3, tokens=1024)
        model = pretrained.load()
        text = _quantization_perplexity.read_text(quantization_model.Params(tokens=1024), model)
        assert found.text_blocks == len(text.blocks) == 4
        alone = quantize_layers(model.model, "nf3", per_block(64), layers=lambda name: name.endswith("v_proj"))
        before, after = (
            torch.tensor([measure_perplexity(each, TokenBlocks(row[None])).loss for row in text.blocks.ids])
            for each in (model.model, alone)
        )
        part = found.parts[found.kinds.index("self_attn.v_proj")]
        assert part.error == pytest.approx((1 + part.increase) * (after - before).std().item() / 2, rel=1e-2)

    def test_the_sentence_says_by_how_much(self, tiny):
        found = sensitivity(model=tiny, text=OWN, unit="kind", bits=2)
        worst = max(part.increase for part in found.parts)
        at_once = found.quantized_perplexity / found.original_perplexity - 1
        one_by_one = sum(part.increase for part in found.parts)
        said = [f"{change:+.2%}".replace("-", "−") for change in (worst, at_once, one_by_one)]
        assert found.sentence.endswith(
            f"hurts most: perplexity {said[0]}. All parts at once: {said[1]}. "
            f"One by one, their changes add up to {said[2]}."
        )

    @pytest.mark.parametrize("unit", ["layer", "block", "kind"])
    @pytest.mark.parametrize(
        ("costs", "everything", "said"),
        [
            ([0.01, -0.002], -0.0002, ["+1.00%", "−0.02%", "+0.80%"]),
            ([-0.0002, -0.0003], None, ["−0.02%"]),
            ([0.00001, -0.00001], 0.0, ["0.00%", "0.00%", "0.00%"]),
            ([12.5, 0.1], 1e6, ["13.5 times the original", "1,000,000 times the original", "13.6 times the original"]),
            ([0.5, math.inf], math.inf, ["beyond counting", "beyond counting"]),
            ([0.5, math.nan, 0.2], 0.7, ["no number", "+70.00%"]),
        ],
    )
    def test_the_sentence_reads_well(self, unit, costs, everything, said):
        parts = [
            quantization_sensitivity.PartCost(f"part{i}", "", "", 1, 5 * (1 + cost), cost, 0.0, 0.0)
            for i, cost in enumerate(costs)
        ]
        total = None if everything is None else 5 * (1 + everything)
        params = quantization_sensitivity.Params(unit=unit)
        words = quantization_sensitivity._describe(params, parts, 5.0, total).removeprefix(params.in_words)
        worst = next((i for i, cost in enumerate(costs) if math.isnan(cost)), int(np.argmax(costs)))
        assert f"part{worst} alone hurts most: perplexity {said[0]}." in words
        assert words.count("perplexity") == 1
        assert "-" not in words
        assert not re.search(r"\b(nan|inf)\b", words)
        figures = re.findall(r"[+−]?[\d.,]+%|[\d.,]+ times the original|beyond counting|no number", words)
        assert figures == said

    def test_beyond_tenfold_the_sentence_says_how_many_times(self):
        found = sensitivity(unit="block", bits=2)
        times = found.quantized_perplexity / found.original_perplexity
        assert times > 1000
        said = f"All parts at once: {_quantization_perplexity.in_words(times)} times the original."
        assert said in found.sentence

    def test_parts_of_another_device_and_of_a_changed_model_are_measured_anew(self, tiny, tmp_path, monkeypatch):
        measured, original = [], quantization_sensitivity._measure

        def watch(*given):
            measured.append(given)
            return original(*given)

        monkeypatch.setattr(quantization_sensitivity, "_measure", watch)
        model = AutoModelForCausalLM.from_pretrained(tiny)
        tokenizer = pretrained.load(tiny).tokenizer

        def run(device="cpu"):
            before = len(measured)
            job = LocalJob()
            job.device = device
            found = sensitivity(job, model=str(tmp_path), text=OWN, unit="block", bits=2)
            return found, len(measured) - before

        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        first, count = run()
        assert count == len(first.parts) + 1
        assert run()[1] == 0
        assert run("cpu:0")[1] == count
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(3)
        model.save_pretrained(tmp_path)
        changed, again = run()
        assert again == count
        assert changed.quantized_perplexity != first.quantized_perplexity

    @pytest.mark.parametrize(("unit", "count"), [("layer", 22), ("block", 4), ("kind", 8)])
    def test_parts_cover_the_map(self, tiny, unit, count):
        found = sensitivity(model=tiny, unit=unit)
        assert len(found.parts) == found.total == count
        whole = quantization_map.run(quantization_map.Params(model=tiny), LocalJob())
        assert (found.blocks, found.kinds) == (whole.blocks, whole.kinds)
        assert sum(part.weights for part in found.parts) == sum(math.prod(shape) for shape in whole.shapes.values())
        for part in found.parts:
            if unit == "layer":
                assert part.name == whole.names[whole.blocks.index(part.block)][whole.kinds.index(part.kind)]
            else:
                assert part.name == (part.block or part.kind)

    def test_it_grows_stops_and_goes_on(self, tiny):
        shown = []
        part = sensitivity(stop_after(3, on_show=shown.append), model=tiny, text=OWN)
        assert [len(partial.parts) for partial in shown] == [1, 2, 3]
        assert (part.ended, len(part.parts), part.quantized_perplexity) == ("cancelled", 3, None)
        whole = sensitivity(model=tiny, text=OWN)
        assert whole.parts[:3] == part.parts
        assert whole.ended == "finished"


class TestSideBySide:
    def test_both_go_on_as_our_own_decoder_does(self):
        found = compare(bits=2)
        model = pretrained.load()
        ids = torch.tensor([model.encode(quantization_side_by_side.Params().prompt)])
        for source, said in (
            (model.model, found.original_tokens),
            (quantize_layers(model.model, "nf2", per_block(64)), found.quantized_tokens),
        ):
            expected = generate(llama.from_transformers(source), ids, 12)[0, ids.shape[1] :]
            assert said == model.readable(expected.tolist())
        first = found.first_difference
        assert found.original_tokens[:first] == found.quantized_tokens[:first]
        assert found.original_tokens[first] != found.quantized_tokens[first]
        assert found.quantized_perplexity > 100 > found.original_perplexity

    def test_eight_bits_say_the_same(self):
        found = compare(bits=8, new_tokens=20)
        assert found.first_difference is None
        assert found.original_text == found.quantized_text
        assert "same 20 tokens" in found.sentence
        assert found.moved < 0.01

    def test_attention_before_and_after(self):
        found = compare(bits=3, attention_layer=4, attention_head=2)
        for attention in (found.original_map, found.quantized_map):
            np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
        moved = np.abs(found.original_map - found.quantized_map).sum(-1).mean() / 2
        assert found.moved == pytest.approx(moved, rel=1e-4)
        assert found.moved == found.moved_by_head[4, 2]
        assert found.moved_by_head.shape == (6, 8)
        assert 0 < found.moved_by_head.max() < 1
        assert len(found.prompt_tokens) == len(found.original_map)

    def test_better_methods_move_less_attention(self):
        moved = {method: compare(bits=2, method=method).moved_by_head.mean() for method in ("rounding", "GPTQ")}
        assert moved["GPTQ"] < moved["rounding"]

    def test_sizes(self):
        found = compare()
        assert found.original_nbytes == 2 * 4_718_592
        assert found.quantized_nbytes == 4.5 / 8 * 4_718_592

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"attention_layer": 6}, "no layer 6: storyteller has 6 of them, 0 to 5"),
            ({"attention_head": 8}, "no head 8"),
            ({"prompt": "word " * 200}, "takes 128: shorten it"),
        ],
    )
    def test_what_is_not_there(self, values, words):
        with pytest.raises(InputError, match=words):
            compare(**values)

    def test_a_prompt_beyond_the_context(self, tiny):
        with pytest.raises(InputError, match="exceed the 64 that"):
            compare(model=tiny, new_tokens=64)

    def test_cancelled(self):
        with pytest.raises(JobCancelledError):
            compare(stop_after(2))
