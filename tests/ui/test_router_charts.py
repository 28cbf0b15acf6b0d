"""The pictures of the router lab carry the figures they are given."""

import math
import re

import numpy as np
import pytest

from ui import theme
from ui.charts import router as charts
from ui.charts import router_cost, router_training
from ui.charts.router import Panel
from ui.charts.router_cost import Bar, Line
from ui.charts.router_training import Course
from ui.router import tokens

MODES = ["light", "dark"]
LOGITS = Panel("Logits", "x · wₑ", np.array([-1.5, 2.0, 0.25, 1.0]), "The token points most to expert 1.")
CHOICE = Panel("Chosen", "the 2 highest", np.array([np.nan, 2.0, np.nan, 1.0]), "Expert 2 < expert 3 & lower. " * 6)


def seeded(seed=0):
    return np.random.default_rng(seed)


class TestColour:
    @pytest.mark.parametrize("mode", MODES)
    def test_eight_experts_differ_and_the_ninth_begins_again(self, mode):
        colours = [charts.colour(expert, mode) for expert in range(9)]
        assert len(set(colours)) == charts.COLOURS == 8
        assert colours[8] == colours[0]
        assert set(theme.CATEGORIES[mode]) < set(colours)


class TestWay:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_step_has_a_bar_for_each_expert_with_its_number(self, mode):
        fig = charts.way([LOGITS, CHOICE], (1, 3), mode=mode)
        first, second = fig.data
        np.testing.assert_array_equal(first.y, LOGITS.values)
        assert list(first.text) == ["−1.50", "2.00", "0.25", "1.00"]
        assert list(second.text) == ["–", "2.00", "–", "1.00"]
        assert first.yaxis != second.yaxis
        neutral = theme.SURFACES[mode].line
        assert list(first.marker.color) == [neutral, charts.colour(1, mode), neutral, charts.colour(3, mode)]

    def test_steps_stand_below_each_other_without_touching_their_notes(self):
        fig = charts.way([LOGITS, CHOICE, LOGITS], (1,))
        domains = [axis.domain for axis in (fig.layout.yaxis, fig.layout.yaxis2, fig.layout.yaxis3)]
        heads = [note.y for note in fig.layout.annotations]
        for number, (low, high) in enumerate(domains):
            assert low < high < heads[number]
            if number + 1 < len(domains):
                assert heads[number + 1] < low
        assert fig.layout.xaxis.anchor == "y3"

    def test_notes_are_whole_escaped_and_no_wider_than_a_phone(self):
        text = charts.way([CHOICE], ()).layout.annotations[0].text
        assert "&lt;" in text
        assert "&amp;" in text
        lines = charts._lines(CHOICE.note)
        assert " ".join(lines) == CHOICE.note.strip()
        assert max(map(len, lines)) <= 54
        assert min(map(len, lines)) > 27  # no word alone on the last one

    def test_negative_and_positive_bars_have_room_for_their_numbers(self):
        low, high = charts.way([LOGITS], ()).layout.yaxis.range
        assert low < -1.5
        assert high > 2
        assert charts.way([Panel("Gates", "", np.zeros(3), "")], ()).layout.yaxis.range[1] > 0

    def test_many_experts_have_no_numbers_on_their_bars_but_on_hovering(self):
        fig = charts.way([Panel("Logits", "", np.arange(64.0), "")], (63,))
        assert fig.data[0].text is None
        assert fig.data[0].customdata[63] == "63.00"
        assert len(fig.layout.xaxis.tickvals) <= 16


class TestLoads:
    @pytest.mark.parametrize("mode", MODES)
    def test_bars_refused_and_dead_experts_against_the_fair_share(self, mode):
        load, wanted = np.array([6, 0, 3, 3]), np.array([9, 0, 3, 3])
        fig = charts.loads(load, wanted, 3.75, "fair share", mode=mode)
        named = {trace.name: trace for trace in fig.data}
        np.testing.assert_array_equal(named["computed"].y, load)
        np.testing.assert_array_equal(named["refused: no room left"].y, wanted - load)
        dead = named["dead: no token"]
        assert list(dead.x) == [1]
        assert dead.marker.pattern.shape == "/"
        assert list(named["fair share, 3.75 tokens"].y) == [3.75, 3.75]
        assert fig.layout.yaxis.range[1] >= 9
        assert "<b>6</b>" in fig.layout.xaxis.ticktext[0]

    def test_what_is_not_there_is_not_in_the_legend(self):
        names = [trace.name for trace in charts.loads(np.array([2, 2]), np.array([2, 2]), 2.0, "fair share").data]
        assert names == ["computed", "fair share, 2 tokens"]

    def test_an_empty_load_is_drawn(self):
        fig = charts.loads(np.zeros(4, int), np.array([3, 1, 0, 0]), 1.0, "fair share")
        assert fig.layout.yaxis.range[1] > 3
        (dead,) = (trace for trace in fig.data if trace.name == "dead: no token")
        assert list(dead.x) == [2, 3]  # not those that were wanted and had no room


