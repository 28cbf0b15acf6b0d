"""The memory lab as a learner goes through it: a smaller card, checkpointing, and a step that is really taken."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

PATIENCE = 120_000  # milliseconds; another test's job may be ahead in the queue


def tile(visitor, label):
    metric = visitor.page.get_by_test_id("stMetric").filter(has_text=label).first
    return metric.get_by_test_id("stMetricValue").inner_text()


def test_checkpointing_makes_room_on_the_card(visit):
    visitor = visit()
    visitor.open("/memory", shape="Llama 7B", card=12)
    assert tile(visitor, "QLoRA on 12 GB") != "fits"
    visitor.page.locator(".st-key-memory_checkpointing label").first.click()
    visitor.settle()
    assert tile(visitor, "QLoRA on 12 GB") == "fits"
    assert "memory_checkpointing=true" in visitor.page.url


def test_every_view_opens(visit):
    visitor = visit()
    visitor.open("/memory")
    for view in ("Through a step", "What fits", "Measured", "Speed", "Paged optimizer", "Budget"):
        visitor.page.get_by_role("radio", name=view, exact=True).click()
        visitor.settle()
        expect(visitor.page.get_by_test_id("stException")).to_have_count(0)
        assert not visitor.faults, view


def test_a_step_is_taken_and_weighed_beside_its_prediction(visit):
    visitor = visit()
    visitor.open("/memory", view="Measured", batch=1, length=128)
    page = visitor.page
    page.locator(".st-key-_memory_measure_button button").click()
    expect(page.locator(".st-key-memory_pairs .js-plotly-plot")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("predicted").first).to_be_visible()
