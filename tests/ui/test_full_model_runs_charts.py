"""The pictures of the whole model's runs carry the numbers they are given, rows and lines where they belong."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ui import theme
from ui.charts import full_model_runs as charts

MODES = ["light", "dark"]
ROWS = [
    charts.Row("nothing", 2_000_000, 40_000_000, 10_000, 8_000, 11_000),
    charts.Row("LoRA", 2_100_000, 38_000_000, 12_000, 11_000, 12_500),
    charts.Row("4-bit base", 500_000, 30_000_000, 900, 880, 920),
]


class TestAblation:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_row_has_a_memory_bar_and_a_speed_bar_in_one_order(self, mode):
        fig = charts.ablation(ROWS, 3, mode=mode)
        weights, rest, speed = fig.data
        names = ["nothing", "LoRA", "4-bit base"]
        assert list(weights.y) == list(rest.y) == list(speed.y) == names
        np.testing.assert_allclose(np.add(weights.x, rest.x), [40, 38, 30])
        assert list(speed.x) == [10_000, 12_000, 900]
        np.testing.assert_allclose(np.subtract(speed.x, speed.error_x.arrayminus), [row.low for row in ROWS])
        np.testing.assert_allclose(np.add(speed.x, speed.error_x.array), [row.high for row in ROWS])
        assert (speed.xaxis, speed.yaxis) == ("x2", None)
        assert list(fig.layout.yaxis.categoryarray) == names[::-1]  # Plotly draws from below
        assert len({trace.marker.color for trace in fig.data}) == 3

    def test_every_bar_is_labelled_and_has_room_for_it(self):
        fig = charts.ablation(ROWS, 3)
        texts = {(note.xref, note.y): note.text for note in fig.layout.annotations}
        assert texts["x", "nothing"] == "40"
        assert texts["x2", "LoRA"] == "12 k"
        assert texts["x2", "4-bit base"] == "900"
        assert fig.layout.xaxis.range[1] > 1.3 * 40
        assert fig.layout.xaxis2.range[1] > 1.3 * 12_500
        assert "MB" in fig.layout.xaxis.title.text
        assert "tokens/s" in fig.layout.xaxis2.title.text

    def test_a_large_model_is_told_in_gigabytes(self):
        rows = [replace(ROWS[0], peak_bytes=11_046_644_736), replace(ROWS[1], peak_bytes=8_408_370_832)]
        fig = charts.ablation(rows, 2)
        texts = {(note.xref, note.y): note.text for note in fig.layout.annotations}
        assert (texts["x", rows[0].name], texts["x", rows[1].name]) == ("11", "8.41")
        assert "GB" in fig.layout.xaxis.title.text
        assert all("GB" in trace.hovertemplate for trace in fig.data[:2])
        np.testing.assert_allclose(np.add(fig.data[0].x, fig.data[1].x), [11.046644736, 8.408370832])

    def test_a_row_without_a_step_has_no_bar_but_the_word(self):
        nan = float("nan")
        rows = [
            ROWS[0],
            charts.Row("early", 2_000_000, 0, nan, nan, nan),
            charts.Row("late", 2_000_000, 90_000_000, nan, nan, nan),
        ]
        fig = charts.ablation(rows, 3)
        weights, rest, speed = fig.data
        assert list(weights.y) == list(rest.y) == ["nothing", "late"]
        assert list(speed.y) == ["nothing"]
        texts = {(note.xref, note.y): (note.x, note.text) for note in fig.layout.annotations}
        assert texts["x", "early"] == texts["x2", "early"] == texts["x2", "late"] == (0, "diverged")
        assert texts["x", "late"] == (90, "90")
        assert fig.layout.xaxis2.range[1] > 11_000
        assert len(fig.layout.yaxis.categoryarray) == 3
        assert charts.ablation(rows[1:2], 3).layout.xaxis.range[1] > 0

    def test_rows_keep_their_place_while_others_come(self):
        some, all_there = charts.ablation(ROWS[:1], 3), charts.ablation(ROWS, 3)
        for fig in (some, all_there):
            assert tuple(fig.layout.yaxis.range) == (-0.5, 2.5)
            assert len(fig.layout.yaxis.categoryarray) == 3
            assert fig.layout.yaxis.categoryarray[-1] == "nothing"

    def test_height_grows_with_the_rows(self):
        assert charts.height(10) - charts.height(9) == charts.height(2) - charts.height(1) > 20


def lines(count, points=4, seed=0):
    draw = np.random.default_rng(seed)
    batches = [1 << power for power in range(points)]
    made = []
    for index in range(count):
        values = draw.uniform(5, 9, points)
        made.append(charts.Line(f"{32 << index} tokens", batches, list(values), list(0.9 * values), list(1.2 * values)))
    return made


class TestThroughput:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("count", [1, 3])
    def test_both_panels_share_the_batches_and_carry_the_points(self, mode, count):
        latency, speed = lines(count), lines(count, seed=1)
        fig = charts.throughput(latency, speed, (1, 2, 4, 8), "one token more", mode=mode)
        assert [trace.yaxis for trace in fig.data] == ["y"] * count + ["y2"] * count
        for trace, line in zip(fig.data, [*latency, *speed], strict=True):
            np.testing.assert_array_equal(trace.y, line.values)
            np.testing.assert_allclose(np.subtract(trace.y, trace.error_y.arrayminus), line.low)
            np.testing.assert_allclose(np.add(trace.y, trace.error_y.array), line.high)
        same = zip(fig.data[:count], fig.data[count:], strict=True)
        assert all((a.line.color, a.marker.symbol) == (b.line.color, b.marker.symbol) for a, b in same)
        assert {trace.line.color for trace in fig.data} <= set(theme.CATEGORIES[mode])
        assert list(fig.layout.xaxis.ticktext) == ["1", "2", "4", "8"]
        assert fig.layout.yaxis.title.text == "one token more, ms"
        assert "tokens/s" in fig.layout.yaxis2.title.text

    @pytest.mark.parametrize("seed", range(5))
    def test_every_line_is_named_at_its_end_and_no_name_lies_on_another(self, seed):
        fig = charts.throughput(lines(3, seed=seed), lines(3, seed=seed), (1, 2, 4, 8), "one token more")
        for axis in ("y", "y2"):
            notes = [note for note in fig.layout.annotations if note.yref == axis]
            drawn = [trace for trace in fig.data if trace.yaxis == axis]
            assert {trace.name for trace in drawn} == {"32 tokens", "64 tokens", "128 tokens"}
            for trace in drawn:  # the name has the line's colour and marker before it
                (note,) = (note for note in notes if note.text.endswith(f"</span> {trace.name}"))
                assert trace.line.color in note.text
                assert {"circle": "●", "square": "■", "diamond": "◆"}[trace.marker.symbol] in note.text
            assert all(note.x == pytest.approx(math.log10(8)) for note in notes)
            low, high = fig.layout[axis.replace("y", "yaxis")].range
            places = sorted(note.y for note in notes)
            assert min(np.diff(places)) >= 0.14 * (high - low)
            assert low < places[0] <= places[-1] < high

    @pytest.mark.parametrize("reach", [1.2, 2, 4, 10, 40, 1000])
    def test_an_axis_has_numbers_however_short_it_is(self, reach):
        line = charts.Line("32 tokens", [1, 2], [6.5, 6.5 * reach], [6.4, 6.4 * reach], [6.6, 6.6 * reach])
        fig = charts.throughput([line], [line], (1, 2), "one token more")
        for axis in (fig.layout.yaxis, fig.layout.yaxis2):
            digits = {"D1": range(1, 10), "D2": (1, 2, 5), 1: (1,)}[axis.dtick]
            ticks = [digit * 10**power for power in range(6) for digit in digits]
            low, high = (10**end for end in axis.range)
            assert 2 <= sum(low < tick < high for tick in ticks) <= 12

    def test_lines_that_have_only_begun_are_drawn(self):
        fig = charts.throughput(lines(1, points=1), lines(1, points=1), (1, 2, 4), "one token more")
        assert len(fig.data) == 2
        assert fig.layout.xaxis.range[1] > math.log10(4)


@pytest.mark.parametrize("mode", MODES)
class TestLoads:
    def test_the_scale_is_centred_on_the_fair_share(self, mode):
        load = np.array([[1.3, 0.7], [1.0, 1.0]])
        fig = charts.loads(load, ["0 gate", "0 up"], mode=mode)
        heat = fig.data[0]
        np.testing.assert_array_equal(heat.z, load)
        assert (heat.zmid, heat.zmin + heat.zmax) == (1, 2)
        assert heat.zmax == pytest.approx(1.3)
        assert [note.text for note in fig.layout.annotations] == ["1.30", "0.70", "1.00", "1.00", "expert"]

    def test_many_cells_are_not_written_on(self, mode):
        fig = charts.loads(np.ones((36, 16)), [str(row) for row in range(36)], mode=mode)
        assert [note.text for note in fig.layout.annotations] == ["expert"]
        assert fig.data[0].zmax > 1
