"""What the Export menu hands out is what is on the page, in files that other programs read."""

import csv
import struct
from collections import Counter
from xml.etree import ElementTree

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

TOKENS = 16


@pytest.fixture
def head(lab):
    return lab(view="One head")


@pytest.fixture
def download(head):
    """Downloads what a button of the Export menu of one head gives: its name and its bytes."""

    def from_button(name):
        head.page.locator(".st-key-attention_Onehead_export").get_by_role("button", name="Export").click()
        button = head.page.get_by_role("button", name=name, exact=True)
        button.wait_for()
        head.settle()
        with head.page.expect_download() as coming:
            button.click()
        head.page.keyboard.press("Escape")
        expect(button).to_be_hidden()
        head.settle()
        return coming.value.suggested_filename, coming.value.path().read_bytes()

    return from_button


def test_every_format_is_what_it_says(head, download, visit, tmp_path):
    assert not head.page.locator(".modebar-container").filter(visible=True).count()
    name, png = download("PNG")
    assert name == "attention-layer5-head0.png"
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    seen = head.chart("Onehead").bounding_box()
    assert struct.unpack(">II", png[16:24]) == pytest.approx((2 * seen["width"], 2 * seen["height"]), abs=2)

    name, svg = download("SVG")
    assert name == "attention-layer5-head0.svg"
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    written = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"␣Sam", "query ↓", "key →"} <= written

    name, table = download("Data as CSV")
    assert name == "attention-layer5-head0.csv"
    rows = list(csv.DictReader(table.decode().splitlines()))
    assert rows[-1]["query"] == "␣and"
    assert len(rows) == TOKENS**2
    mass = Counter()
    for place, row in enumerate(rows):
        mass[place // TOKENS] += float(row["weight"])
    assert all(total == pytest.approx(1, abs=1e-4) for total in mass.values())

    name, html = download("HTML, interactive")
    assert name == "attention-layer5-head0.html"
    saved = tmp_path / name
    saved.write_bytes(html)
    alone = visit()
    alone.page.goto(saved.as_uri())
    alone.page.locator(".heatmaplayer image").wait_for()
