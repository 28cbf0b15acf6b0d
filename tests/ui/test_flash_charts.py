"""The pictures of the FlashAttention lab carry the figures they are given."""

import math

import numpy as np
import pytest

from engine.experiments._flash import BACKENDS
from ui import theme
from ui.charts import flash as charts
from ui.charts import flash_accuracy, flash_roofline, flash_softmax, flash_tiles
from ui.charts.flash import End, Forecast, Line, Panel
from ui.charts.flash_accuracy import Errors
from ui.charts.flash_roofline import Spot, Track
from ui.charts.flash_softmax import Chunk
from ui.charts.flash_tiles import CURRENT, DONE, SKIPPED, WAITING, Tiles

MODES = ["light", "dark"]
LENGTHS = [128, 256, 512]
SLOW = Line("standard", "Standard", LENGTHS, [1.0, 4.0, 16.0], ["a", "b", "c"], [0.9, 3, 15], [1.5, 5, 17])
FAST = Line("torch-flash", "PyTorch, flash", LENGTHS, [0.5, 1.0, 2.0], ["d", "e", "f"])


def texts(fig):
    return [annotation.text for annotation in fig.layout.annotations]


def in_legend(fig):
    return [trace.name for trace in fig.data if trace.showlegend is not False]


class TestOverLength:
    @pytest.mark.parametrize("mode", MODES)
    def test_two_panels_share_one_axis_of_lengths_and_a_backend_its_look(self, mode):
        fig = charts.over_length([Panel("time, ms", [SLOW, FAST]), Panel("peak, MiB", [SLOW, FAST])], mode=mode)
        drawn = [(trace.name, trace.yaxis, trace.line.color, trace.marker.symbol) for trace in fig.data]
        assert [(name, axis) for name, axis, *_ in drawn] == [
            ("Standard", "y"),
            ("PyTorch, flash", "y"),
            ("Standard", "y2"),
            ("PyTorch, flash", "y2"),
        ]
        assert drawn[0][2:] == drawn[2][2:] != drawn[1][2:]
        assert in_legend(fig) == ["Standard", "PyTorch, flash"]
        assert (fig.layout.xaxis.type, fig.layout.xaxis.anchor) == ("log", "y2")
        assert fig.layout.yaxis.domain[0] > fig.layout.yaxis2.domain[1]
        assert list(fig.layout.xaxis.tickvals) == LENGTHS

    def test_the_spread_is_drawn_from_its_ends(self):
        slow, fast = charts.over_length([Panel("ms", [SLOW, FAST])]).data
        np.testing.assert_allclose(np.add(slow.y, slow.error_y.array), SLOW.high)
        np.testing.assert_allclose(np.subtract(slow.y, slow.error_y.arrayminus), SLOW.low)
        assert fast.error_y.array is None

    def test_predictions_are_dashed_and_named_once_when_something_is_measured(self):
        forecast = Forecast("standard", "standard, predicted", LENGTHS, [2, 8, 32])
        alone = charts.over_length([Panel("MiB", forecasts=[forecast])])
        assert in_legend(alone) == ["standard, predicted"]
        assert alone.data[0].line.dash == "dash"
        both = charts.over_length([Panel("MiB", [SLOW], [forecast])])
        assert in_legend(both) == ["Standard", "predicted"]
        assert both.data[0].line.color == both.data[1].line.color

    def test_where_a_backend_stops_is_marked_once_at_its_first_length(self):
        ends = [End("standard", "Standard", length, "out of memory", length / 10) for length in (2048, 1024)]
        fig = charts.over_length([Panel("MiB", [SLOW], ends=ends, limit=90.0, limit_words="free: 90 MiB")])
        marks = [trace for trace in fig.data if trace.mode == "markers" and trace.x[0] is not None]
        assert [(trace.x[0], trace.y[0], trace.marker.symbol) for trace in marks] == [
            (2048, 204.8, "x"),
            (1024, 102.4, "x"),
        ]
        assert texts(fig) == ["Standard: out of memory", "free: 90 MiB"]
        vertical, limit = fig.layout.shapes
        assert vertical.x0 == vertical.x1 == 1024
        assert limit.y0 == limit.y1 == 90
        assert 10 ** fig.layout.xaxis.range[1] > 2048
        assert 10 ** fig.layout.yaxis.range[1] > 204.8

    def test_two_backends_that_stop_at_one_length_are_both_named(self):
        ends = [End(name, name, 1024, "out of memory") for name in ("standard", "torch-math")]
        above, below = charts.over_length([Panel("ms", [SLOW], ends=ends)]).layout.annotations
        assert (above.text, below.text) == ("standard: out of memory", "torch-math: out of memory")
        assert below.yshift < above.yshift - 10

    def test_a_linear_panel_begins_at_zero_and_reaches_its_most(self):
        fig = charts.over_length([Panel("%", [FAST], logarithmic=False, most=100.0)])
        assert fig.layout.yaxis.type != "log"
        assert list(fig.layout.yaxis.range) == [0, 100]

    def test_the_legend_stands_above_the_panels(self):
        legend = charts.over_length([Panel("ms", [SLOW, FAST])]).layout.legend
        assert legend.y >= 1
        assert legend.yanchor == "bottom"

    def test_nothing_measured_yet_is_an_empty_picture(self):
        assert not charts.over_length([Panel("ms"), Panel("MiB")]).data

    @pytest.mark.parametrize("mode", MODES)
    def test_every_backend_can_be_told_from_the_others(self, mode):
        looks = [charts.look(name, mode) for name in (*BACKENDS, "split", "whole")]
        assert len(set(looks)) == len(looks)
        assert {colour for colour, _ in looks} <= set(theme.CATEGORIES[mode])
        assert charts.look("a new one", mode) not in looks


