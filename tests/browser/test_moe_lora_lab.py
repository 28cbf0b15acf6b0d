"""The MoE-LoRA lab as a learner goes through it: train, look at the experts, watch two inputs part."""

import pytest
from playwright.sync_api import expect

from .conftest import PIXEL

pytestmark = pytest.mark.browser

PATIENCE = 120_000  # milliseconds; another test's training may be ahead in the queue


def chart(visitor, key):
    return visitor.page.locator(f".st-key-moe_lora_{key} .js-plotly-plot")


def test_four_tasks_are_learned_and_a_cell_opens_its_experts(visit):
    visitor = visit()
    visitor.open("/moe_lora", steps=10, batch_size=4, rank=2, targets="query and value")
    page = visitor.page
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_text("All 3 runs of 10 steps were made").first).to_be_visible(timeout=PATIENCE)
    visitor.settle()
    expect(chart(visitor, "routing")).to_be_visible()
    expect(page.get_by_text("What the mixture answers")).to_be_visible()

    page.get_by_role("radio", name="Experts").click()
    visitor.settle()
    chart(visitor, "information").scroll_into_view_if_needed()
    left, top = page.evaluate(PIXEL, ["moe_lora_information", 1, 4])
    page.mouse.move(left, top)
    chart(visitor, "information").locator(".hoverlayer .hovertext").wait_for()
    page.mouse.click(left, top)
    expect(page.get_by_text("Layer 4, v_proj: the strongest update").first).to_be_visible(timeout=PATIENCE)


def test_two_inputs_part_with_the_bias_and_not_without(visit):
    visitor = visit(viewport={"width": 390, "height": 844})
    visitor.open("/moe_lora", view="Two inputs")
    page = visitor.page
    expect(page.get_by_text("A takes expert").first).to_be_visible(timeout=PATIENCE)
    box = chart(visitor, "split_chart").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    visitor.open("/moe_lora", view="Two inputs", split_bias_rate=0)
    expect(page.get_by_text("both take expert").first).to_be_visible(timeout=PATIENCE)


def test_a_phone_shows_the_whole_of_the_recorded_tables(visit):
    visitor = visit(viewport={"width": 390, "height": 844})
    visitor.open("/moe_lora", view="Speed")
    tables = visitor.page.get_by_test_id("stTable")
    expect(tables).to_have_count(2)
    for table in tables.all():
        box = table.locator("table").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
