"""The FlashAttention lab as a learner goes through it: predicted memory, a measurement, and the tiles as they go."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

PATIENCE = 240_000  # milliseconds; another test's job may be ahead in the queue
SECONDS_PLAYED = 60_000


def test_every_view_opens(visit):
    visitor = visit()
    visitor.open("/flash")
    expect(visitor.page.locator(".st-key-flash_forecast .js-plotly-plot")).to_be_visible()
    for view in ("Tiles", "Online softmax", "Roofline", "Accuracy", "Decode", "Speed and memory"):
        visitor.page.get_by_role("radio", name=view, exact=True).click()
        visitor.settle()
        expect(visitor.page.get_by_test_id("stException")).to_have_count(0)
        assert not visitor.faults, view


def test_points_appear_when_it_is_measured(visit):
    visitor = visit()
    visitor.open("/flash", max_length="256", heads=2)
    page = visitor.page
    page.locator(".st-key-_flash_speed_run_start button").click()
    plot = page.locator(".st-key-flash_speed .js-plotly-plot").last  # while it is redrawn, the one before is there too
    expect(plot).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Measured on")).to_be_visible(timeout=PATIENCE)
    expect(plot).to_contain_text("Standard attention")
    visitor.settle()
    page.get_by_role("radio", name="% of peak").click()
    visitor.settle()
    expect(plot).to_contain_text("measured peak", timeout=PATIENCE)
    assert "flash_quantity=" in page.url


def test_the_tiles_play_to_their_end_and_can_be_stepped(visit):
    visitor = visit()
    visitor.open("/flash", view="Tiles", step=12)
    page = visitor.page
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_text("All 16 tiles are done")).to_be_visible(timeout=SECONDS_PLAYED)
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    page.get_by_role("button", name="Back").click()
    expect(page.get_by_text("Step 16 of 16")).to_be_visible()
    page.locator(".st-key-flash_step input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("Step 15 of 16")).to_be_visible()
    visitor.settle()
    expect(page).to_have_url(re.compile("flash_step=14"))


def test_a_phone_shows_the_tiles_without_scrolling_sideways(visit):
    visitor = visit(viewport={"width": 390, "height": 844})
    visitor.open("/flash", view="Tiles")
    wide, there = visitor.page.locator("[data-testid=stMain]").evaluate(
        "(place) => [place.scrollWidth, place.clientWidth]"
    )
    assert wide <= there <= 390