class TestRoofline:
    SPOTS = (
        Spot("standard", "Standard", 128, 8.0, 2e9, "one"),
        Spot("standard", "Standard", 256, 9.0, 3e9, "two"),
        Spot("torch-flash", "PyTorch, flash", 256, 90.0, 5e10, "three"),
    )

    @pytest.mark.parametrize("mode", MODES)
    def test_the_roof_is_the_lower_of_both_limits_and_bends_at_the_ridge(self, mode):
        fig = flash_roofline.roofline(self.SPOTS, 1e11, 2e10, mode=mode)
        roof = fig.data[0]
        np.testing.assert_allclose(roof.y, np.minimum(np.array(roof.x) * 2e10, 1e11) / 1e9)
        assert 5.0 in roof.x
        assert fig.layout.shapes[0].x0 == 5.0
        assert fig.layout.yaxis.title.text == "GFLOP/s"

    def test_points_of_a_backend_are_joined_and_their_ends_named(self):
        _, standard, flash = flash_roofline.roofline(self.SPOTS, 1e11, 2e10).data
        assert (list(standard.x), list(standard.y)) == ([8, 9], [2, 3])
        assert list(standard.text) == ["T=128", "T=256"]
        assert list(flash.customdata) == ["three"]

    def test_a_length_is_named_once_where_several_lines_have_it(self):
        spots = [
            Spot(name, name, length, length / 16, flops, "")
            for name, times in (("standard", 1.0), ("torch-math", 2.0))
            for length, flops in ((128, times * 1e9), (256, times * 3e9), (512, 3e9 / times))
        ]
        _, standard, maths = flash_roofline.roofline(spots, 1e11, 2e10).data
        assert list(standard.text) == ["", "", "T=512"]
        assert list(maths.text) == ["T=128", "", ""]

    def test_a_point_above_the_roof_is_in_the_picture(self):
        fig = flash_roofline.roofline([Spot("flex", "Flex", 128, 9.0, 3e11, "")], 1e11, 2e10)
        assert 10 ** fig.layout.yaxis.range[1] > 300

    @pytest.mark.parametrize("mode", MODES)
    def test_computed_paths_lie_on_an_axis_that_stays(self, mode):
        def track(backend, *intensity):
            return Track(backend, backend, (128, 256, 512), intensity)

        fig = flash_roofline.intensity([track("standard", 5, 6, 7), track("torch-flash", 16, 30, 50)], mode=mode)
        standard, flash = fig.data
        assert (list(standard.x), list(flash.x)) == ([5, 6, 7], [16, 30, 50])
        assert set(standard.y) != set(flash.y)
        assert list(flash.text) == ["T=128", "", "T=512"]
        assert standard.line.color != flash.line.color
        other = flash_roofline.intensity([track("standard", 2, 3, 4), track("torch-flash", 8, 20, 100)], mode=mode)
        assert other.layout.xaxis.range == fig.layout.xaxis.range

    def test_a_fast_device_is_told_in_tflops(self):
        fig = flash_roofline.roofline((), 7e14, 4e12)
        assert fig.layout.yaxis.title.text == "TFLOP/s"
        assert max(fig.data[0].y) == 700


