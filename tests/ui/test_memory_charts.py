"""The pictures of memory carry the bytes they are given."""

import math

import pytest

from engine.memory_budget import PARTS
from ui import theme
from ui.charts import memory as charts
from ui.charts.memory import Line, Pair, Stack

GB = 10**9
BARS = [
    Stack("Full", {"weights": 13 * GB, "gradients": 14 * GB, "optimizer state": 27 * GB}),
    Stack("QLoRA", {"weights": 3 * GB, "scales": 2 * GB, "activations": 10 * GB}, chosen=True),
]
MODES = ["light", "dark"]


def texts(fig):
    return [annotation.text for annotation in fig.layout.annotations]


@pytest.mark.parametrize("mode", MODES)
def test_the_bars_are_stacked_from_their_parts(mode):
    fig = charts.stacks(BARS, card=24 * GB, mode=mode)
    drawn = {trace.name: list(trace.x) for trace in fig.data}
    assert fig.layout.barmode == "stack"
    assert drawn == {
        "weights": [13, 3],
        "scales": [0, 2],
        "optimizer state": [27, 0],
        "gradients": [14, 0],
        "activations": [0, 10],
    }
    assert [text.replace("\u00a0", " ") for text in texts(fig)] == [
        "Full",
        "<b>QLoRA</b>",
        "54.0 GB",
        "15.0 GB",
        "the card: 24 GB",
    ]
    (line,) = fig.layout.shapes
    assert line.x0 == line.x1 == 24
    assert fig.layout.xaxis.range[1] > 54


def test_every_part_can_be_told_from_the_others():
    looks = []
    for mode in MODES:
        fig = charts.stacks([Stack("all", dict.fromkeys(PARTS, GB))], mode=mode)
        assert [trace.name for trace in fig.data] == list(PARTS)
        looks = [(trace.marker.color, trace.marker.pattern.shape) for trace in fig.data]
        assert len(set(looks)) == len(PARTS)
        assert {colour for colour, _ in looks} <= set(theme.CATEGORIES[mode])
        assert all(trace.marker.pattern.bgcolor == trace.marker.color for trace in fig.data)


def test_a_card_that_is_far_larger_is_said_and_not_drawn():
    fig = charts.stacks([Stack("small", {"weights": 3 * 10**8})], card=24 * GB)
    assert not fig.layout.shapes
    assert "the card: 24\u00a0GB, far to the right" in texts(fig)
    assert fig.layout.xaxis.range[1] < 1000
    assert fig.layout.xaxis.title.text == "MB"


@pytest.mark.parametrize(
    ("nbytes", "said"), [(0, "0.00 B"), (999, "999 B"), (15.2e9, "15.2 GB"), (564.5e9, "564 GB"), (4.81e6, "4.81 MB")]
)
def test_amounts_have_three_digits(nbytes, said):
    assert charts.amount(nbytes) == said.replace(" ", "\u00a0")


def test_what_never_fits_has_no_point_and_the_settings_are_marked():
    lengths = (128, 256, 512)
    fig = charts.rooms([Line("LoRA", (4, 2, 0), 0, False), Line("QLoRA", (8, 4, 2), 2, True)], lengths, (256, 3), 256)
    lora, qlora, here = fig.data
    assert list(lora.y) == [4, 2, None]
    assert (lora.line.dash, qlora.line.dash) == ("solid", "dash")
    assert (list(here.x), list(here.y)) == ([256], [3])
    assert (fig.layout.xaxis.type, fig.layout.yaxis.type) == ("log", "log")
    assert [line.x0 for line in fig.layout.shapes] == [256]
    assert [(note.text, note.x) for note in fig.layout.annotations] == [("reads 256", pytest.approx(math.log10(256)))]
    assert charts.rooms([], lengths, (128, 1), 512).data[0].name == "your settings"


def test_predicted_and_measured_lie_beside_each_other():
    fig = charts.pairs([Pair("saved", 200, None), Pair("peak", 3000, 2900)])
    predicted, measured = fig.data
    assert list(predicted.x) == [0.2, 3]
    assert list(measured.x) == [2.9]
    assert list(measured.customdata) == ["peak"]
    assert texts(fig) == ["saved (not told apart here)", "peak"]
