"""The pictures of a mixture of adapters carry the numbers they are given, in scales that mean the same everywhere."""

import numpy as np
import pytest
from plotly.colors import hex_to_rgb

from ui import theme
from ui.charts import moe_lora as charts
from ui.charts import moe_lora_split

MODES = ["light", "dark"]
TASKS = ["Pets", "Plurals", "Backwards", "Opposites"]


def shares(checkups, experts, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(experts), size=(checkups, len(TASKS)))


class TestRouting:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("experts", [1, 4, 8])
    def test_every_task_has_its_map_on_one_scale(self, mode, experts):
        given = shares(5, experts)
        fig = charts.routing(np.arange(0, 50, 10), given, TASKS, (0, 40), mode=mode)
        assert len(fig.data) == len(TASKS)
        for index, trace in enumerate(fig.data):
            np.testing.assert_array_equal(trace.z, given[:, index].T)
            assert trace.coloraxis == "coloraxis"
        scale = fig.layout.coloraxis
        assert (scale.cmin, scale.cmax) == (0, given.max())
        assert scale.colorbar.tickvals[-1] == scale.cmax
        assert scale.colorbar.ticktext[-1] == f"{given.max():.0%}"
        assert [note.text for note in fig.layout.annotations] == TASKS

    @pytest.mark.parametrize("checked", [[0], [0, 8], [0, 8, 16, 20]])
    def test_columns_cover_what_was_checked_and_no_more(self, checked):
        fig = charts.routing(np.array(checked), shares(len(checked), 3), TASKS, (0, 64))
        edges = list(fig.data[0].x)
        assert len(edges) == len(checked) + 1
        assert edges == sorted(set(edges))
        assert edges[0] == 0
        assert edges[-1] == checked[-1] or len(checked) == 1
        assert edges[-1] <= 64
        for left, step, right in zip(edges, checked, edges[1:], strict=False):
            assert left <= step <= right

    def test_the_axes_are_named(self):
        fig = charts.routing(np.array([0, 1]), shares(2, 2), TASKS, (0, 1))
        assert fig.layout.xaxis4.title.text == "step"
        assert fig.layout.yaxis.title.text == "expert"


@pytest.mark.parametrize("count", [1, 6, 30])
def test_the_map_of_information_frames_what_is_chosen(count):
    values = np.random.default_rng(count).uniform(0, 0.3, size=(count, 7))
    values[0, 2] = np.nan
    fig = charts.information(values, range(count), list("qkvogud"), (count - 1, 3))
    np.testing.assert_array_equal(fig.data[0].z, values)
    assert fig.layout.coloraxis.cmin == 0
    assert fig.layout.coloraxis.cmax == fig.layout.coloraxis.colorbar.tickvals[-1] == np.nanmax(values)
    (frame,) = fig.layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (2.5, 3.5, count - 1.5, count - 0.5)
    assert len(fig.layout.yaxis.ticktext) <= 16


def test_a_map_without_information_still_has_a_scale():
    fig = charts.information(np.zeros((2, 1)), range(2), ["q_proj"], (0, 0))
    assert fig.layout.coloraxis.cmax > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("experts", [1, 4, 8])
def test_every_expert_has_a_look_of_its_own(mode, experts):
    sigma = np.sort(np.random.default_rng(0).uniform(0.1, 3, size=(experts, 4)))[:, ::-1]
    fig = charts.spectra(sigma, mode=mode)
    looks = {(trace.line.color, trace.line.dash) for trace in fig.data}
    assert len(looks) == experts
    assert {colour for colour, _ in looks} <= set(theme.CATEGORIES[mode])
    for trace, values in zip(fig.data, sigma, strict=True):
        np.testing.assert_array_equal(trace.y, values)


def test_an_expert_that_learned_nothing_has_no_place_on_a_logarithmic_axis():
    fig = charts.spectra(np.array([[2.0, 0.0], [0.0, 0.0]]))
    assert np.isnan(fig.data[0].y[1])
    assert np.isnan(fig.data[1].y).all()


