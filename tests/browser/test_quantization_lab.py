"""The quantization lab as a learner goes through it: a bit less, a layer from the map, a sweep that is stopped."""

import pytest
from playwright.sync_api import expect

from .conftest import PIXEL

pytestmark = pytest.mark.browser

PATIENCE = 120_000  # milliseconds; another test's sweep may be ahead in the queue


def chart(visitor, key):
    return visitor.page.locator(f".st-key-quantization_{key} .js-plotly-plot")


def signal(visitor):
    """What the page says of signal to noise, in dB."""
    tile = visitor.page.get_by_test_id("stMetric").filter(has_text="Signal to noise").first
    return float(tile.get_by_test_id("stMetricValue").inner_text().split()[0])


def test_a_bit_less_is_heard_in_the_noise_and_said_in_the_address(visit):
    visitor = visit()
    visitor.open("/quantization", bits=7, data_type="Integer")
    before = signal(visitor)
    visitor.page.locator(".st-key-quantization_bits input[type=range]").focus()
    visitor.page.keyboard.press("ArrowLeft")
    expect(visitor.page.get_by_text("Integer, 6 bits").first).to_be_visible(timeout=PATIENCE)
    visitor.settle()
    assert before - 8 < signal(visitor) < before - 5  # 6 dB a bit
    assert "quantization_bits=6" in visitor.page.url


@pytest.mark.parametrize("arrival", ["from the weights", "by a link"])
def test_a_layer_is_chosen_on_the_map(visit, arrival):
    """Also by one who has seen the Weights before, where the Layer control holds another one."""
    visitor = visit()
    visitor.open("/quantization", **({"view": "Layer map"} if arrival == "by a link" else {}))
    if arrival == "from the weights":
        visitor.page.get_by_role("radio", name="Layer map").click()
        chart(visitor, "map").wait_for()
        visitor.settle()
    left, top = visitor.page.evaluate(PIXEL, ["quantization_map", 1, 3])
    visitor.page.mouse.move(left, top)
    chart(visitor, "map").locator(".hoverlayer .hovertext").wait_for()
    visitor.page.mouse.click(left, top)
    expect(visitor.page.get_by_text("model.layers.3.self_attn.k_proj of storyteller").first).to_be_visible(
        timeout=PATIENCE
    )
    visitor.settle()
    expect(visitor.page.get_by_text("these 32,768 weights: 0 codes and 0 values differ").first).to_be_visible(
        timeout=PATIENCE
    )
    assert "quantization_layer=model.layers.3.self_attn.k_proj" in visitor.page.url


def test_a_sweep_shows_its_points_as_they_come_and_keeps_them_when_it_is_stopped(visit):
    visitor = visit()
    visitor.open("/quantization", view="Model")
    page = visitor.page
    page.locator(".st-key-_quantization_model_start button").click()
    expect(chart(visitor, "perplexity")).to_be_visible(timeout=PATIENCE)
    page.locator("[class*='st-key-_cancel_quantization_model'] button").click()
    visitor.settle()
    expect(page.get_by_text("Cancelled").first).to_be_visible(timeout=PATIENCE)
    expect(chart(visitor, "perplexity")).to_be_visible()


def test_what_is_quantized_already_is_refused_with_the_reason(visit):
    visitor = visit()
    visitor.open("/quantization", model="smollm2-135m-q4")
    expect(visitor.page.get_by_text("already").first).to_be_visible(timeout=PATIENCE)


def test_the_recorded_speed_is_drawn_and_the_controls_outlive_it(visit):
    visitor = visit()
    visitor.open("/quantization", bits=5)
    visitor.page.get_by_role("radio", name="Speed").click()
    chart(visitor, "speed_quantize").wait_for(timeout=PATIENCE)
    expect(visitor.page.get_by_text("The target of 4 times").first).to_be_visible(timeout=PATIENCE)
    visitor.page.get_by_role("radio", name="Weights").click()
    expect(visitor.page.get_by_text("NormalFloat, 5 bits").first).to_be_visible(timeout=PATIENCE)
    assert "quantization_bits=5" in visitor.page.url
