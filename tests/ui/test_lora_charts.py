"""The pictures of low-rank updates carry the numbers they are given, to scale."""

from dataclasses import replace

import numpy as np
import pytest

from ui import theme
from ui.charts import lora as charts
from ui.charts.lora import StepBar, SweepPoint

SHAPES = [(256, 768), (768, 256), (256, 128), (8192, 28672), (28672, 8192)]
MODES = ["light", "dark"]


def extent(trace):
    x, y = np.array(trace.x, float), np.array(trace.y, float)
    return x.max() - x.min(), y.max() - y.min()


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_areas_are_the_numbers_on_one_scale(inputs, outputs, rank):
    fig = charts.to_scale(inputs, outputs, rank)
    frozen, a, b = fig.data
    assert extent(frozen) == (outputs, inputs)
    assert extent(a) == pytest.approx((rank, inputs))
    assert extent(b) == pytest.approx((outputs, rank))
    assert (fig.layout.yaxis.scaleanchor, fig.layout.yaxis.scaleratio) == ("x", 1)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_the_strips_never_touch_the_matrix_nor_leave_the_axes(inputs, outputs):
    for rank in (1, 64):
        fig = charts.to_scale(inputs, outputs, rank)
        _, a, b = fig.data
        assert max(a.x) < 0
        assert max(b.y) < 0
        assert min(a.x) >= fig.layout.xaxis.range[0]
        assert min(b.y) >= fig.layout.yaxis.range[1]
        assert fig.layout.xaxis.range == charts.to_scale(inputs, outputs, 2).layout.xaxis.range


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_has_the_colours_of_categories(mode):
    frozen, a, b = charts.to_scale(256, 768, 8, mode=mode).data
    assert {a.fillcolor, b.fillcolor} <= set(theme.CATEGORIES[mode])
    assert a.fillcolor != b.fillcolor
    assert frozen.fillcolor not in theme.CATEGORIES[mode]


@pytest.mark.parametrize("count", [1, 6, 30])
def test_the_layer_map_has_a_row_a_layer_and_blanks_where_nothing_is_adapted(count):
    values = np.random.default_rng(count).uniform(size=(count, 3))
    values[0, 1] = np.nan
    fig = charts.layer_map(values, range(count), ["q_proj", "k_proj", "v_proj"], chosen=(0, 2))
    np.testing.assert_array_equal(fig.data[0].z, values)
    assert len(fig.layout.yaxis.ticktext) <= 16
    assert fig.data[0].zmin == 0
    (frame,) = fig.layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (1.5, 2.5, -0.5, 0.5)


def test_a_pooled_map_keeps_its_numbers_on_the_matrix_own_axes():
    pooled = np.random.default_rng(0).uniform(size=(32, 64))
    fig = charts.delta_map(pooled, 128, 256)
    (trace,) = fig.data
    np.testing.assert_array_equal(trace.z, pooled)
    assert (trace.x[0], trace.x[-1]) == (2, 254)
    assert (trace.y[0], trace.y[-1]) == (2, 126)
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("output →", "input ↓")


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_matrix_lies_in_the_map_of_its_update_as_it_is_drawn_to_scale(inputs, outputs):
    frozen = charts.to_scale(inputs, outputs, 8).data[0]
    (update,) = charts.delta_map(np.ones((4, 4)), inputs, outputs).data
    assert extent(frozen) == (outputs, inputs)
    assert (update.x[0] + update.x[-1], update.y[0] + update.y[-1]) == (outputs, inputs)


