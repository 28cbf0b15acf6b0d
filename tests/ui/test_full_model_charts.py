"""The pictures of the whole model: every number is where it belongs."""

import pytest

from ui import theme
from ui.charts import full_model as charts
from ui.charts.full_model import Memory, Speed

ROWS = [
    Memory("As set", {"weights": 4_000_000, "activations": 6_000_000}, 10_500_000),
    Memory("without LoRA", {"weights": 4_000_000, "routers": 1_000_000}),
    Memory("everything off", {"weights": 8_000_000}, 8_000_000),
]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_part_is_stacked_and_the_measured_peak_is_marked(mode):
    fig = charts.memory(ROWS, mode=mode)
    bars = {trace.name: trace for trace in fig.data if trace.type == "bar"}
    assert list(bars) == ["weights", "routers", "activations"]
    assert list(bars["weights"].x) == [4, 4, 8]
    assert list(bars["activations"].x) == [6, 0, 0]
    (marks,) = (trace for trace in fig.data if trace.type == "scatter")
    assert list(marks.x) == [10.5, 8]
    assert list(marks.y) == [bars["weights"].y[0], bars["weights"].y[2]]
    assert marks.marker.line.color == theme.SURFACES[mode].ink
    assert fig.layout.xaxis.range[1] > 10.5


def test_the_settings_are_thick_and_the_others_ghosts():
    for fig in (charts.memory(ROWS), charts.speed([Speed(row.label, 2.0, 1.0, 3.0) for row in ROWS])):
        bar = fig.data[0]
        assert bar.width[0] > bar.width[1] == bar.width[2]
        assert bar.marker.opacity[0] == 1 > bar.marker.opacity[1]
        assert fig.layout.annotations[0].text == "<b>As set</b>"
        assert fig.layout.annotations[1].text == "without LoRA"


def test_both_figures_have_their_rows_at_the_same_places():
    memory, speed = charts.memory(ROWS), charts.speed([Speed(row.label, 2.0, 1.0, 3.0) for row in ROWS])
    assert memory.data[0].y == speed.data[0].y
    assert memory.layout.height == speed.layout.height == charts.height(len(ROWS))
    assert memory.layout.margin == speed.layout.margin
    assert memory.layout.yaxis.range == speed.layout.yaxis.range


def test_what_was_not_measured_is_not_drawn_but_told():
    fig = charts.speed([Speed("As set", 20.0, 19.0, 22.0, "range of 5 turns"), Speed("without LoRA")])
    (bars,) = fig.data
    assert bars.customdata[0][1] == "20 ms; range of 5 turns 19 to 22"
    assert list(bars.x) == [20]
    assert (bars.error_x.array[0], bars.error_x.arrayminus[0]) == (2, 1)
    said = [note.text for note in fig.layout.annotations]
    assert said == ["<b>As set</b>", "without LoRA", "20\u00a0ms", "not measured"]
    nothing = charts.speed([Speed("As set")])
    assert not nothing.layout.shapes
    assert nothing.layout.xaxis.visible is False
    assert fig.layout.xaxis.visible


def test_a_row_that_was_measured_longer_than_predicted_fits_too():
    fig = charts.memory([Memory("As set", {"weights": 1000}, 3000)])
    assert fig.layout.xaxis.range[1] > 3


@pytest.mark.parametrize(("milliseconds", "said"), [(0.1234, "0.123"), (84.21, "84.2"), (1366.4, "1,366")])
def test_a_time_is_told_without_an_exponent(milliseconds, said):
    assert charts.digits(milliseconds) == said
