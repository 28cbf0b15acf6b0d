"""The pictures carry the numbers they are given: what is read back from a figure is what went in."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from ui.charts import attention as charts


def causal(length, seed=0):
    logits = np.random.default_rng(seed).normal(size=(length, length)) * 2
    logits[np.triu_indices(length, 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def words(length):
    return [f"w{index}" for index in range(length)]


def test_the_map_shows_the_weights_and_leaves_the_forbidden_blank():
    matrix = causal(6)
    allowed = np.tril(np.ones((6, 6), bool))
    heatmap = charts.weights(matrix, words(6), allowed=allowed).data[0]
    np.testing.assert_array_equal(heatmap.z[allowed], matrix[allowed])
    assert np.isnan(heatmap.z[~allowed]).all()
    assert (heatmap.zmin, heatmap.zmax) == (0, 1)


def test_query_goes_down_and_key_across():
    fig = charts.weights(causal(4), words(4))
    assert fig.layout.yaxis.title.text == "query ↓"
    assert fig.layout.yaxis.autorange == "reversed"
    assert fig.layout.xaxis.title.text == "key →"
    assert list(fig.layout.yaxis.ticktext) == words(4)
    assert fig.data[0].hovertemplate.startswith("query “%{y}”<br>key “%{x}”")


def test_equal_weights_have_equal_colours_on_every_map():
    """The scale is fixed: the colour of 25 % does not depend on what else is on the map."""
    quiet, loud = (charts.weights(np.full((2, 2), share), words(2)).data[0] for share in (0.25, 1.0))
    assert quiet.colorscale == loud.colorscale
    assert (quiet.zmin, quiet.zmax) == (loud.zmin, loud.zmax)


def test_the_colour_grows_with_the_root_of_the_weight():
    places = [place for place, _ in charts.SQUARE_ROOT]
    assert places[0] == 0
    assert places[-1] == 1
    np.testing.assert_allclose(np.sqrt(places), np.linspace(0, 1, len(places)))


def test_long_texts_get_fewer_labels_and_keep_every_cell():
    fig = charts.weights(causal(128), words(128))
    assert fig.data[0].z.shape == (128, 128)
    assert len(fig.layout.xaxis.ticktext) <= 40
    assert fig.data[0].customdata[77, 33].tolist() == ["w77", "w33"]  # the thinned axes cannot name every cell
    assert fig.layout.xaxis.ticktext[1] == f"w{fig.layout.xaxis.tickvals[1]}"


def pixels(fig):
    source = fig.layout.images[0].source
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGBA"))


def plot_size(fig):
    layout = fig.layout
    return layout.width - layout.margin.l - layout.margin.r, layout.height - layout.margin.t - layout.margin.b


@pytest.mark.parametrize("length", [1, 5, 14, 48, 100])
def test_thumbnails_have_a_place_for_every_head(length):
    attention = np.stack([[causal(length, seed) for seed in range(3)] for _ in range(2)])
    grid = [[(layer, head) for layer in range(2)] for head in range(3)]
    fig = charts.thumbnails(attention, grid, lambda cell: f"{cell}", side=50, chosen=(1, 2))
    assert fig.data[0].text[2][1] == "(1, 2)"
    assert (fig.layout.shapes[0].x0, fig.layout.shapes[0].y0) == (0.5, 1.5)
    assert plot_size(fig) == (100, 150)
    image = pixels(fig)
    rows, columns = image.shape[0] / 3, image.shape[1] / 2
    assert rows == columns == int(rows)


@pytest.mark.parametrize("side", [38, 76])
@pytest.mark.parametrize("titles", [None, {(0, 0): "L0 H0<br>12%", (0, 1): "L0 H1<br>3%"}])
def test_a_small_map_is_square_on_the_page_and_has_more_pixels_than_its_place(side, titles):
    """A picture with fewer pixels than its place would be blurred by the browser, a stretched one says less."""
    attention = np.stack([[causal(16, seed) for seed in range(2)]])
    fig = charts.thumbnails(attention, [[(0, 0), (0, 1)]], str, side=side, titles=titles)
    image = pixels(fig)
    width, height = plot_size(fig)
    assert width == 2 * side
    assert height == side + (charts.TITLE_HEIGHT if titles else 0)
    assert image.shape[1] >= 2 * width
    assert image.shape[1] / width == pytest.approx(image.shape[0] / height, rel=0.01)


def test_the_small_maps_have_the_colour_scale_of_the_large_one_with_a_legend():
    matrix = causal(6)
    axis = charts.thumbnails(matrix[None, None], [[(0, 0)]], str, side=60).layout.coloraxis
    large = charts.weights(matrix, words(6)).data[0]
    assert (axis.colorscale, axis.cmin, axis.cmax) == (large.colorscale, large.zmin, large.zmax)
    assert axis.showscale is not False
    assert axis.colorbar.title.text == large.colorbar.title.text == "weight"


def test_a_bright_weight_is_a_bright_pixel_where_it_belongs():
    dark, bright = np.zeros((2, 1, 1, 8, 8), np.float32)
    bright[0, 0, 6, 2] = 1
    fig = charts.thumbnails(np.stack([dark[0], bright[0]]), [[(0, 0), (1, 0)]], str, side=60)
    image = pixels(fig).astype(int).sum(-1)
    place = image.shape[1] // 2
    found_y, found_x = np.nonzero(image == image.max())
    assert found_x.min() >= place
    assert (found_x.mean() - place) / place == pytest.approx(2.5 / 8, abs=0.02)
    assert found_y.mean() / place == pytest.approx(6.5 / 8, abs=0.02)


def test_a_thin_line_survives_a_small_picture():
    """128 tokens in 48 pixels: averaging would lose the one bright cell in its block."""
    matrix = np.zeros((1, 1, 128, 128), np.float32)
    matrix[0, 0, 77, 33] = 1
    brightest = charts.unlabel_rgb(charts.SQUARE_ROOT[-1][1])
    colours = pixels(charts.thumbnails(matrix, [[(0, 0)]], str, side=48))[..., :3].reshape(-1, 3).tolist()
    assert [round(part) for part in brightest] in colours


@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.6])
def test_arcs_are_drawn_for_the_connections_above_the_threshold_and_no_others(threshold):
    matrix = causal(9)
    fig = charts.arcs(matrix, words(9), threshold)
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    drawn = sum(int(np.isnan(trace.x).sum()) for trace in lines)
    assert drawn == (matrix >= threshold).sum()
    queries, keys = np.nonzero(matrix >= threshold)
    pieces = [trace.x.reshape(-1, charts.ARC_POINTS + 1)[:, :-1] for trace in lines]
    ends = sorted((float(arc.max()), float(arc.min())) for piece in pieces for arc in piece)
    itself = 0.18
    expected = sorted(
        (q + itself, k - itself) if q == k else (float(q), float(k)) for q, k in zip(queries, keys, strict=True)
    )
    np.testing.assert_allclose(ends, expected, atol=0.01)


def test_the_difference_is_centred_on_zero():
    matrix = np.array([[0.3, np.nan], [-0.1, 0.0]])
    heatmap = charts.difference(matrix, words(2)).data[0]
    assert heatmap.zmin == pytest.approx(-heatmap.zmax)
    assert heatmap.zmax == pytest.approx(0.3)


def test_stages_share_the_scale_of_the_logits_and_blank_the_mask():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 5)) * 8
    scaled = scores / 8
    masked = np.where(np.tril(np.ones((5, 5), bool)), scaled, -np.inf)
    fig = charts.stages(
        scores, scaled, masked, causal(5), rng.normal(size=(5, 4)), words(5), scaling="÷ 8", cell=(4, 1)
    )
    assert len(fig.data) == 5
    assert (fig.data[1].zmin, fig.data[1].zmax) == (fig.data[2].zmin, fig.data[2].zmax)
    assert np.isnan(fig.data[2].z[0, 1:]).all()
    assert np.isnan(fig.data[3].z[0, 1:]).all()
    assert len(fig.layout.shapes) == 4


def test_next_tokens_mark_the_old_place_only_if_something_changed():
    names = ["a", "b"]
    assert len(charts.next_tokens(names, [0.6, 0.3], [0.6, 0.3]).data) == 1
    changed = charts.next_tokens(names, [0.3, 0.6], [0.6, 0.3])
    assert list(changed.data[1].x) == [0.3, 0.6]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_figure_can_be_drawn_for_one_token(mode):
    one = np.ones((1, 1), np.float32)
    charts.weights(one, ["a"], mode=mode).to_json()
    charts.arcs(one, ["a"], 0.1, mode=mode).to_json()
    charts.out_of(one[0], ["a"], 0, mode=mode).to_json()
    charts.difference(one * 0, ["a"], mode=mode).to_json()
    charts.stages(one, one, one, one, one, ["a"], scaling="÷ 8", mode=mode).to_json()


def test_tokens_that_look_like_markup_are_shown_letter_by_letter():
    """Plotly takes <s>, the first token of many models, for a tag and would show nothing."""
    fig = charts.weights(causal(3), ["<s>", "a&b", "<a href='x'>"])
    assert list(fig.layout.xaxis.ticktext) == ["&lt;s>", "a&amp;b", "&lt;a href='x'>"]
    assert fig.layout.yaxis.ticktext == fig.layout.xaxis.ticktext
    assert charts.next_tokens(["<s>"], [1.0], [1.0]).layout.yaxis.ticktext == ("&lt;s>",)
