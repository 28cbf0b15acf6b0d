"""The README's tour: it passes every page, and every address in it opens as it is written."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from ui.labs import LABS

pytestmark = pytest.mark.browser

README = Path(__file__).parents[2] / "README.md"
TOUR = re.findall(r"^\| `(/[^`]*)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)


def test_it_passes_home_every_lab_and_the_targets():
    passed = [urlsplit(address).path.strip("/") for address in TOUR]
    assert passed == ["", *(lab.url_path for lab in LABS), "targets"]


@pytest.mark.timeout(600)
def test_every_address_opens_without_a_fault(visit):
    visitor = visit()
    for address in TOUR:
        visitor.open(address)
        expect(visitor.page.get_by_test_id("stException")).to_have_count(0)
        said = visitor.page.get_by_test_id("stAlert").all_inner_texts()
        assert not [sentence for sentence in said if "The link sets" in sentence], address
        assert not visitor.faults, address
