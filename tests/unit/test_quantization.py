"""Data types, packing, groups and quantized tensors: levels as defined, bits counted, rounding to the nearest."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import (
    dequantize_nf4,
    dequantize_uniform_4bit,
    double_quantize_4bit,
    get_tensor_memory_mb,
    quantize_4bit,
    quantize_nf4,
    quantize_uniform_4bit,
)
from engine.errors import InputError
from engine.quantization.data_types import (
    DATA_TYPE_NAMES,
    bitsandbytes_fp4,
    data_type,
    floating_point,
    integer,
    normal_float,
)
from engine.quantization.distortion import gaussian_bound_db, measure_distortion
from engine.quantization.grouping import per_block, per_channel, per_tensor
from engine.quantization.outliers import int8_product, split_outliers
from engine.quantization.packing import pack, unpack
from engine.quantization.tensor import quantize

SEEDS = range(5)
WIDTHS = range(2, 9)
GROUPINGS = [per_tensor(), per_channel(), per_block(64), per_block(24), per_block(24, within_rows=True)]


def normal(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(x, levels):
    """The distance from each x to its nearest level, by trying them all."""
    return (x[..., None].double() - levels.double()).abs().amin(-1)


class TestContract:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_normal_float_beats_uniform_on_normal_weights(self, seed):
        w = normal(seed, 256, 256)
        nf4 = measure_distortion(w, dequantize_nf4(quantize_nf4(w)))
        uniform = measure_distortion(w, dequantize_uniform_4bit(quantize_uniform_4bit(w)))
        assert nf4.mse < 0.8 * uniform.mse
        assert nf4.mean_absolute < 0.85 * uniform.mean_absolute

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", ["nf4", "nf3", "int4", "int8", "uint4", "fp4-bnb", "fp4-e2m1", "fp8-e4m3"])
    @pytest.mark.parametrize("double_quantization", [False, True])
    def test_a_block_of_zeros_among_others_stays_zero(self, seed, name, double_quantization):
        w = normal(seed, 512, 64)
        w[17] = 0
        assert (quantize(w, name, double_quantization=double_quantization).dequantize()[17] == 0).all()

    @pytest.mark.parametrize("seed", SEEDS)
    def test_double_quantization_is_smaller_and_hardly_worse(self, seed):
        w = normal(seed, 1024, 1024)
        single, double = quantize_4bit(w), double_quantize_4bit(w)
        assert single.bits_per_weight == 4.5
        assert double.bits_per_weight == pytest.approx(4.127, abs=5e-4)
        assert get_tensor_memory_mb(double) < get_tensor_memory_mb(single) < 0.15 * get_tensor_memory_mb(w)
        errors = [measure_distortion(w, q.dequantize()).mean_absolute for q in (single, double)]
        assert errors[1] < 1.01 * errors[0]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("name", "expected"), [("nf4", 0.0728), ("fp4-bnb", 0.0965)])
    def test_mean_absolute_error_of_normal_weights(self, seed, name, expected):
        w = normal(seed, 1024, 1024)  # over seeds the figure has a standard deviation of 0.0001
        assert measure_distortion(w, quantize(w, name).dequantize()).mean_absolute == pytest.approx(expected, abs=3e-4)

    def test_a_tensor_of_another_type_is_refused(self):
        q = quantize_nf4(normal(0, 64))
        with pytest.raises(InputError, match=r"holds nf4 codes, not int4"):
            dequantize_uniform_4bit(q)


class TestDataTypes:
    @pytest.mark.parametrize("name", DATA_TYPE_NAMES)
    def test_levels_are_sorted_codes_are_distinct_and_every_level_is_itself(self, name):
        kind = data_type(name)
        assert (kind.codebook.diff() > 0).all() or name == "fp4-bnb"  # which has two zeros
        assert len(kind.patterns.unique()) == len(kind.codebook) <= 2**kind.bits
        assert 0 in kind.codebook
        assert torch.equal(kind.round(kind.codebook), kind.codebook)

    @pytest.mark.parametrize("name", DATA_TYPE_NAMES)
    @pytest.mark.parametrize("seed", range(3))
    def test_rounds_to_the_nearest_level_and_saturates(self, name, seed):
        kind = data_type(name)
        x = normal(seed, 2000, scale=0.6 * kind.peak)
        error = (x.double() - kind.round(x).double()).abs()
        torch.testing.assert_close(error, nearest(x, kind.codebook), atol=1e-7 * kind.peak, rtol=0)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_integers(self, bits):
        assert integer(bits).codebook.tolist() == list(range(1 - 2 ** (bits - 1), 2 ** (bits - 1)))
        assert integer(bits, symmetric=False).codebook.tolist() == list(range(2**bits))
        x = normal(bits, 1000, scale=2 ** (bits - 1))
        halves = torch.arange(-20, 20) + 0.5
        for values in (x, halves):
            limit = 2 ** (bits - 1) - 1
            assert torch.equal(integer(bits).round(values), values.round().clamp(-limit, limit))

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_normal_float_has_one_more_positive_level_and_about_equal_use(self, bits):
        levels = normal_float(bits).codebook
        assert (levels[0], levels[-1], len(levels)) == (-1, 1, 2**bits)
        assert ((levels < 0).sum(), (levels > 0).sum()) == (2 ** (bits - 1) - 1, 2 ** (bits - 1))
        if bits < 3:
            return
        outermost = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
        sigma = torch.special.ndtri(torch.tensor(outermost, dtype=torch.float64))
        places = torch.special.ndtr(sigma * levels.double())  # the quantiles that the levels are
        for side in (places[levels <= 0], places[levels >= 0]):
            torch.testing.assert_close(side.diff(), side.diff().mean().expand(len(side) - 1), atol=2e-6, rtol=0)

    def test_fp4_of_bitsandbytes_is_e2m1_but_for_its_smallest_number(self):
        ours = floating_point(2, 1).codebook
        theirs = (6 * bitsandbytes_fp4().codebook).unique()
        assert ours.tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
        differing = ours[(ours - theirs).abs() > 1e-6]
        assert differing.tolist() == [-0.5, 0.5]
        assert (theirs[(ours - theirs).abs() > 1e-6] * 16).tolist() == [-0.5, 0.5]

    @pytest.mark.parametrize(
        ("name", "reference", "largest"),
        [("fp8-e4m3", torch.float8_e4m3fn, 448.0), ("fp8-e5m2", torch.float8_e5m2, 57344.0)],
    )
    @pytest.mark.parametrize("seed", range(3))
    def test_fp8_rounds_as_pytorch_does(self, name, reference, largest, seed):
        kind = data_type(name)
        finite = torch.arange(256, dtype=torch.uint8).view(reference).float()
        finite = finite[finite.isfinite()].unique()
        assert torch.equal(kind.codebook.unique(), finite)
        halfway = (finite[:-1] + finite[1:]) / 2
        powers = torch.randint(-18, 16, (5000,), generator=torch.Generator().manual_seed(seed))
        spread = (normal(seed, 5000) * 2.0**powers).clamp(-largest, largest)
        for x in (halfway, spread):
            assert torch.equal(kind.round(x), x.to(reference).float())
            same = kind.round(x) != 0  # of the two zeros ours writes +0
            assert torch.equal(kind.encode(x)[same], x.to(reference).view(torch.uint8)[same])
        beyond = torch.tensor([1e6, -1e6, 3e38])
        assert kind.round(beyond).tolist() == [largest, -largest, largest]

    @pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
    @pytest.mark.parametrize("build", [integer, normal_float])
    def test_another_number_of_bits_is_refused(self, build, bits):
        with pytest.raises(InputError, match=rf"bits is {bits}: give 2 to 8"):
            build(bits)

    @pytest.mark.parametrize("name", ["int1", "nf9", "bf16"])
    def test_an_unknown_name_is_refused_with_what_there_is(self, name):
        with pytest.raises(InputError, match=rf"no data type '{name}'.*int2.*nf4.*fp8-e4m3.*at least 2 bits"):
            quantize(normal(0, 4), name)


class TestPacking:
    @given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 99))
    @settings(max_examples=80, derandomize=True, deadline=None)
    def test_codes_come_back_and_take_their_bits(self, bits, count, seed):
        codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        packed = pack(codes, bits)
        assert len(packed) == math.ceil(count * bits / 8)
        assert torch.equal(unpack(packed, bits, count), codes)
        written = "".join(f"{code:0{bits}b}" for code in codes.tolist()).ljust(8 * len(packed), "0")
        assert "".join(f"{byte:08b}" for byte in packed.tolist()) == written


class TestQuantize:
    @pytest.mark.parametrize("name", DATA_TYPE_NAMES)
    @pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_weight_is_within_half_a_gap_of_its_group_and_bits_are_counted(self, name, grouping, dtype):
        w = normal(1, 10, 33).to(dtype)
        q = quantize(w, name, grouping)
        back = q.dequantize()
        assert (back.shape, back.dtype) == (w.shape, dtype)
        groups = {"tensor": 1, "channel": 10, "block": math.ceil(330 / (grouping.size or 1)), "row block": 20}
        count = groups[grouping.kind]
        bits, asymmetric = q.data_type.bits, name.startswith("uint")
        zero_bytes = math.ceil(count * bits / 8) if asymmetric else 0
        assert q.nbytes == math.ceil(330 * bits / 8) + 4 * count + zero_bytes
        assert q.bits_per_weight == 8 * q.nbytes / 330
        gap = q.data_type.codebook.diff().max().item() / q.data_type.peak  # of the group's largest magnitude, at most
        extent = grouping.split(w.float())
        extent = (extent.amax(1).clamp(min=0) - extent.amin(1).clamp(max=0)) if asymmetric else extent.abs().amax(1)
        bound = grouping.join(extent[:, None].expand_as(grouping.split(w.float())), w.shape) * gap / 2
        slack = extent.max() * (2 * torch.finfo(dtype).eps + (gap / 2 if asymmetric else 0))  # its zero is rounded too
        assert ((back.float() - w.float()).abs() <= bound + slack).all()

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", ["int4", "uint4", "nf4", "fp4-e2m1"])
    def test_quantizing_what_is_quantized_changes_nothing(self, seed, name):
        once = quantize(normal(seed, 40, 64), name)
        again = quantize(once.dequantize(), name)
        torch.testing.assert_close(again.dequantize(), once.dequantize(), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("name", [name for name in DATA_TYPE_NAMES if not name.startswith("uint")])
    @pytest.mark.parametrize("factor", [0.125, 64.0])
    def test_the_scale_of_the_weights_does_not_matter(self, name, factor):
        w = normal(3, 8, 64)
        small, large = quantize(w, name), quantize(factor * w, name)
        assert torch.equal(small.codes, large.codes)
        assert torch.equal(factor * small.dequantize(), large.dequantize())

    @pytest.mark.parametrize("bits", range(3, 9))
    def test_a_bit_more_is_about_6_db_and_the_bound_is_never_passed(self, bits):
        w = normal(0, 512, 512)
        fewer, more = (
            measure_distortion(w, quantize(w, f"int{width}").dequantize()).sqnr_db for width in (bits - 1, bits)
        )
        assert 5.5 < more - fewer < 9.5
        assert more < gaussian_bound_db(quantize(w, f"int{bits}").bits_per_weight)
        assert gaussian_bound_db(1) == pytest.approx(6.0206, abs=1e-4)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_a_zero_point_pays_where_weights_are_on_one_side(self, bits):
        w = normal(bits, 64, 64).abs() + 1
        symmetric, asymmetric = (
            measure_distortion(w, quantize(w, f"{kind}{bits}").dequantize()) for kind in ("int", "uint")
        )
        assert asymmetric.mse < 0.5 * symmetric.mse

    @pytest.mark.parametrize("bits", range(3, 9))
    def test_with_a_zero_point_rounding_is_to_the_nearest_between_the_ends(self, bits):
        w = normal(bits, 64, 64) + 0.3
        q = quantize(w, f"uint{bits}", per_block(64))
        between = (q.codes > 0) & (q.codes < 2**bits - 1)
        error = (q.dequantize() - w).abs()
        assert (error <= 0.5001 * q.scales[:, None])[between].all()

    def test_one_outlier_spoils_its_block_and_no_other(self):
        w = normal(0, 1024)
        spoilt = w.clone()
        spoilt[70] = 1000.0
        before, after = (quantize(x, "int4", per_block(64)).dequantize() for x in (w, spoilt))
        assert torch.equal(before[:64], after[:64])
        assert torch.equal(before[128:], after[128:])
        others = [index for index in range(64, 128) if index != 70]
        assert (after[others] == 0).all()

    @pytest.mark.parametrize("name", DATA_TYPE_NAMES)
    @pytest.mark.parametrize("double", [False, True])
    def test_zeros_are_exact(self, name, double):
        w = torch.zeros(3, 50)
        assert torch.equal(quantize(w, name, per_block(64), double_quantization=double).dequantize(), w)
        w[1, :25] = normal(0, 25)
        assert (quantize(w, name, per_block(25)).dequantize()[w == 0] == 0).all()

    @pytest.mark.parametrize("name", [name for name in DATA_TYPE_NAMES if name != "dynamic8"])
    @pytest.mark.parametrize("value", [0.3, -7.0, 1e-30, 1e30])
    def test_a_constant_is_exact_to_a_rounding(self, name, value):
        w = torch.full((4, 40), value)
        torch.testing.assert_close(quantize(w, name).dequantize(), w, rtol=3e-7, atol=0)

    @pytest.mark.parametrize(
        ("index", "value", "words"),
        [
            ((2, 5), math.nan, r"hold nan at index \[2, 5\], the first of 2"),
            ((0, 1), math.inf, r"hold inf at index \[0, 1\]"),
        ],
    )
    def test_numbers_that_are_not_finite_are_refused_with_their_place(self, index, value, words):
        w = normal(0, 4, 8)
        w[index] = w[3, 7] = value
        with pytest.raises(InputError, match=words):
            quantize(w)

    @pytest.mark.parametrize("name", DATA_TYPE_NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("double", [False, True])
    def test_the_largest_numbers_of_a_dtype_stay_finite(self, name, dtype, double):
        """A zero point is rounded, and so may a level lie beyond the largest weight."""
        largest = torch.finfo(dtype).max * (1 if dtype == torch.float16 else 0.4)
        w = (normal(0, 2, 64).clamp(-1, 1) * largest).to(dtype)
        w[0, :2] = torch.tensor([largest, -largest])
        assert quantize(w, name, double_quantization=double).dequantize().isfinite().all()

    @pytest.mark.parametrize("seed", range(20))
    def test_scales_that_are_quantized_themselves_stay_within_float32(self, seed):
        """A mean that is added to the largest difference from it may be rounded to more."""
        w = normal(seed, 8 + seed, 64)
        w[0] *= torch.finfo(torch.float32).max / w[0].abs().max()
        q = quantize(w, double_quantization=True)
        assert q.scales.dequantize().isfinite().all()
        assert q.dequantize().isfinite().all()

    @pytest.mark.parametrize("name", DATA_TYPE_NAMES)
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_narrower_dtype_holds_its_largest_number_where_the_weight_is_beyond(self, name, double, seed):
        q = quantize(normal(seed, 4, 64, scale=1e5), name, double_quantization=double)
        wide, largest = q.dequantize(), torch.finfo(torch.float16).max
        assert (wide.abs() > largest).any()
        assert torch.equal(replace(q, dtype=torch.float16).dequantize(), wide.clamp(-largest, largest).half())

    def test_scales_that_float32_cannot_hold_are_refused_in_words(self):
        far_apart = torch.tensor([3e38, -3e38, 1, 2])
        with pytest.raises(InputError, match=r"further apart than float32.*no scale of uint4 fits"):
            quantize(far_apart, "uint4")
        assert quantize(far_apart, "int4").dequantize().isfinite().all()
        huge = torch.full((64 * 8,), 3e38)
        with pytest.raises(InputError, match=r"^The scales of these weights.*leave double quantization off"):
            quantize(huge, "nf4", double_quantization=True)
        torch.testing.assert_close(quantize(huge, "nf4").dequantize(), huge)

    @pytest.mark.parametrize("within_rows", [False, True])
    def test_a_block_is_no_longer_than_what_there_is(self, within_rows):
        w = normal(0, 4, 33)
        long, whole = per_block(2**40, within_rows), per_channel() if within_rows else per_tensor()
        assert long.split(w).shape == whole.split(w).shape
        one, other = quantize(w, "int4", long), quantize(w, "int4", whole)
        assert torch.equal(one.dequantize(), other.dequantize())
        assert one.nbytes == other.nbytes

    def test_what_is_no_weight_is_refused(self):
        with pytest.raises(InputError, match="int64: give floating-point"):
            quantize(torch.arange(4))
        with pytest.raises(InputError, match=r"shape \(0, 3\), there is nothing"):
            quantize(torch.zeros(0, 3))
        with pytest.raises(InputError, match="block size is 1: give 2 or more"):
            per_block(1)
        for size in (2.5, math.nan, "64"):
            with pytest.raises(InputError, match=r"block size is .*: give a whole number"):
                per_block(size)

    def test_a_parameter_is_quantized_without_gradients_and_left_as_it_is(self):
        w = torch.nn.Parameter(normal(0, 4, 64))
        before = w.detach().clone()
        assert not quantize(w).dequantize().requires_grad
        assert torch.equal(w, before)

    @given(rows=st.integers(1, 5), columns=st.integers(1, 40), size=st.integers(2, 50), within=st.booleans())
    @settings(max_examples=60, derandomize=True, deadline=None)
    def test_groups_join_to_what_they_were_split_from(self, rows, columns, size, within):
        values = normal(0, rows, columns)
        grouping = per_block(size, within)
        assert torch.equal(grouping.join(grouping.split(values), values.shape), values)


class TestDistortion:
    def test_by_hand(self):
        measured = measure_distortion(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.0]))
        assert (measured.mse, measured.max, measured.mean_absolute) == (0.5, 1.0, 0.5)
        assert measured.sqnr_db == pytest.approx(10 * math.log10(25))

    def test_nothing_lost_is_infinitely_good_and_something_from_nothing_infinitely_bad(self):
        assert measure_distortion(torch.zeros(2), torch.zeros(2)).sqnr_db == math.inf
        assert measure_distortion(torch.zeros(2), torch.ones(2)).sqnr_db == -math.inf

    def test_other_shapes_are_refused(self):
        with pytest.raises(InputError, match=r"\(2,\) and \(3,\)"):
            measure_distortion(torch.zeros(2), torch.zeros(3))


class TestOutliers:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_outlier_columns_are_kept_and_the_others_recover(self, seed):
        w = normal(seed, 32, 96)
        w[:, [5, 40]] *= 100
        split = split_outliers(w, 20.0, "int4")
        back = split.dequantize()
        assert split.columns.tolist() == [5, 40]
        assert torch.equal(back[:, [5, 40]], w[:, [5, 40]].half().float())
        regular = torch.ones(96, dtype=torch.bool)
        regular[[5, 40]] = False
        plain = quantize(w, "int4", per_channel()).dequantize()
        kept, lost = (measure_distortion(w[:, regular], x[:, regular]).mse for x in (back, plain))
        assert kept < 0.02 * lost
        assert split.nbytes == 32 * 94 // 2 + 32 * 4 + 32 * 2 * 2 + 2 * 4
        assert split.bits_per_weight == 8 * split.nbytes / (32 * 96)

    def test_without_outliers_it_is_plain_and_with_huge_ones_exact(self):
        w = normal(0, 8, 16)
        assert torch.equal(split_outliers(w, 100.0).dequantize(), quantize(w, "int8", per_channel()).dequantize())
        w[3, 2] = 1e6  # beyond float16
        assert torch.equal(split_outliers(w, 100.0).dequantize()[:, 2], w[:, 2])

    def test_what_cannot_be_split_is_refused(self):
        with pytest.raises(InputError, match=r"Every one of the 4 columns.*raise the threshold"):
            split_outliers(torch.ones(2, 4), 0.5)
        with pytest.raises(InputError, match=r"shape \(8,\): give a matrix"):
            split_outliers(torch.ones(8), 2.0)
        for threshold in (math.nan, 0.0, -1.0):
            with pytest.raises(InputError, match=rf"threshold is {threshold}: give a magnitude above 0"):
                split_outliers(torch.ones(2, 4), threshold)
        with pytest.raises(InputError, match=r"int4 per channel.*quantize a matrix to int8"):
            int8_product(torch.ones(2, 4), quantize(torch.ones(3, 4), "int4", per_channel()))
        for threshold in (math.nan, -1.0):
            with pytest.raises(
                InputError, match=rf"threshold is {threshold}: give a magnitude .*, or 0 for no outliers"
            ):
                int8_product(torch.ones(2, 4), quantize(torch.ones(3, 4), "int8", per_channel()), threshold)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    def test_activations_that_are_not_finite_are_called_activations(self, value, threshold):
        x, weight = normal(0, 2, 8), quantize(normal(1, 3, 8), "int8", per_channel())
        x[0, 3] = value
        with pytest.raises(InputError, match=rf"^The activations hold {value} at index \[0, 3\]"):
            int8_product(x, weight, threshold)

    @pytest.mark.parametrize("shape", [(2, 7), (7,), ()])
    def test_activations_of_another_width_are_refused(self, shape):
        with pytest.raises(InputError, match=r"activations have the shape .*give 8 inputs in the last dimension"):
            int8_product(torch.ones(shape), quantize(normal(1, 3, 8), "int8", per_channel()))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_product_with_outliers_needs_the_split(self, seed):
        x, w = normal(seed, 2, 7, 64), normal(seed + 100, 48, 64)
        x[..., 9] *= 60
        exact, weight = x @ w.T, quantize(w, "int8", per_channel())
        split, plain = int8_product(x, weight), int8_product(x, weight, threshold=0)
        assert 9 in split.columns
        assert len(plain.columns) == 0
        assert split.output.shape == exact.shape
        errors = [measure_distortion(exact, product.output).sqnr_db for product in (split, plain)]
        assert errors[0] > errors[1] + 6
        assert errors[0] > 35