class TestErrors:
    EDGES = (-4.0, -3.0, -2.0)

    @pytest.mark.parametrize("mode", MODES)
    def test_outlines_markers_and_the_bound(self, mode):
        found = [Errors("standard", "Standard", (0.25, 0.75), 2e-3), Errors("flex", "Flex", (1.0, 0.0), 1e-3)]
        fig = flash_accuracy.errors(self.EDGES, found, 4e-3, mode=mode)
        outline, marker, other, _ = fig.data
        np.testing.assert_allclose(outline.x, [10**-3.5, 10**-2.5])
        assert list(outline.y) == [25, 75]
        assert list(marker.x) == [2e-3]
        assert marker.y[0] > 100
        assert outline.line.color == marker.marker.color != other.line.color
        assert fig.layout.shapes[0].x0 == 4e-3
        assert in_legend(fig) == ["Standard", "Flex"]

    def test_no_error_at_all_is_said_for_a_logarithm_cannot_show_it(self):
        fig = flash_accuracy.errors(self.EDGES, [Errors("standard", "Standard", (1.0, 0.0), 0.0)])
        assert in_legend(fig) == ["Standard: no error at all"]
        assert not fig.layout.shapes


def tiles():
    """Four tokens in blocks of two and one, causal: the last two of the first row are skipped."""
    query, key = np.divmod(np.arange(8), 4)
    skipped = np.isin(np.arange(8), [2, 3])
    return Tiles(query, key, skipped, np.isin(np.arange(8), [1, 7]), (2, 4), 2, 1, 4)


class TestTiles:
    @pytest.mark.parametrize(
        ("step", "expected"),
        [
            (0, [[CURRENT, WAITING, SKIPPED, SKIPPED], [WAITING] * 4]),
            (5, [[DONE, DONE, SKIPPED, SKIPPED], [DONE, CURRENT, WAITING, WAITING]]),
            (8, [[DONE, DONE, SKIPPED, SKIPPED], [DONE] * 4]),
        ],
    )
    def test_every_tile_has_its_state(self, step, expected):
        assert flash_tiles.states(tiles(), step).tolist() == expected
        assert np.array(flash_tiles.grid(tiles(), step, 3).data[0].z).tolist() == expected

    @pytest.mark.parametrize("mode", MODES)
    def test_the_followed_block_and_the_current_tile_are_framed_even_if_it_is_skipped(self, mode):
        followed, now = flash_tiles.grid(tiles(), 2, 3, mode=mode).layout.shapes
        assert (followed.y0, followed.y1) == (0.5, 1.5)
        assert ((now.x0 + now.x1) / 2, (now.y0 + now.y1) / 2) == (2, 0)
        assert len(flash_tiles.grid(tiles(), 8, 3, mode=mode).layout.shapes) == 1

    def test_axes_name_the_tokens_of_a_block(self):
        fig = flash_tiles.grid(tiles(), 0, 0)
        assert list(fig.layout.yaxis.ticktext) == ["0–1", "2–3"]
        assert list(fig.layout.xaxis.ticktext) == ["0", "1", "2", "3"]
        assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]

    def test_states_do_not_rest_on_colour_alone(self):
        fig = flash_tiles.grid(tiles(), 0, 0)
        marks = [trace for trace in fig.data[1:] if trace.hoverinfo == "skip"]
        crosses = [place for trace in marks for place in zip(trace.x, trace.y, strict=True)]
        assert {(2, 0), (3, 0)} <= set(crosses)
        assert "skipped: the mask hides all of it" in in_legend(fig)

    def test_the_output_grows_in_an_axis_that_stays(self):
        final = np.array([0.5, -1.0])
        first, later = (flash_tiles.output(running, final, (-1, 1)) for running in (None, np.array([0.4, -0.8])))
        assert list(first.data[0].y) == [0, 0]
        assert list(later.data[0].y) == [0.4, -0.8]
        assert list(later.data[1].y) == [0.5, -1]
        assert first.layout.yaxis.range == later.layout.yaxis.range

    @pytest.mark.parametrize("mode", MODES)
    def test_bytes_so_far_stand_against_both_ends(self, mode):
        fig = flash_tiles.traffic(1500, 500, 4000, 8000, mode=mode)
        assert {trace.name: list(trace.x) for trace in fig.data} == {
            "read": [1.5, 0],
            "written": [0.5, 0],
            "standard attention, in all": [0, 8],
        }
        assert fig.layout.shapes[0].x0 == 4
        assert [text.replace("\u00a0", " ") for text in texts(fig)] == [
            "in tiles: 2.00 kB of 4.00 kB",
            "standard: 8.00 kB",
        ]
        assert fig.layout.xaxis.range[1] > 8

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("chosen", [None, 4096.0])
    def test_on_chip_memory_is_drawn_counted_and_by_the_theorem(self, chosen, mode):
        sizes = np.array([128, 256, 512])
        fig = flash_tiles.on_chip(sizes, np.array([900, 500, 300]), 2**17 / sizes, 700, chosen, mode=mode)
        counted, theorem, standard = fig.data
        assert list(counted.y) == [900, 500, 300]
        assert list(theorem.y) == [1024, 512, 256]
        assert list(standard.y) == [700] * 3
        assert (fig.layout.xaxis.type, fig.layout.yaxis.type) == ("log", "log")
        assert [shape.x0 for shape in fig.layout.shapes] == ([] if chosen is None else [chosen])
        assert 10 ** fig.layout.xaxis.range[1] > (chosen or 512)

    def test_parts_of_a_cache_are_per_cents(self):
        (bars,) = flash_tiles.parts(["0", "512"], [0.25, 0.75], ["a", "b"]).data
        assert list(bars.y) == [25, 75]
        assert list(bars.text) == ["25.0%", "75.0%"]