@pytest.mark.parametrize("mode", MODES)
def test_likeness_has_a_sign_and_nought_is_the_page(mode):
    cosines = np.array([[1.0, -0.4], [-0.4, 1.0]])
    trace, written = charts.similarity(cosines, mode=mode).data
    assert (trace.zmin, trace.zmid, trace.zmax) == (-1, 0, 1)
    middle = trace.colorscale[len(trace.colorscale) // 2]
    assert middle == (0.5, theme.SURFACES[mode].paper)
    assert written.text[1] == "-0.40"
    layout = charts.similarity(cosines, mode=mode).layout
    (title,) = layout.annotations
    assert (title.text, title.yref, title.y) == ("expert", "y domain", 0)
    assert 30 < -title.yshift < layout.margin.b  # below the tick labels, and not cut off


def test_no_number_is_written_as_minus_nought():
    _, written = charts.similarity(np.array([[1.0, -0.001], [-0.001, 1.0]])).data
    assert written.text[1] == "0.00"
    _, written = charts.without(np.full((1, 1), -0.001), np.ones((1, 1)), ["Pets"], ["0"], "expert", 1.0).data
    assert written.text[0].startswith("+0.00")


@pytest.mark.parametrize("mode", MODES)
def test_every_cell_can_be_read(mode):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    values = np.linspace(-1, 1, 41)[None]
    cells, written = charts.without(
        values, np.ones((1, 41)), ["Pets"], list(map(str, range(41))), "expert", 1.0, mode=mode
    ).data
    colours = [colour for _, colour in cells.colorscale]
    corners = np.array(list(map(hex_to_rgb, colours)))  # evenly spaced
    places = np.linspace(0, len(corners) - 1, 41)
    backgrounds = np.stack([np.interp(places, range(len(corners)), channel) for channel in corners.T], axis=-1)
    for ink, background in zip(written.textfont.color, backgrounds, strict=True):
        low, high = sorted((luminance(hex_to_rgb(ink)), luminance(background)))
        assert (high + 0.05) / (low + 0.05) > 4.5


@pytest.mark.parametrize("limit", [0.0, 2.5])
def test_what_breaks_is_written_into_its_cell(limit):
    change = np.array([[0.5, -0.25], [0.0, 2.5]])
    fig = charts.without(change, np.array([[0.25, 1.0], [0.5, 0.0]]), TASKS[:2], ["0", "1"], "expert", limit)
    trace, written = fig.data
    np.testing.assert_array_equal(trace.z, change)
    told = dict(zip(zip(written.y, written.x, strict=True), written.text, strict=True))
    assert told[TASKS[0], "0"] == "+0.50<br>25% right"
    assert told[TASKS[1], "0"] == "+0.00<br>50% right"
    assert told[TASKS[1], "1"] == "+2.50<br>0% right"
    assert trace.zmax == -trace.zmin == (limit or 1.0)
    assert list(trace.y) == TASKS[:2]


class TestSplit:
    def draw(self, rounds=11, mode="light"):
        generator = np.random.default_rng(rounds)
        lead, handicap = generator.normal(size=(rounds, 2)), generator.normal(size=rounds)
        loss = np.geomspace(1, 1e-12, rounds)[:, None] * np.ones(2)
        chosen = (lead < handicap[:, None]).astype(int)
        return lead, handicap, chosen, loss, moe_lora_split.split(lead, handicap, chosen, loss, "of scores", mode=mode)

    @pytest.mark.parametrize("mode", MODES)
    def test_inputs_keep_their_look_above_and_below(self, mode):
        lead, handicap, chosen, loss, fig = self.draw(mode=mode)
        named = [trace for trace in fig.data if trace.name in ("input A", "input B")]
        for index, name in enumerate(("input A", "input B")):
            above, below = (trace for trace in named if trace.name == name)
            assert (above.line.color, above.line.dash) == (below.line.color, below.line.dash)
            np.testing.assert_array_equal(above.y, lead[:, index])
            np.testing.assert_array_equal(below.customdata, loss[:, index])
        assert len({trace.line.dash for trace in named}) == 2
        (bias,) = [trace for trace in fig.data if trace.name and trace.name.startswith("the bias")]
        np.testing.assert_array_equal(bias.y, handicap)
        (taken,) = [trace for trace in fig.data if trace.type == "heatmap"]
        np.testing.assert_array_equal(taken.z, chosen.T)

    def test_an_error_of_nought_has_a_place(self):
        *_, loss, fig = self.draw()
        loss[-1] = 0
        assert all((np.asarray(trace.y) > 0).all() for trace in fig.data if trace.yaxis == "y3")

    def test_one_round_is_drawn_too(self):
        *_, fig = self.draw(rounds=2)
        assert list(fig.layout.xaxis3.range) == [-0.5, 1.5]
