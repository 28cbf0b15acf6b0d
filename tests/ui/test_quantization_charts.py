"""The pictures of quantized weights carry the numbers they are given, on axes that can be compared."""

import math
from itertools import pairwise

import numpy as np
import pytest

from ui import theme
from ui.charts import quantization as charts
from ui.charts import quantization_layers as maps
from ui.charts import quantization_rates as rates
from ui.charts import quantization_speed as speed
from ui.charts.quantization_rates import PerplexityPoint, RatePoint

MODES = ["light", "dark"]
SEEDS = [0, 1, 2]


def rounded(seed, count=4096, levels=15):
    """Normal weights and their nearest levels, an integer grid scaled to the largest weight."""
    weights = np.random.default_rng(seed).normal(size=count)
    half = levels // 2
    scale = np.abs(weights).max() / half
    return weights, np.round(weights / scale) * scale, np.arange(-half, half + 1) * scale


def counted(*samples, bins=61):
    edges = np.linspace(min(s.min() for s in samples), max(s.max() for s in samples), bins + 1)
    return edges, [np.histogram(sample, edges)[0] for sample in samples]


class TestHistograms:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_heights_are_the_square_roots_of_the_shares_up_and_down(self, seed):
        weights, dequantized, levels = rounded(seed)
        edges, (before, after) = counted(weights, dequantized)
        up, down, ticks = charts.histograms(edges, before, after, levels, whose_levels="levels").data
        np.testing.assert_allclose(np.square(up.y), before / before.sum())
        np.testing.assert_allclose(np.square(down.y), after / after.sum())
        assert min(up.y) >= 0 >= max(down.y)
        np.testing.assert_array_equal(up.x, down.x)
        np.testing.assert_array_equal(ticks.x, levels)
        assert not np.any(ticks.y)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_both_halves_have_one_scale_that_nothing_leaves(self, seed):
        weights, dequantized, levels = rounded(seed, levels=3)
        edges, (before, after) = counted(weights, dequantized)
        fig = charts.histograms(edges, before, after, levels, whose_levels="levels")
        low, high = fig.layout.yaxis.range
        assert low == -high
        assert high > max(abs(y) for trace in fig.data for y in trace.y)
        assert list(fig.layout.yaxis.tickvals) == [-value for value in fig.layout.yaxis.tickvals[::-1]]

    @pytest.mark.parametrize("top", [1.0, 0.4, 0.07, 0.011, 0.0031])
    def test_the_marks_are_true_and_apart(self, top):
        edges = np.linspace(-1, 1, 3)
        counts = np.array([round(1e6 * top), 0])
        rest = np.array([1_000_000 - counts[0], 0])
        fig = charts.histograms(edges, counts + rest * 0, counts, np.zeros(1), whose_levels="", top=top)
        values, texts = fig.layout.yaxis.tickvals, fig.layout.yaxis.ticktext
        for value, text in zip(values, texts, strict=True):
            assert value**2 == pytest.approx(float(text.rstrip("%")) / 100)
        assert len(values) >= 3
        assert np.diff(values).min() >= 0.05 * max(values)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_outermost_levels_are_inside_and_the_scale_is_named(self, seed):
        weights, dequantized, levels = rounded(seed)
        edges, (before, after) = counted(weights, dequantized)
        fig = charts.histograms(edges, before, after, 3 * levels, whose_levels="levels")
        low, high = fig.layout.xaxis.range
        assert low < 3 * levels.min() < 3 * levels.max() < high
        assert "square-root scale" in fig.layout.yaxis.title.text

    def test_two_pictures_can_have_the_same_axes(self):
        weights, dequantized, levels = rounded(0)
        edges, (before, after) = counted(weights, dequantized)
        shared = {"span": (-9.0, 9.0), "top": 0.5}
        one = charts.histograms(edges, before, after, levels, whose_levels="a", **shared).layout
        other = charts.histograms(edges / 2, after, after, levels, whose_levels="b", **shared).layout
        assert one.xaxis.range == other.xaxis.range == pytest.approx((-9.36, 9.36))
        assert one.yaxis.range == other.yaxis.range


class TestErrors:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("seed", SEEDS)
    def test_shares_add_up_and_colours_say_the_sign(self, seed, mode):
        weights, dequantized, _ = rounded(seed)
        edges, (counts,) = counted(dequantized - weights)
        fig = charts.errors(edges, counts, 0.1, mode=mode)
        (bars,) = fig.data
        assert sum(bars.y) == pytest.approx(1)
        colours = {x < 0: colour for x, colour in zip(bars.x, bars.marker.color, strict=True)}
        assert len(colours) == len(set(colours.values())) == 2
        assert [line.x0 for line in fig.layout.shapes] == [-0.1, 0.1]

    def test_no_error_has_no_marks(self):
        fig = charts.errors(np.linspace(-0.5, 0.5, 4), np.array([0, 7, 0]), 0.0)
        assert not fig.layout.shapes
        assert not fig.layout.annotations