class TestTokensByExpert:
    PROBS = seeded().dirichlet(np.ones(4), 10)
    TAKEN = np.eye(4, dtype=bool)[PROBS.argmax(1)]
    DROPPED = np.eye(4, dtype=bool)[PROBS.argmin(1)]
    LABELS = tuple(f"<{n}>" for n in range(10))

    def test_the_map_has_every_probability_and_marks_on_the_right_cells(self):
        fig = charts.tokens_by_expert(self.PROBS, self.TAKEN, self.DROPPED, self.LABELS)
        heat, taken, dropped = fig.data
        np.testing.assert_allclose(heat.z, 4 * self.PROBS.T)
        assert f"{self.PROBS[0, 0]:.1%}, {4 * self.PROBS[0, 0]:.2f} × fair" in heat.customdata[0][0]
        for marks, mask in ((taken, self.TAKEN), (dropped, self.DROPPED)):
            assert {(x, y) for x, y in zip(marks.x, marks.y, strict=True)} == set(zip(*np.nonzero(mask), strict=True))
        assert fig.layout.xaxis.ticktext[3] == "&lt;3&gt;"
        assert "refused" in heat.customdata[int(self.DROPPED[0].argmax())][0]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("experts", [1, 2, 8, 64])
    def test_the_colours_go_from_0_to_the_largest_and_the_fair_share_has_the_pages_own(self, experts, mode):
        none = np.zeros((4, experts), bool)
        for favour in (0.0, 0.5, 1.0):
            probs = np.full((4, experts), (1 - favour) / experts)
            probs[:, 0] += favour
            heat = charts.tokens_by_expert(probs, none, none, ["a"] * 4, mode=mode).data[0]
            assert (heat.zmin, heat.zmax) == (0, max(2, experts * probs.max()))
            places = [place for place, _ in heat.colorscale]
            assert places == sorted(places)
            assert (places[0], places[-1]) == (0, 1)
            at_fair = [tint for place, tint in heat.colorscale if place * heat.zmax == pytest.approx(1)]
            assert at_fair == [theme.SURFACES[mode].paper]
            assert f"1/{experts}" in heat.colorbar.title.text

    def test_many_tokens_are_marked_by_the_number_of_their_source(self):
        probs = np.full((90, 2), 0.5)
        none = np.zeros((90, 2), bool)
        fig = charts.tokens_by_expert(probs, none, none, ["a"] * 90, (0, 30))
        assert list(fig.layout.xaxis.ticktext) == ["1", "2"]
        assert list(fig.layout.xaxis.tickvals) == [14.5, 59.5]
        assert [shape.x0 for shape in fig.layout.shapes] == [29.5]


class TestText:
    def text(self, mode="light", **changed):
        given = {
            "tokens": ["␣<b>", "cat", "."],
            "starts": [0, 2],
            "experts": np.array([[2, 0], [1, -1], [-1, -1]]),
            "gates": np.array([[0.25, 0, 0.75], [0, 1.0, 0], [0, 0, 0]]),
            "refused": np.array([False, False, True]),
        }
        return tokens.by_expert(**(given | changed), mode=mode)

    @pytest.mark.parametrize("mode", MODES)
    def test_tokens_are_escaped_named_by_their_experts_and_struck_out_when_dropped(self, mode):
        said = self.text(mode)
        assert "<b>" not in said
        assert "␣&lt;b&gt;" in said
        assert ">2·0</span>" in said
        assert ">1</span>" in said
        assert ">none</span>" in said
        assert said.count("<s>") == 1
        assert "<s>.</s>" in said
        assert said.count("<p class") == said.count("</p>") == 2

    def test_the_bar_is_divided_by_the_gates(self):
        first, second = charts.colour(2, "light"), charts.colour(0, "light")
        assert f"{first} 0.0% 75.0%, {second} 75.0% 100.0%" in self.text()

    def test_of_many_experts_three_are_named(self):
        said = self.text(experts=np.array([[4, 2, 1, 0, 3]] * 3), gates=np.full((3, 5), 0.2))
        assert ">4·2·1+</span>" in said

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("expert", range(8))
    def test_ink_on_every_tint_can_be_read(self, mode, expert):
        surface = theme.SURFACES[mode]
        tint = tokens._mix(charts.colour(expert, mode), surface.paper)
        assert contrast(surface.ink, tint) >= 7


