"""The router lab as a learner goes through it: every view, a training beside its cure, and a phone."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

PATIENCE = 240_000  # milliseconds; another test's training may be ahead in the queue


def plot(visitor, key):
    """While a chart is redrawn, the one before is there too."""
    return visitor.page.locator(f".st-key-router_{key} .js-plotly-plot").last


def test_every_view_opens_and_a_token_is_followed_with_the_arrow_keys(visit):
    visitor = visit()
    visitor.open("/router")
    expect(plot(visitor, "way")).to_contain_text("Gates")
    field = visitor.page.locator(".st-key-router_position input")
    field.focus()
    visitor.page.keyboard.press("ArrowUp")
    expect(visitor.page).to_have_url(re.compile("router_position=4"))
    visitor.settle()
    expect(visitor.page.get_by_text("Token 4 (counted from 0; the text has 188)")).to_be_visible()
    for view, sign in (
        ("A text", "load"),
        ("Cost", "forecast"),
    ):
        visitor.page.get_by_role("radio", name=view, exact=True).click()
        expect(plot(visitor, sign)).to_be_visible()
        visitor.settle()
    for view in ("Collapse", "What experts learned"):
        visitor.page.get_by_role("radio", name=view, exact=True).click()
        expect(visitor.page.get_by_text("Nothing is trained yet")).to_be_visible()
        visitor.settle()
    expect(visitor.page.get_by_test_id("stException")).to_have_count(0)


def test_a_collapse_is_watched_pinned_and_cured(visit):
    visitor = visit()
    visitor.open("/router", view="Collapse", collapse_steps=60, collapse_experts=8)
    page = visitor.page
    page.get_by_role("button", name="Train", exact=True).click()
    expect(plot(visitor, "load_map")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("All 60 steps were taken")).to_be_visible(timeout=PATIENCE)
    visitor.settle()
    page.get_by_role("button", name="Pin as A").click()
    expect(page.get_by_role("button", name="Unpin A")).to_be_visible()
    visitor.settle()
    page.locator(".st-key-router_collapse_balancing input").click()
    page.get_by_role("option", name="loss-free bias").click()
    expect(page).to_have_url(re.compile("router_collapse_balancing=loss-free"))
    visitor.settle()
    page.get_by_role("button", name="Train again").click()
    expect(plot(visitor, "load_mapB")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("B: All 60 steps were taken")).to_be_visible(timeout=PATIENCE)
    visitor.settle()
    expect(plot(visitor, "load_mapA")).to_be_visible()
    expect(plot(visitor, "balance")).to_contain_text("B: loss-free bias")


@pytest.mark.parametrize("view", ["One token's way", "A text", "Cost"])
def test_a_phone_shows_it_without_scrolling_sideways(visit, view):
    visitor = visit(viewport={"width": 390, "height": 844})
    visitor.open("/router", view=view)
    wide, there = visitor.page.locator("[data-testid=stMain]").evaluate(
        "(place) => [place.scrollWidth, place.clientWidth]"
    )
    assert wide <= there <= 390