class TestBlock:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("count", [2, 64, 128])
    def test_points_bars_and_lines_are_the_numbers(self, seed, count):
        weights, dequantized, levels = rounded(seed, count)
        fig = charts.block(np.arange(count), weights, dequantized, levels)
        lines, after, before, bars = fig.data
        np.testing.assert_array_equal(before.y, weights)
        np.testing.assert_array_equal(after.y, dequantized)
        np.testing.assert_allclose(bars.y, dequantized - weights)
        assert set(lines.y) == set(levels)
        assert np.isnan(lines.x[2::3]).all()  # no line from one level to the next
        assert set(dequantized) <= set(lines.y)

    def test_the_largest_weight_is_named_on_its_place(self):
        weights, dequantized, levels = rounded(3, 64)
        weights[41] = -12.5
        (note,) = charts.block(np.arange(100, 164), weights, dequantized, levels).layout.annotations
        assert (note.x, note.y) == (141, -12.5)
        assert "−12.5" in note.text

    def test_everything_is_inside_its_axes(self):
        for weights in (np.array([0.0, 3.0, -40.0]), np.zeros(3), np.full(3, 1e-6)):
            fig = charts.block(np.arange(3), weights, np.zeros(3), np.array([-40.0, 0.0, 40.0]))
            assert fig.layout.yaxis.range[1] > 40
            assert fig.layout.yaxis2.range[1] > np.abs(weights).max()

    def test_two_blocks_can_have_the_same_axes(self):
        figures = [
            charts.block(np.arange(64), *rounded(seed, 64), reach=9.0, most=2.0, noun="channel") for seed in SEEDS
        ]
        assert len({(fig.layout.yaxis.range, fig.layout.yaxis2.range) for fig in figures}) == 1
        assert figures[0].layout.xaxis2.title.text == "place in the channel"


class TestStrip:
    @pytest.mark.parametrize("edges", [[0, 2], list(range(17)), [0, 12, 25, 38, 51], list(range(0, 99_000, 400))])
    def test_the_cells_name_their_blocks(self, edges):
        fig = charts.block_errors(np.ones(len(edges) - 1), np.array(edges), 0)
        texts = [
            text.replace(",", "").replace("blocks ", "").replace("block ", "") for text in fig.data[0].customdata[0]
        ]
        spans = [tuple(int(end) for end in text.split(" to ")) for text in texts]
        assert [(span[0], span[-1] + 1) for span in spans] == list(pairwise(edges))
        assert len(fig.layout.xaxis.tickvals) <= 10
        marks = zip(fig.layout.xaxis.tickvals, fig.layout.xaxis.ticktext, strict=True)
        assert all(int(text.replace(",", "")) == edges[place] for place, text in marks)

    @pytest.mark.parametrize("chosen", [0, 11, 12, 24, 25, 50])
    def test_the_frame_is_on_the_group_of_the_chosen_block(self, chosen):
        edges = np.array([0, 12, 25, 38, 51])
        (frame,) = charts.block_errors(np.ones(4), edges, chosen).layout.shapes
        place = round((frame.x0 + frame.x1) / 2)
        assert edges[place] <= chosen < edges[place + 1]
        assert not charts.block_errors(np.ones(4), edges, None).layout.shapes


@pytest.mark.parametrize("count", [1, 5, 128, 129, 4096])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_holds_the_largest_and_is_as_long_as_it_can_be(count, seed):
    weights = np.random.default_rng(seed).normal(size=count)
    part = charts.window(weights, 128)
    assert part.stop - part.start == min(128, count)
    assert np.abs(weights[part]).max() == np.abs(weights).max()


POINTS = [
    RatePoint("NormalFloat, 3 bits", "NormalFloat", 3.5, 14.0),
    RatePoint("NormalFloat, 4 bits", "NormalFloat", 4.5, 20.0),
    RatePoint("Integer, 4 bits", "Integer", 4.5, 19.0),
    RatePoint("FP4 (E2M1)", "Floating point", 4.5, 19.5, "FP4 (E2M1)"),
    RatePoint("FP4 (bitsandbytes)", "Floating point", 4.5, 18.0, "FP4 (bitsandbytes)"),
]
BITS = np.linspace(2, 9, 8)
BOUND = (BITS, 20 * math.log10(2) * BITS)


