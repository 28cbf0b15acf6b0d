"""The attention lab under a learner's hands: sliders, clicks on maps, links, and what makes no sense."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def said(visitor, words):
    return visitor.page.get_by_text(words).filter(visible=True).first


@pytest.mark.parametrize(
    ("slider", "key", "value"), [("temperature", "ArrowRight", "1.1"), ("layer", "ArrowLeft", "4")]
)
def test_a_slider_changes_the_map_and_the_address_and_the_address_brings_both_back(lab, slider, key, value):
    visitor = lab(view="One head", head=3)
    before = visitor.pixels("Onehead")
    visitor.press(slider, key)
    moved = visitor.pixels("Onehead")
    assert moved != before
    assert visitor.setting(slider) == value
    sentence = visitor.chart("Onehead").get_attribute("aria-label")
    visitor.page.reload()
    visitor.settle()
    expect(visitor.slider(slider)).to_have_value(value)
    expect(visitor.slider("head")).to_have_value("3")
    assert visitor.pixels("Onehead") == moved
    assert visitor.chart("Onehead").get_attribute("aria-label") == sentence


def test_a_thumbnail_opens_that_very_head(lab):
    layer, head = 4, 7
    visitor = lab()
    visitor.click_cell("all", head, layer)
    expect(visitor.slider("layer")).to_have_value(str(layer))
    expect(visitor.slider("head")).to_have_value(str(head))
    expect(said(visitor, f"Layer {layer}, head {head} ")).to_be_visible()
    expect(visitor.page).to_have_url(re.compile("attention_view=One.head"))
    visitor.settle()
    clicked = visitor.pixels("Onehead")
    assert clicked == lab(view="One head", layer=layer, head=head).pixels("Onehead")


def test_a_thumbnail_of_the_sorted_heads_opens_the_head_that_is_named_above_it(lab):
    visitor = lab(order="Induction heads")
    titles = visitor.chart("all").locator(".annotation-text").all_text_contents()
    layer, head = re.match(r"L(\d) H(\d)", titles[8]).groups()
    visitor.click_cell("all", 2, 1)
    expect(said(visitor, f"Layer {layer}, head {head} ")).to_be_visible()
    expect(visitor.slider("layer")).to_have_value(layer)
    expect(visitor.slider("head")).to_have_value(head)


def test_a_cell_of_the_map_gets_its_arithmetic(lab):
    visitor = lab(view="One head")
    expect(said(visitor, "How much does “␣and” look at “␣Sam”?")).to_be_visible()
    visitor.click_cell("Onehead", 1, 4)
    expect(said(visitor, "How much does “␣to” look at “␣and”?")).to_be_visible()
    visitor.settle()
    assert visitor.setting("query").startswith("4 ")
    assert visitor.setting("key").startswith("1 ")


def test_another_model_is_a_choice_away_and_the_address_brings_it_back(lab):
    visitor = lab(layer=3, view="One head")
    before = visitor.pixels("Onehead")
    choose_model(visitor, "SmolLM2-135M")
    expect(visitor.page).to_have_url(re.compile("attention_model=smollm2-135m"))
    visitor.settle()
    expect(visitor.slider("layer")).to_have_attribute("max", "29")
    expect(visitor.slider("layer")).to_have_value("3")
    moved = visitor.pixels("Onehead")
    assert moved != before
    visitor.page.reload()
    visitor.settle()
    assert visitor.pixels("Onehead") == moved
    choose_model(visitor, "storyteller")
    expect(visitor.page).not_to_have_url(re.compile("attention_model"))
    visitor.settle()
    assert visitor.pixels("Onehead") == before


def test_any_other_model_is_typed_and_a_wrong_one_keeps_what_was_typed(lab):
    visitor = lab(view="One head")
    choose_model(visitor, "another")
    field = visitor.page.get_by_label("Hugging Face id, folder or .gguf file")
    expect(field).to_be_visible()
    visitor.settle()
    expect(visitor.chart("Onehead")).to_be_visible()
    field.fill("./no/such/folder")
    field.press("Enter")
    expect(said(visitor, "check the path")).to_be_visible()
    expect(field).to_have_value("./no/such/folder")
    visitor.settle()
    field.fill("smollm2-135m-q4")
    field.press("Enter")
    expect(visitor.page).to_have_url(re.compile("smollm2-135m-q4"))
    visitor.settle()
    expect(said(visitor, "4-bit source")).to_be_visible()
    expect(visitor.slider("layer")).to_have_attribute("max", "29")


def choose_model(visitor, label):
    visitor.page.locator(".st-key-_attention_model_chosen input").click()
    visitor.page.get_by_role("option", name=label).click()


class TestBadInput:
    def test_the_text_stays_as_typed_beside_a_sentence(self, lab):
        visitor = lab(view="One head")
        field = visitor.page.locator(".st-key-attention_text textarea")
        for text, sentence in (
            ("", "The text is empty"),
            ("   ", "only spaces"),
            ("word " * 300, "tokens; the lab shows up to"),
        ):
            field.fill(text)
            field.press("Control+Enter")
            expect(said(visitor, sentence)).to_be_visible()
            visitor.settle()
            expect(field).to_have_value(text)
        field.fill("Tom and Mia saw a cat. Tom and")
        field.press("Control+Enter")
        expect(said(visitor, "“␣Mia” next")).to_be_visible()
        expect(visitor.page.get_by_text("tokens; the lab shows up to")).to_have_count(0)
        expect(visitor.page).to_have_url(re.compile("attention_text=Tom.and.Mia.saw.a.cat"))

    def test_nonsense_in_the_address_is_named_and_replaced(self, lab):
        visitor = lab(layer="banana", temperature=-7, view="nothing", head=999_999)
        for words in ("The link sets Layer to “banana”", "The link sets Temperature to “-7”", "“999999”"):
            expect(said(visitor, words)).to_be_visible()
        expect(visitor.slider("layer")).to_have_value("5")
        expect(said(visitor, "Of 48 heads")).to_be_visible()

    def test_an_address_without_a_page_is_said_and_leads_home(self, visit):
        visitor = visit()
        visitor.open("/nonsense")
        expect(visitor.page.get_by_role("dialog")).to_contain_text("does not seem to exist")
        (told,) = visitor.faults  # Streamlit says it on the console as well
        assert "does not seem to exist" in told
        visitor.faults.clear()
        visitor.page.keyboard.press("Escape")
        expect(visitor.page.get_by_role("dialog")).to_have_count(0)
        expect(visitor.page.get_by_role("heading", level=1)).to_have_text("See what happens inside a transformer")


def test_back_and_forward_lead_through_the_pages(visit):
    visitor = visit()
    title = visitor.page.get_by_role("heading", level=1)
    visitor.open("/")
    visitor.page.get_by_role("link", name="Follow one head step by step").click()
    expect(title).to_have_text("What does each attention head look at?")
    visitor.settle()
    visitor.page.go_back()
    expect(title).to_have_text("See what happens inside a transformer")
    visitor.settle()
    visitor.page.go_forward()
    expect(title).to_have_text("What does each attention head look at?")
    expect(visitor.chart("Stepbystep")).to_be_visible()
