"""What the quantization lab checks live: ours against bitsandbytes, and the properties of quantized weights."""

import json

import pytest

from engine import experiments
from engine.experiments import _quantization, quantization, quantization_crosscheck, quantization_tests
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

    def test_a_difference_would_be_seen(self, monkeypatch):
        """With another library's codes moved by one, every count says so."""
        from bitsandbytes import functional

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
            ({"bits": 3}, "no NormalFloat of 3 bits"),
            ({"data_type": "Integer"}, "no Integer of 4 bits"),
            ({"scale": "per channel"}, "one scale per channel"),
            ({"block_size": 100}, "no blocks of 100"),
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

    def test_a_forgotten_scale_is_found_out(self, monkeypatch):
        from engine.quantization.tensor import QuantizedTensor

        monkeypatch.setattr(QuantizedTensor, "nbytes", property(lambda self: self.payload.nbytes))
        failed = {one.name for one in check() if not one.passed}
        assert "Bits counted are bytes stored" in failed