class TestSoftmax:
    SCORES = np.array([1.0, 12.0, 3.0, 13.0])

    def draw(self, seen, naive=(0.1, 0.2, 0.3, 0.4), limit=11.09, mode="light"):
        chunks = [Chunk(0, 2, 12.0), Chunk(2, 4, 13.0)][:seen]
        return flash_softmax.softmax(
            self.SCORES,
            chunks,
            np.full(2 * seen, 0.25),
            np.array(naive),
            np.full(4, 0.25),
            limit=limit,
            overflowed=[1, 3],
            mode=mode,
        )

    def named(self, fig):
        return {trace.name: trace for trace in fig.data}

    @pytest.mark.parametrize("mode", MODES)
    def test_the_maximum_climbs_over_the_chunks_that_were_read(self, mode):
        drawn = self.named(self.draw(2, mode=mode))
        assert list(drawn["running maximum m"].x) == [-0.5, 1.5, 1.5, 3.5]
        assert list(drawn["running maximum m"].y) == [12, 12, 13, 13]
        assert list(drawn["online"].x) == [0, 1, 2, 3]
        assert list(drawn["exp overflows here"].x) == [1, 3]

    def test_what_was_not_read_yet_looks_different(self):
        drawn = self.named(self.draw(1))
        colours = drawn["score"].marker.color
        assert colours[0] == colours[1] != colours[2] == colours[3]
        assert list(drawn["online, among those seen"].x) == [0, 1]
        assert "running maximum m" not in self.named(self.draw(0))

    def test_no_number_is_drawn_as_such(self):
        drawn = self.named(self.draw(2, naive=(0.0, math.nan, 0.0, math.nan)))
        assert list(drawn["naive: not a number"].x) == [1, 3]
        assert list(drawn["naive"].x) == [0, 2]
        assert "naive: not a number" not in self.named(self.draw(2))

    @pytest.mark.parametrize(("limit", "shown"), [(11.09, True), (88.7, False)])
    def test_the_limit_is_drawn_where_it_is_near(self, limit, shown):
        assert bool(self.draw(2, limit=limit).layout.shapes) is shown