def contrast(one, other):
    """Of two colours, by WCAG 2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


class TestLoadMap:
    CHECKED = np.array([0, 10, 20])
    RELATIVE = np.array([[1.0, 1.0], [2.0, 0.5], [2.0, 0.0]])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_fair_share_is_the_middle_and_half_is_as_far_from_it_as_twice(self, mode):
        heat = router_training.load_map(self.CHECKED, self.RELATIVE, 20, mode=mode).data[0]
        assert heat.zmid == 0
        assert heat.zmin == -heat.zmax
        np.testing.assert_allclose(heat.z, [[0, 1, 1], [0, -1, -np.log2(10)]])
        assert heat.colorscale[3] == (0.5, theme.SURFACES[mode].paper)
        assert heat.colorbar.tickvals[heat.colorbar.ticktext.index("1")] == 0

    def test_a_map_that_is_fair_all_over_has_a_frame(self):
        layout = router_training.load_map(self.CHECKED, np.ones((3, 1)), 20).layout
        assert all(axis.showline and axis.mirror for axis in (layout.xaxis, layout.yaxis))

    def test_the_dead_are_crossed_and_nobody_else(self):
        _, dead = router_training.load_map(self.CHECKED, self.RELATIVE, 20).data
        assert list(zip(dead.x, dead.y, strict=True)) == [(20, 1)]
        assert len(router_training.load_map(self.CHECKED, self.RELATIVE + 0.1, 20).data) == 1

    def test_the_axis_stays_while_the_run_grows(self):
        early = router_training.load_map(self.CHECKED[:2], self.RELATIVE[:2], 400).layout.xaxis.range
        late = router_training.load_map(self.CHECKED, self.RELATIVE, 400).layout.xaxis.range
        assert list(early) == list(late)


def test_balance_is_drawn_against_what_is_fair_with_a_colour_for_each_run():
    def course(name, colour):
        violation, trained = np.array([0.0, 3.0]), np.array([np.nan, 0.5])
        spread = np.array([30.0, 4.0])
        return Course(name, np.array([0, 5]), np.array([1.0, 0.5]), math.log(4), violation, trained, spread, colour)

    both = router_training.balance([course("A", 0), course("B", 1)], 5)
    axes = ["y", "y2", "y2", "y3"]
    assert [(trace.name, trace.yaxis) for trace in both.data] == [(name, axis) for name in "AB" for axis in axes]
    assert both.data[0].line.color == both.data[3].line.color != both.data[4].line.color
    assert [trace.line.dash for trace in both.data[:4]] == ["solid", "solid", "dot", "solid"]
    assert list(both.data[3].y) == [30, 4]
    assert [shape.y0 for shape in both.layout.shapes] == [math.log(4), 0.1]
    least, most = both.layout.yaxis2.range
    assert (
        least <= math.log10(both.data[1].y[0]) < math.log10(0.1) < math.log10(3) < most
    )  # an axis without 0 still shows it, at its lower end
    assert both.data[1].customdata[0] == 0
    assert [trace.showlegend for trace in both.data] == [True, False, False, False] * 2
    assert not any(trace.showlegend for trace in router_training.balance([course("A", 0)], 5).data)


def test_shares_of_each_source_sum_to_one():
    fig = router_training.by_source(np.array([[1, 3], [0, 0]]), ["code & co", "two words that are long"])
    np.testing.assert_allclose(fig.data[0].z, [[0.25, 0.75], [0, 0]])
    assert list(fig.data[0].y) == ["code &amp; co", "two words that<br>are long"]


@pytest.mark.parametrize("largest", [0.2, 0.41, 1.0])
def test_colours_reach_to_the_largest_share_and_figures_on_them_can_be_read(largest):
    counts = np.array([[largest, *np.linspace(0, largest, 9)]])
    counts = np.vstack([counts, counts]) * 1000
    fig = router_training.by_source(counts, ["one", "two"])
    heat, shares = fig.data
    assert heat.zmax == pytest.approx((counts / counts.sum(1, keepdims=True)).max())
    assert shares.text[0] == f"{heat.zmax:.0%}"
    for value, ink in zip(heat.z.ravel(), shares.textfont.color, strict=True):
        stops = np.array([[int(channel) for channel in re.findall(r"\d+", tint)] for _, tint in heat.colorscale])
        levels = [level for level, _ in heat.colorscale]
        cell = [round(np.interp(value / heat.zmax, levels, channel)) for channel in stops.T]
        assert contrast(ink, "#{:02X}{:02X}{:02X}".format(*cell)) >= 4.2, value


@pytest.mark.parametrize("experts", [1, 8, 16])
def test_the_title_below_an_axis_is_placed_by_no_measured_label(experts):
    relative = np.ones((2, experts))
    for words, fig in (
        ("step", router_training.load_map(np.array([0, 5]), relative, 5)),
        ("expert", router_training.by_source(relative, ["one", "two"])),
    ):
        assert fig.layout.xaxis.title.text is None
        (title,) = (note for note in fig.layout.annotations if note.text == words)
        assert title.y == 0
        assert -fig.layout.margin.b + 20 < title.yshift < -20  # below the labels and whole


class TestCost:
    LINES = (
        Line("Mixture", 0, [16, 32], [1.0, 2.0], low=[0.5, 1.5], high=[1.5, 4.0], hover=["one", "two"]),
        Line("Mixture", 0, [16, 32], [0.8, 1.6], dashed=True),
        Line("Dense", 1, [16, 32], [3.0, 6.0]),
    )

    @pytest.mark.parametrize("mode", MODES)
    def test_a_layer_has_one_look_and_one_entry_and_what_is_predicted_is_dashed(self, mode):
        fig = router_cost.panels(
            [("time, ms", self.LINES), ("GFLOP", self.LINES[2:])], "tokens", span=(16, 64), mode=mode
        )
        mixture, predicted, dense, again, entry = fig.data
        assert mixture.line.color == predicted.line.color != dense.line.color == again.line.color
        assert (predicted.line.dash, mixture.line.dash) == ("dash", "solid")
        assert [trace.name for trace in fig.data if trace.showlegend is not False] == ["Mixture", "Dense", "predicted"]
        assert entry.x == (None,)
        np.testing.assert_allclose(np.subtract(mixture.y, mixture.error_y.arrayminus), [0.5, 1.5])
        np.testing.assert_allclose(np.add(mixture.y, mixture.error_y.array), [1.5, 4.0])
        assert again.yaxis == "y2"
        assert fig.layout.yaxis.domain[0] > fig.layout.yaxis2.domain[1]

    def test_the_axis_shows_what_is_to_come(self):
        fig = router_cost.panels([("ms", [])], "tokens", span=(16, 1024))
        low, high = fig.layout.xaxis.range
        assert 10**low < 16
        assert 10**high > 1024
        assert list(fig.layout.xaxis.ticktext)[-1] == "1k"


class TestSpeeds:
    @pytest.mark.parametrize("mode", MODES)
    def test_bars_of_one_label_stand_together_below_the_roof(self, mode):
        bars = [
            Bar("a < b", 0, 5.0, 4.0, 7.0, "first"),
            Bar("a < b", 1, 3.0, 2.5, 3.5, "second"),
            Bar("c", 0, 1.0, 1.0, 1.0, "third"),
        ]
        fig = router_cost.speeds(bars, ["even", "uneven"], "TFLOP/s", roof=8.0, roof_words="one product", mode=mode)
        even, uneven = fig.data
        assert (list(even.x), list(uneven.x)) == ([5.0, 1.0], [3.0])
        assert even.y[0] < uneven.y[0] < even.y[1]
        assert list(even.error_x.array) == [2.0, 0.0]
        assert list(even.error_x.arrayminus) == [1.0, 0.0]
        assert list(even.customdata) == ["first", "third"]
        assert fig.layout.shapes[0].x0 == 8.0 < fig.layout.xaxis.range[1]
        assert [note.text for note in fig.layout.annotations] == ["a &lt; b", "c", "one product"]