class TestRates:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_family_is_a_line_of_its_own_colour_and_shape(self, mode):
        bound, *families = rates.rates(POINTS, None, BOUND, mode=mode).data
        assert [trace.name for trace in families] == ["NormalFloat", "Integer", "Floating point"]
        assert list(families[0].x) == [3.5, 4.5]
        assert list(families[0].y) == [14.0, 20.0]
        looks = {(trace.marker.color, trace.marker.symbol) for trace in families}
        assert len(looks) == len({colour for colour, _ in looks}) == len({symbol for _, symbol in looks}) == 3
        assert {colour for colour, _ in looks} <= set(theme.CATEGORIES[mode])
        np.testing.assert_allclose(np.diff(bound.y) / np.diff(bound.x), 6.0206, rtol=1e-4)

    def test_the_current_setting_is_ringed_and_only_then(self):
        ring = rates.rates(POINTS, POINTS[1], BOUND).data[-1]
        assert (list(ring.x), list(ring.y)) == ([4.5], [20.0])
        assert ring.name == "yours: NormalFloat, 4 bits"
        assert not any("yours" in trace.name for trace in rates.rates(POINTS, None, BOUND).data)

    def test_formats_of_one_width_are_seen_in_front_of_lines(self):
        _, *lines, floating = rates.rates(POINTS, None, BOUND).data
        assert floating.marker.symbol.endswith("-open")
        assert all(floating.marker.size > line.marker.size and floating.zorder > line.zorder for line in lines)

    def test_labels_of_points_above_each_other_stand_apart(self):
        floating = rates.rates(POINTS, None, BOUND).data[-1]
        assert len(set(floating.textposition)) == 2

    def test_nothing_leaves_the_axes(self):
        points = [*POINTS, RatePoint("far", "far", 12.0, -7.0), RatePoint("exact", "exact", 2.0, math.inf)]
        layout = rates.rates(points, None, BOUND).layout
        assert layout.xaxis.range[0] < 2
        assert layout.xaxis.range[1] > 12
        assert layout.yaxis.range[0] < -7
        assert math.isfinite(layout.yaxis.range[1])


SWEEP = [
    PerplexityPoint("rounding", "Integer", 4, 4.5, 9.0),
    PerplexityPoint("rounding", "Integer", 8, 8.5, 5.0),
    PerplexityPoint("GPTQ", "Integer", 4, 4.5, 6.0),
    PerplexityPoint("rounding", "NormalFloat", 4, 4.5, 7.0),
]


class TestPerplexities:
    def test_a_line_for_each_method_and_type_in_the_order_of_bits(self):
        fig = rates.perplexities(SWEEP, 4.8, (2, 9))
        by_name = {trace.name: trace for trace in fig.data}
        assert set(by_name) == {"rounding, Integer", "GPTQ, Integer", "rounding, NormalFloat"}
        line = by_name["rounding, Integer"]
        assert (list(line.x), list(line.y)) == ([4.5, 8.5], [9.0, 5.0])
        assert line.line.color == by_name["rounding, NormalFloat"].line.color != by_name["GPTQ, Integer"].line.color
        assert line.line.dash == by_name["GPTQ, Integer"].line.dash != by_name["rounding, NormalFloat"].line.dash

    def test_one_data_type_needs_no_name(self):
        assert [trace.name for trace in rates.perplexities(SWEEP[:3], 4.8, (2, 9)).data] == ["rounding", "GPTQ"]

    def test_large_perplexities_are_said_without_powers_of_ten(self):
        point = PerplexityPoint("rounding", "Integer", 2, 2.5, 16764.2)
        assert rates.perplexities([point], 4.8, (2, 9)).data[0].customdata[0][2] == "16,764"

    def test_the_original_is_a_line_at_its_height(self):
        fig = rates.perplexities(SWEEP, 4.8, (2, 9))
        assert fig.layout.shapes[0].y0 == fig.layout.shapes[0].y1 == 4.8
        assert fig.layout.annotations[0].y == pytest.approx(math.log10(4.8))
        assert fig.layout.yaxis.type == "log"

    def test_looking_closer_cuts_the_axis_and_nothing_else(self):
        near, far = (rates.perplexities(SWEEP, 4.8, (2, 9), ceiling=ceiling) for ceiling in (7.2, None))
        assert math.log10(7.2) <= near.layout.yaxis.range[1] < far.layout.yaxis.range[1]
        assert [trace.y for trace in near.data] == [trace.y for trace in far.data]

    @pytest.mark.parametrize("high", [5.0, 9.0, 40.0, 3e3, 2e5, 7e8])
    def test_the_axis_has_marks_that_can_be_read(self, high):
        points = [PerplexityPoint("rounding", "Integer", 2, 2.5, high)]
        axis = rates.perplexities(points, 4.8, (2, 9)).layout.yaxis
        assert 4 <= len(axis.tickvals) <= 10
        low, top = axis.range
        assert all(low <= math.log10(value) <= top for value in axis.tickvals)
        assert [float(text.replace(",", "")) for text in axis.ticktext] == pytest.approx(list(axis.tickvals))

    def test_the_horizontal_axis_stands_still_while_points_come(self):
        ranges = {rates.perplexities(SWEEP[:count], None, (2, 9)).layout.xaxis.range for count in range(len(SWEEP) + 1)}
        assert len(ranges) == 1

    @pytest.mark.parametrize("original", [math.inf, math.nan])
    @pytest.mark.parametrize("points", [[], SWEEP])
    def test_an_original_that_is_no_number_has_no_line(self, original, points):
        fig = rates.perplexities(points, original, (2, 9))
        assert not fig.layout.shapes
        assert all(map(math.isfinite, fig.layout.yaxis.range))

    @pytest.mark.parametrize("worst", [5.0001, 50.0, 5e6, math.inf])
    def test_all_finite_points_are_seen_and_noise_is_no_cliff(self, worst):
        point = PerplexityPoint("rounding", "Integer", 2, 2.5, worst)
        low, high = rates.perplexities([*SWEEP, point], 4.8, (2, 9)).layout.yaxis.range
        assert math.isfinite(high)
        assert low < math.log10(4.8)
        assert high > math.log10(9.0)
        if math.isfinite(worst):
            assert high > math.log10(worst)
        flat = [PerplexityPoint("rounding", "Integer", bits, bits, 5.0 + bits / 1000) for bits in (4, 8)]
        low, high = rates.perplexities(flat, 5.0, (2, 9)).layout.yaxis.range
        assert high - low > math.log10(1.5)


