"""The training lab while it trains: the curves grow, nothing jumps, and what was learned stays."""

import io
import zipfile

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

PATIENCE = 60_000  # milliseconds; another test's training may be ahead in the queue
SHAPE = {"num_layers": 1, "d_model": 32, "num_heads": 2, "batch_size": 64}

# Looks at every frame that the browser draws: the curves on the page, and where and how large their charts are.
FOLLOW = """() => {
  window.frames = []
  const main = document.querySelector("[data-testid=stMain]")
  const look = () => {
    const charts = ["training_loss", "training_heads"].map((key) => document.querySelector(`.st-key-${key}`))
    if (charts.every((chart) => chart?.querySelector(".scatterlayer .trace"))) window.begun = true
    if (window.begun) window.frames.push(charts.map((chart) => {
      const box = chart?.getBoundingClientRect()
      const plot = chart?.querySelector(".js-plotly-plot")
      return {
        curves: plot?.querySelectorAll(".scatterlayer .trace").length ?? 0,
        top: Math.round((box?.top ?? 0) + main.scrollTop),
        height: Math.round(box?.height ?? 0),
        axis: JSON.stringify(plot?._fullLayout?.xaxis.range),
      }
    }))
    requestAnimationFrame(look)
  }
  look()
}"""


@pytest.fixture
def training(visit):
    """Opens the lab with these settings and starts a training."""

    def train(**settings):
        visitor = visit()
        visitor.open("/training", **SHAPE, **settings)
        visitor.page.evaluate(FOLLOW)
        visitor.page.get_by_role("button", name="Train", exact=True).click()
        expect(visitor.page.get_by_text("So far the held-out loss").first).to_be_visible(timeout=PATIENCE)
        return visitor

    return train


def steps_drawn(visitor):
    """How many steps the curve of the training loss has."""
    last = visitor.page.wait_for_function(
        """() => {
          const plot = document.querySelector(".st-key-training_loss .js-plotly-plot")
          const curve = plot?.calcdata?.find(([point]) => point.trace.name === "training loss")
          return curve && Math.max(...curve.map(({ x }) => x))
        }"""
    )
    return last.json_value()


def test_the_curves_grow_in_every_frame_of_their_place_until_the_result_is_there(training):
    visitor = training(steps=400)
    seen = [steps_drawn(visitor)]
    while visitor.page.locator(".st-key-_cancel_training_run").is_visible():
        visitor.page.wait_for_timeout(500)
        seen.append(steps_drawn(visitor))
    visitor.settle()
    assert seen == sorted(seen)
    assert len(set(seen)) >= 3
    assert steps_drawn(visitor) == 400
    frames = visitor.page.evaluate("window.frames")
    assert len(frames) > 50
    for chart in zip(*frames, strict=True):
        assert min(frame["curves"] for frame in chart) >= 1
        assert len({frame["height"] for frame in chart}) == 1
        assert len({frame["axis"] for frame in chart}) == 1
        tops = [frame["top"] for frame in chart]
        assert max(tops) - min(tops) <= 30  # the line above becomes two


def test_a_cancelled_run_keeps_its_curves_and_gives_its_model(training):
    visitor = training(steps=2000)
    button = visitor.page.locator(".st-key-_training_train button").first
    expect(button).to_be_disabled()
    before = steps_drawn(visitor)
    visitor.page.get_by_role("button", name="Cancel").click()
    expect(visitor.page.get_by_text("Cancelled after step").first).to_be_visible(timeout=PATIENCE)
    visitor.settle()
    assert before <= steps_drawn(visitor) < 2000
    expect(button).to_be_enabled()
    with visitor.page.expect_download() as coming:
        visitor.page.get_by_role("button", name="Save model").click()
    assert coming.value.suggested_filename == "trained-model.zip"
    with zipfile.ZipFile(io.BytesIO(coming.value.path().read_bytes())) as archive:
        assert {"trained-model/model.safetensors", "trained-model/config.json"} <= set(archive.namelist())
