"""The curves carry the numbers they are given."""

import numpy as np
import pytest

from ui import theme
from ui.charts import training as charts
from ui.charts.training import Line
from ui.training.sentences import stripe as stripe_score
from ui.training.settings import amount

X = np.arange(1, 41)
Y = np.linspace(8, 4, 40)


def draw(*lines, **options):
    return charts.curves(lines, across="step", up="loss", **options)


def test_a_curve_has_its_points_its_name_and_its_axes():
    fig = draw(Line("held-out loss", X, Y, 1))
    (trace,) = fig.data
    np.testing.assert_array_equal(trace.x, X)
    np.testing.assert_array_equal(trace.y, Y)
    assert trace.name == "held-out loss"
    assert fig.layout.xaxis.title.text == "step"
    assert fig.layout.yaxis.title.text == "loss"


def test_single_steps_are_faint_behind_their_smoothed_curve_and_both_are_named():
    noisy = Y + np.random.default_rng(0).normal(size=40)
    faint, smooth = draw(Line("loss", X, noisy, 0, raw=True)).data
    np.testing.assert_array_equal(faint.y, noisy)
    assert faint.opacity < 0.5
    assert (faint.name, smooth.name) == ("loss", "smoothed")
    assert faint.showlegend is not False
    assert np.abs(np.diff(smooth.y)).mean() < np.abs(np.diff(noisy)).mean() / 2


@pytest.mark.parametrize("length", [1, 5, 15, 16, 40])
@pytest.mark.parametrize("window", [1, 4, 15])
def test_smoothing_takes_as_many_values_on_either_side(length, window):
    values = np.random.default_rng(length).normal(size=length)
    sides = [min(window // 2, place, length - 1 - place) for place in range(length)]
    expected = [values[place - side : place + side + 1].mean() for place, side in enumerate(sides)]
    np.testing.assert_allclose(charts.smoothed(values, window), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_smoothed_curve_does_not_lag_and_ends_where_the_values_do(seed):
    line = np.linspace(8, 1, 100)
    np.testing.assert_allclose(charts.smoothed(line), line)
    burst = np.append(np.random.default_rng(seed).uniform(5, 6, 4), 20.0)  # a training that diverges at step 5
    np.testing.assert_allclose(charts.smoothed(burst)[[0, -1]], burst[[0, -1]])


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_what_was_recorded_is_dashed_and_grey(mode):
    trace = draw(Line("recorded", X, Y, None), mode=mode).data[0]
    assert trace.line.dash == "dash"
    assert trace.line.color == theme.CATEGORIES[mode][-1]


def test_recorded_steps_are_a_dotted_mean_without_the_faint_ones():
    (trace,) = draw(Line("recorded", X, Y, None, raw=True)).data
    assert trace.line.dash == "dot"
    np.testing.assert_allclose(trace.y, charts.smoothed(Y))


def test_an_empty_curve_is_left_out_and_a_single_point_is_seen():
    fig = draw(Line("none", X[:0], Y[:0], 0), Line("one", X[:1], Y[:1], 1))
    assert [trace.name for trace in fig.data] == ["one"]
    assert not draw(Line("recorded", X[:1], Y[:1], None)).data
    assert "markers" in fig.data[0].mode


def test_a_long_run_is_thinned_with_both_ends_kept():
    trace = draw(Line("long", np.arange(5000), np.arange(5000.0), 0)).data[0]
    assert len(trace.x) <= 600
    assert (trace.x[0], trace.x[-1]) == (0, 4999)
    np.testing.assert_array_equal(trace.x, trace.y)


def test_shares_are_on_one_fixed_scale_and_heights_are_marked():
    fig = draw(Line("induction", X, Y / 8, 2), share=True, marks=[(0.5, "half")])
    assert fig.layout.yaxis.range[0] <= 0
    assert fig.layout.yaxis.range[1] >= 1
    assert fig.layout.shapes[0].y0 == 0.5
    assert fig.layout.annotations[0].text == "half"


@pytest.mark.parametrize("logarithmic", [False, True])
def test_the_axis_shows_the_span_whatever_has_been_drawn(logarithmic):
    ranges = [
        draw(Line("loss", X[:count], Y[:count]), span=(10, 1000), logarithmic=logarithmic).layout.xaxis.range
        for count in (1, 40)
    ]
    assert ranges[0] == ranges[1]
    low, high = (10 ** np.array(ranges[0])) if logarithmic else ranges[0]
    assert low < 10 < 1000 < high
    assert draw(Line("loss", X, Y)).layout.xaxis.range is None


def test_a_note_says_where_the_rest_comes_from():
    fig = draw(Line("loss", X, Y), marks=[(1, "one")], note="recorded elsewhere")
    assert [annotation.text for annotation in fig.layout.annotations] == ["one", "recorded elsewhere"]
    assert len(draw(Line("loss", X, Y)).layout.annotations) == 0


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_moment_is_an_upright_line_with_its_name(logarithmic):
    layout = draw(Line("loss", X, Y), moment=(100, "head formed"), logarithmic=logarithmic).layout
    (line,), (label,) = layout.shapes, layout.annotations
    assert (line.x0, line.x1, line.y0, line.y1, line.yref) == (100, 100, 0, 1, "paper")
    assert label.text == "head formed"
    assert label.x == (2 if logarithmic else 100)  # Plotly's annotations take the exponent there


def test_a_dotted_curve_has_no_markers_that_hide_another():
    (trace,) = draw(Line("one kind", X, Y, 2, dotted=True)).data
    assert trace.line.dash == "dot"
    assert trace.mode == "lines"


def test_the_table_has_every_point_of_every_curve_once():
    table = charts.table([Line("training loss", X, Y), Line("held-out loss", X[::8], Y[::8] + 1)], "step")
    assert list(table.columns) == ["step", "curve", "value"]
    assert len(table) == len(X) + len(X[::8])
    held_out = table[table.curve == "held-out loss"]
    np.testing.assert_array_equal(held_out.step, X[::8])
    np.testing.assert_array_equal(held_out.value, Y[::8] + 1)


@pytest.mark.parametrize("period", [3, 24])
def test_the_stripe_lies_between_the_lines(period):
    stripe = np.zeros((2 * period, 2 * period), np.float16)
    query = np.arange(period, 2 * period)
    stripe[query, query - period + 1] = 1
    assert stripe_score(stripe) == pytest.approx(1)
    fig = charts.look_back(np.tri(2 * period, dtype=np.float16), stripe, ("before", "now"))
    before, now = fig.data
    assert np.isnan(before.z[0][1])
    np.testing.assert_array_equal(np.array(now.z)[np.tri(2 * period, dtype=bool)], stripe[np.tri(2 * period) > 0])
    for low, high in (fig.layout.shapes[:2], fig.layout.shapes[2:]):
        for x, y in zip(query - period + 1, query, strict=True):
            assert y - low.y0 + low.x0 < x < y - high.y0 + high.x0
        assert high.x1 - high.x0 == high.y1 - high.y0
    assert [note.text for note in fig.layout.annotations] == ["before", "now"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0 "),
        (1, "1 "),
        (999, "999 "),
        (1000, "1 k"),
        (926_336, "926 k"),
        (1.5e12, "1.5 T"),
        (2e19, "2e+04 P"),
        (999_950, "1 M"),
        (999_499, "999 k"),
        (-2e6, "-2 M"),
    ],
)
def test_amounts_have_prefixes(number, said):
    assert amount(number) == said