class TestLayers:
    @pytest.mark.parametrize("rows", [1, 6, 30])
    @pytest.mark.parametrize("signed", [False, True])
    def test_the_numbers_stay_blanks_stay_and_the_scale_fits(self, rows, signed):
        values = np.random.default_rng(rows).normal(size=(rows, 3))
        values = values if signed else np.abs(values)
        values[0, 1] = np.nan
        names = [f"{row}" for row in range(rows)]
        hover = [[f"{row}, {kind}" for kind in "abc"] for row in range(rows)]
        fig = maps.layer_map(
            values, names, list("abc"), title="", tickformat="", hover=hover, signed=signed, chosen=(0, 2)
        )
        (trace,) = fig.data
        np.testing.assert_array_equal(trace.z, values)
        assert trace.zmin <= np.nanmin(values)
        assert trace.zmax >= np.nanmax(values)
        if signed:
            assert trace.zmin == -trace.zmax
            assert list(trace.colorbar.tickvals) == [trace.zmin, 0, trace.zmax]
        (frame,) = fig.layout.shapes
        assert (frame.x0, frame.x1, frame.y0, frame.y1) == (1.5, 2.5, -0.5, 0.5)
        assert len(fig.layout.yaxis.ticktext) <= 16

    def test_long_names_have_room(self):
        def margins(block, kind):
            fig = maps.layer_map(np.ones((1, 1)), [block], [kind], title="", tickformat="", hover=[["x"]])
            return fig.layout.margin.l, fig.layout.margin.b

        (left, below), (more_left, more_below) = margins("0", "q_proj"), margins("encoder 11", "attention.output.dense")
        assert more_left > left
        assert more_below > below
        bars = [rates.ranking([name], [1.0], unit="%").layout.margin.l for name in ("layer 3, q_proj", "encoder " * 5)]
        assert bars[1] > bars[0]

    def test_small_differences_stay_small(self):
        values = np.array([[0.0910, 0.0911]])
        trace = maps.layer_map(values, ["0"], ["a", "b"], title="", tickformat="", hover=[["", ""]]).data[0]
        assert (values[0, 1] - values[0, 0]) / (trace.zmax - trace.zmin) < 0.01

    def test_before_the_first_number_there_is_a_map_all_the_same(self):
        trace = maps.layer_map(
            np.full((2, 2), np.nan), ["0", "1"], ["a", "b"], title="", tickformat="", hover=[["", ""]] * 2
        ).data[0]
        assert trace.zmin < trace.zmax

    def test_the_first_of_a_ranking_is_on_top_and_signs_have_colours(self):
        fig = rates.ranking(["a", "b", "c"], [3.0, 1.0, -2.0], unit="%")
        (bars,) = fig.data
        assert list(bars.x) == [3.0, 1.0, -2.0]
        assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]
        assert bars.marker.color[0] == bars.marker.color[1] != bars.marker.color[2]


def test_throughput_is_a_bar_for_each_way_and_a_copy_above():
    fig = speed.throughput(["a", "b"], {"theirs": [200, 250], "ours": [900, 1000]}, [3000, 4000])
    theirs, ours, copy = fig.data
    assert (list(theirs.y), list(ours.y), list(copy.y)) == ([200, 250], [900, 1000], [3000, 4000])
    assert theirs.marker.color != ours.marker.color
    assert list(ours.x) == list(copy.x) == ["a", "b"]