def test_the_label_of_a_narrow_matrix_keeps_its_two_sides_together():
    narrow = charts.to_scale(28672, 8192, 8).layout
    assert "28,672 × 8,192" in narrow.annotations[0].text
    letters = max(len(line) for line in narrow.annotations[0].text.split("<br>"))
    assert narrow.margin.r >= 7.5 * letters  # of 14 pixels: a phone has no other room beside W
    assert "256 × 768" in charts.to_scale(256, 768, 8).layout.annotations[0].text


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_chosen_spectrum_is_strong_among_the_others(rank, seed):
    spectra = np.sort(np.random.default_rng(seed).uniform(0.1, 3, (5, rank)))[:, ::-1]
    fig = charts.spectrum(spectra, list("abcde"), 3)
    others, chosen = fig.data
    np.testing.assert_array_equal(chosen.y, spectra[3])
    assert chosen.name == "d"
    assert others.opacity < 0.5
    assert np.isnan(others.y.reshape(5, rank + 1)[:, -1]).all()  # no line from one spectrum to the next
    assert fig.layout.yaxis.type == "log"


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_energy_grows_by_the_squares_up_to_all_of_it(rank, seed):
    sigma = np.sort(np.random.default_rng(seed).uniform(0.1, 3, rank))[::-1]
    fig = charts.energy(sigma, rank / 2)
    np.testing.assert_allclose(np.diff(fig.data[0].y, prepend=0), sigma**2 / (sigma**2).sum(), atol=1e-12)
    assert fig.data[0].y[-1] == pytest.approx(1)
    assert fig.layout.shapes[0].x0 == rank / 2


def test_an_update_of_nothing_has_a_spectrum_of_nothing():
    assert np.isnan(charts.spectrum(np.zeros((2, 4)), ["a", "b"], 0).data[1].y).all()
    fig = charts.energy(np.zeros(4), 0.0)
    np.testing.assert_array_equal(fig.data[0].y, np.zeros(4))
    assert not fig.layout.shapes


@pytest.mark.parametrize("count", [1, 2, 8, 16, 64, 256])
def test_the_directions_are_counted_in_whole_numbers_that_fit(count):
    axis = charts.energy(np.ones(count), 1.0).layout.xaxis
    assert axis.dtick == int(axis.dtick) >= 1
    assert count / axis.dtick <= 12


def test_the_exact_zero_of_the_first_step_is_ringed_and_only_that():
    step, of_b = np.arange(1, 31), np.linspace(3, 1, 30)
    of_a = np.linspace(0, 1, 30)
    line, _, ring = charts.gradients(step, of_a, of_b, (1, 20)).data
    assert line.y[0] == 0
    assert len(line.x) == 20
    assert line.name == "of A, exactly 0 at first"
    assert (list(ring.x), list(ring.y)) == ([1], [0])
    assert [trace.name for trace in charts.gradients(step, of_a + 1e-9, of_b, (1, 20)).data] == ["of A", "of B"]


POINTS = [
    SweepPoint("full", 5_800_000, 0.4, 0.9, 1.0, None, "learning rate 0.001"),
    SweepPoint("1", 10_000, 1.5, 0.2, 0.3, 1, "s = 16, learning rate 0.005"),
    SweepPoint("8", 80_000, 0.7, 0.8, 0.9, 8, "s = 2, learning rate 0.005"),
]


@pytest.mark.parametrize("rank", [1, 8, None])
def test_every_run_is_a_point_and_yours_is_ringed(rank):
    fig = charts.sweep(POINTS, rank, (10_000, 5_800_000))
    loss, held_out, learned, *rings = fig.data
    assert list(loss.text) == ["1", "8", "full"]
    assert list(loss.x) == [10_000, 80_000, 5_800_000]
    assert list(loss.y) == [1.5, 0.7, 0.4]
    assert list(held_out.y) == [0.2, 0.8, 0.9]
    assert list(learned.y) == [0.3, 0.9, 1.0]
    mine = next(point for point in POINTS if point.rank == rank)
    assert [(ring.x[0], ring.y[0]) for ring in rings] == [
        (mine.trainable, mine.loss),
        (mine.trainable, mine.held_out_accuracy),
    ]


