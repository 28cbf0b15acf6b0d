"""The first visitor of a new server: Streamlit's own pages navigation once came before the app's."""

import pytest
from playwright.sync_api import expect

from ui.labs import LABS

from .conftest import serve

pytestmark = pytest.mark.browser


def test_a_link_into_the_lab_is_understood_by_a_new_server(visit, tmp_path):
    with serve(tmp_path / "log") as address:
        visitor = visit(address)
        visitor.open("/attention", view="One head")
        menu = visitor.page.get_by_test_id("stSidebarNav")
        expect(menu.get_by_role("link", name="Home")).to_be_visible()
        expect(menu.get_by_role("link")).to_have_count(2 + len(LABS))  # home, the targets
        expect(menu.get_by_role("link", name="Attention", exact=True)).to_have_attribute("aria-current", "page")
        expect(visitor.page).to_have_title("Attention · Transformer Workbench")
        expect(visitor.page.get_by_role("heading", level=1)).to_have_text("What does each attention head look at?")
        assert visitor.pixels("Onehead").startswith("data:image/png")
        visitor.page.close()  # before the server goes, for a window without one complains
