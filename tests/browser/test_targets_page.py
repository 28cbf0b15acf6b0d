"""The targets page as a visitor sees it: bounds and records at once, on a phone as well, and a report to take home."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_bounds_and_records_are_there_before_anything_is_measured(visit):
    visitor = visit()
    visitor.open("/targets")
    row = visitor.page.get_by_role("row", name="FlashAttention, speed-up of cold calls")
    expect(row).to_contain_text("more than 1.5×")
    expect(row).to_contain_text("H200")
    expect(visitor.page.get_by_test_id("stMain").get_by_role("button", name="Measure")).to_be_enabled()


def test_a_phone_shows_every_row_whole(visit):
    visitor = visit(viewport={"width": 390, "height": 844})
    visitor.open("/targets")
    for place in ("html", "[data-testid=stMain]"):
        wide, there = visitor.page.locator(place).evaluate("(place) => [place.scrollWidth, place.clientWidth]")
        assert wide <= there <= 390
    for cell in visitor.page.locator(".targets td:visible, .targets th:visible").all():
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_its_table_can_be_read_by_all(visit, mode):
    visitor = visit(color_scheme=mode)
    visitor.open("/targets")
    assert not Axe().run(visitor.page, context=".targets").response["violations"]