@pytest.mark.parametrize(
    "losses", [(4.2, 4.0, 2.6), (1.5, 0.7, 0.4), (3.2, 0.002, 0.0009), (2.0, 2.0, 2.0), (1.0, float("nan"), 0.5)]
)
def test_losses_of_every_size_are_told_apart_and_no_ring_is_cut(losses):
    points = [replace(point, loss=loss) for point, loss in zip(POINTS, losses, strict=True)]
    fig = charts.sweep(points, 1, (10_000, 5_800_000))
    assert fig.layout.yaxis.type == "log"
    low, high = 10 ** np.array(fig.layout.yaxis.range)
    seen = [loss for loss in losses if loss > 0]
    assert low < min(seen) <= max(seen) < high
    assert high / low >= 10  # of 1, 2 and 5 there are then three at least
    assert all(trace.cliponaxis is False for trace in fig.data)


def test_the_settings_of_a_run_are_told_over_its_point():
    for trace in charts.sweep(POINTS, None, (10_000, 5_800_000)).data[:3]:
        assert list(trace.customdata) == [POINTS[1].settings, POINTS[2].settings, POINTS[0].settings]
        assert "%{customdata}" in trace.hovertemplate


def test_a_rank_that_was_not_run_has_no_ring_and_the_axis_stays():
    few, all_of_them = (charts.sweep(points, 3, (10_000, 5_800_000)) for points in (POINTS[1:2], POINTS))
    assert len(few.data) == len(all_of_them.data) == 3
    assert few.layout.xaxis.range == all_of_them.layout.xaxis.range
    low, high = 10 ** np.array(few.layout.xaxis.range)
    assert low < 10_000 < 5_800_000 < high
    assert few.layout.xaxis.type == "log"


BARS = [
    StepBar("floor", 0, 22.0, None, None, None),
    StepBar("ours, eager", 1, 62.0, (60.0, 71.0), 10.4, 1),
    StepBar("ours, compiled", 1, 59.0, (58.5, 59.5), 9.0, 1),
    StepBar("PEFT", 2, 124.0, (124.0, 128.0), 15.9, 0),
]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_s_bars_are_its_time_and_its_memory_side_by_side(mode):
    times, memory, floor, *_ = charts.steps(BARS, "recorded", mode=mode).data
    assert list(times.x) == [62, 59, 124]
    np.testing.assert_allclose(np.array(times.x) + times.error_x.array, [71, 59.5, 128])
    np.testing.assert_allclose(np.array(times.x) - times.error_x.arrayminus, [60, 58.5, 124])
    assert list(memory.x) == [10.4, 9.0, 15.9]
    assert list(memory.y) == list(times.y)
    assert times.marker.color[0] == times.marker.color[1] != times.marker.color[2]
    assert set(times.marker.color) <= set(theme.CATEGORIES[mode])
    assert memory.marker.color == times.marker.color
    assert list(floor.x) == [22]
    assert floor.error_x.array is None  # arithmetic has no spread


def test_every_number_stands_right_of_its_whisker():
    *_, times, memory = charts.steps(BARS, "recorded").data
    assert list(zip(times.x, [float(text) for text in times.text], strict=True)) == [
        (22, 22),
        (71, 62),
        (59.5, 59),
        (128, 124),
    ]
    assert [float(text) for text in memory.text] == list(memory.x) == [10.4, 9.0, 15.9]


def test_steps_stand_in_their_groups_each_under_its_label_and_say_where_they_were_recorded():
    fig = charts.steps(BARS, "recorded on a GPU")
    eager, compiled, peft = fig.data[0].y
    (floor,) = fig.data[2].y
    assert floor < eager < compiled < peft
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]  # downwards
    assert compiled - eager < min(eager - floor, peft - compiled)
    said = {note.text: note.y for note in fig.layout.annotations}
    heights = (floor, eager, compiled, peft)
    assert all(said[bar.label] < height for bar, height in zip(BARS, heights, strict=True))
    assert any("recorded on a GPU" in text for text in said)
    assert fig.layout.xaxis.range[1] > 128
