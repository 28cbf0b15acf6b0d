"""What the quantization lab checks live: ours against bitsandbytes, and the properties of quantized weights."""

import json

import pytest
from bitsandbytes import functional

from engine import experiments
from engine.experiments import (
    _quantization,
    _quantization_source,
    quantization,
    quantization_crosscheck,
    quantization_tests,
)
from engine.runtime.jobs import LocalJob


def check(**values):
    return quantization_tests.run(quantization_tests.Params(**values), LocalJob()).checks


class TestCrossCheck:
    @pytest.mark.parametrize("data_type", ["NormalFloat", "FP4 (bitsandbytes)"])
    @pytest.mark.parametrize("source", ["model layer", "Student-t"])
    def test_no_code_and_no_value_differs(self, data_type, source):
        params = quantization_crosscheck.Params(data_type=data_type, source=source)
        found = quantization_crosscheck.run(params, LocalJob())
        assert found.reason == ""
        assert (found.differing_codes, found.differing_values, found.max_difference) == (0, 0, 0)
        assert found.ours_ms == found.ours["median_ms"] > 0
        assert found.theirs_ms == found.theirs["median_ms"] > 0
        assert "bitsandbytes" in found.theirs["versions"]
        json.dumps(experiments.to_plain(found))

    @pytest.mark.parametrize("source", ["model layer", "normal", "Student-t"])
    def test_scales_that_are_quantized_themselves_are_compared_too(self, source):
        """bitsandbytes' search for the nearest 8-bit code misses it for a few; what is shown is what is compared."""
        values = {"source": source, "double_quantization": True}
        found = quantization_crosscheck.run(quantization_crosscheck.Params(**values), LocalJob())
        assert found.differing_codes == 0
        assert found.differing_values <= 64 * found.differing_scales
        assert (found.differing_values > 0) == (found.differing_scales > 0)
        assert f"{found.differing_values} values differ, of " in found.sentence
        assert f"scales {found.differing_scales} in their 8-bit code" in found.sentence
        params = quantization_crosscheck.Params(**values)
        weights = _quantization_source.read_weights(params, LocalJob())
        payload, state = functional.quantize_4bit(weights.values, compress_statistics=True, quant_type="nf4")
        theirs = functional.dequantize_4bit(payload, state)
        assert found.differing_values == (weights.quantize(params).dequantize() != theirs).sum()

    @pytest.mark.parametrize("source", ["model layer", "normal", "Student-t", "normal with outliers"])
    def test_8_bit_integers_per_channel(self, source, monkeypatch):
        values = {"data_type": "Integer", "bits": 8, "scale": "per channel", "source": source}
        found = quantization_crosscheck.run(quantization_crosscheck.Params(**values), LocalJob())
        assert (found.differing_codes, found.differing_values) == (0, 0)
        assert "rounded to float16" in found.sentence
        assert all(one.passed for one in check(**values))
        original = functional.int8_vectorwise_quant

        def shifted(*args):
            codes, *rest = original(*args)
            codes[0, :10] ^= 3
            return codes, *rest

        monkeypatch.setattr(functional, "int8_vectorwise_quant", shifted)
        found = quantization_crosscheck.run(quantization_crosscheck.Params(**values), LocalJob())
        assert (found.differing_codes, found.differing_values) == (10, 10)
        assert [one.name for one in check(**values) if not one.passed] == ["bitsandbytes chooses the same levels"]

    def test_a_difference_would_be_seen(self, monkeypatch):
        """With another library's codes moved by one, every count says so."""
        original = functional.quantize_4bit

        def shifted(*args, **values):
            payload, state = original(*args, **values)
            payload[:10] ^= 0x11
            return payload, state

        monkeypatch.setattr(functional, "quantize_4bit", shifted)
        found = quantization_crosscheck.run(quantization_crosscheck.Params(), LocalJob())
        assert found.differing_codes == found.differing_values == 20
        assert found.max_difference > 0
        checks = check()
        assert [one.name for one in checks if not one.passed] == ["bitsandbytes chooses the same levels"]

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"bits": 3}, "layers have no NormalFloat, 3 bits"),
            ({"data_type": "Integer"}, "layers have no Integer, 4 bits"),
            ({"data_type": "Integer", "bits": 8, "symmetric": False}, "no Integer, 8 bits, asymmetric"),
            ({"data_type": "Integer", "bits": 8}, "one scale per block: choose one per channel"),
            ({"data_type": "Integer", "bits": 8, "scale": "per channel", "double_quantization": True}, "switch double"),
            ({"scale": "per channel"}, "one scale per channel"),
            ({"block_size": 100}, "no 4-bit blocks of 100"),
        ],
    )
    def test_why_there_is_nothing_to_compare_with(self, values, words):
        found = quantization_crosscheck.run(quantization_crosscheck.Params(**values), LocalJob())
        assert words in found.reason
        page = quantization.run(quantization.Params(**values), LocalJob())
        assert page.crosscheck == found.reason
        assert found.ours is None


class TestChecks:
    @pytest.mark.parametrize("data_type", _quantization.FORMATS)
    @pytest.mark.parametrize("scale", ["per block", "per channel", "per tensor"])
    @pytest.mark.parametrize("double_quantization", [False, True])
    @pytest.mark.parametrize("source", ["model layer", "Student-t"])
    def test_all_hold(self, data_type, scale, double_quantization, source):
        for symmetric in (True, False):
            checks = check(
                data_type=data_type,
                scale=scale,
                double_quantization=double_quantization,
                source=source,
                symmetric=symmetric,
                block_size=100,
                bits=3,
            )
            assert len(checks) >= 7
            assert [one for one in checks if not one.passed] == []

    def test_a_quantizer_that_rounds_down_is_found_out(self, monkeypatch):
        from engine.quantization.data_types import DataType

        original = DataType.encode
        monkeypatch.setattr(DataType, "encode", lambda self, x: original(self, x - 0.04))
        failed = {one.name for one in check() if not one.passed}
        assert "Each weight gets its nearest level" in failed

    def test_zeros_that_do_not_stay_zero_among_others_are_found_out(self, monkeypatch):
        """What the CUDA kernels do in NF4: a block of zeros has the lowest code."""
        from engine.quantization.tensor import Grid

        original = Grid.encode
        monkeypatch.setattr(
            Grid, "encode", lambda self, groups: original(self, groups.where(groups.any(1, keepdim=True), -1e30))
        )
        failed = {one.name for one in check(double_quantization=True) if not one.passed}
        assert "Zero stays zero" in failed

    def test_a_forgotten_scale_is_found_out(self, monkeypatch):
        from engine.quantization.tensor import QuantizedTensor

        monkeypatch.setattr(QuantizedTensor, "nbytes", property(lambda self: self.payload.nbytes))
        failed = {one.name for one in check() if not one.passed}
        assert "Bits counted are bytes stored" in failed
