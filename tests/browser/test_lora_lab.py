"""The LoRA lab as a learner goes through it: move the rank, train, look inside, take the adapter home and back."""

import pytest
from playwright.sync_api import expect

from .conftest import PIXEL

pytestmark = pytest.mark.browser

PATIENCE = 120_000  # milliseconds; another test's training may be ahead in the queue

AREA = """() => {
  const plot = document.querySelector(".st-key-lora_scale .js-plotly-plot")
  return plot._fullData.slice(0, 3).map(({ x, y }) =>
    (Math.max(...x) - Math.min(...x)) * (Math.max(...y) - Math.min(...y)))
}"""


def chart(visitor, key):
    return visitor.page.locator(f".st-key-lora_{key} .js-plotly-plot")


def test_the_strips_follow_the_rank_and_the_chart_stays_where_it_is(visit):
    visitor = visit()
    visitor.open("/lora", shape="SmolLM2-135M", matrix="up_proj")
    frozen, a, b = visitor.page.evaluate(AREA)
    assert [frozen, a, b] == pytest.approx([576 * 1536, 576 * 8, 8 * 1536])
    before = chart(visitor, "scale").bounding_box()
    visitor.page.locator(".st-key-lora_rank input[type=range]").focus()
    visitor.page.keyboard.press("ArrowRight")
    expect(visitor.page.get_by_text("At rank 9, A and B hold").first).to_be_visible()
    visitor.settle()
    assert visitor.page.evaluate(AREA) == pytest.approx([576 * 1536, 576 * 9, 9 * 1536])
    assert chart(visitor, "scale").bounding_box() == before
    assert "lora_rank=9" in visitor.page.url


def test_what_was_trained_is_looked_into_taken_home_and_brought_back(visit, tmp_path):
    visitor = visit()
    visitor.open("/lora", steps=10, batch_size=4, rank=2)
    page = visitor.page
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_text("All 10 steps were taken").first).to_be_visible(timeout=PATIENCE)
    visitor.settle()
    expect(page.get_by_text("What it answers")).to_be_visible()
    with page.expect_download() as coming:
        page.get_by_role("button", name="Save adapter").click()
    file = tmp_path / coming.value.suggested_filename
    coming.value.save_as(file)

    page.get_by_role("radio", name="Inside the update").click()
    visitor.settle()
    chart(visitor, "norms").scroll_into_view_if_needed()
    left, top = page.evaluate(PIXEL, ["lora_norms", 3, 5])
    page.mouse.move(left, top)
    chart(visitor, "norms").locator(".hoverlayer .hovertext").wait_for()
    page.mouse.click(left, top)
    expect(page.get_by_text("|ΔW| of layer 5, o_proj")).to_be_visible(timeout=PATIENCE)

    page.get_by_role("radio", name="Your adapter").click()
    visitor.settle()
    page.locator("[data-testid=stFileUploader] input[type=file]").set_input_files(file)
    expect(chart(visitor, "uploaded_spectrum")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("An adapter of rank 2 for 42 matrices").first).to_be_visible()
    visitor.settle()
    broken = tmp_path / "adapter_model.bin"
    broken.write_bytes(b"a pickle")
    page.locator("[data-testid=stFileUploader] input[type=file]").set_input_files(broken)
    expect(page.get_by_text("is a pickle, which could run code")).to_be_visible(timeout=PATIENCE)
