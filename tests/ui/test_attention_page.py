"""The attention lab in Streamlit's own test harness, on the real runtime and real models."""

import json
import re

import pytest

import ui.run
from engine.catalogue import SMOLLM2_Q4
from engine.experiments._attention import MAX_TOKENS, REPEATING_TEXT
from tests.ui.lab_pages import finished, words
from ui.attention.explore import VIEWS
from ui.labs import ATTENTION


@pytest.fixture
def lab(open_page):
    """Opens the lab, as a browser with this query string would, and waits until everything is computed."""
    return lambda state=None, **query: open_page(ATTENTION, query, state)


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


def test_at_first_sight_all_heads_and_the_next_token(lab):
    app = lab()
    assert "Of 48 heads" in words(app)
    assert "the strongest is layer 5, head 5, with 96%" in words(app)
    assert "“␣Sam” next" in words(app)
    assert len(spec(app, "attention_all")["data"][0]["text"]) == 6
    assert "Our own model" in words(app)
    assert "Fused kernels never hold these maps" in words(app)


@pytest.mark.parametrize(
    ("model", "layers", "heads"), [("storyteller", 6, 8), (SMOLLM2_Q4, 30, 9), ("all-minilm-l6-v2", 6, 12)]
)
def test_layers_go_down_and_heads_across_in_every_model(lab, model, layers, heads):
    drawn = spec(lab(model=model), "attention_all")
    texts = drawn["data"][0]["text"]
    assert (len(texts), {len(row) for row in texts}) == (layers, {heads})
    assert texts[4][7].startswith("<b>Layer 4, head 7</b>")
    assert drawn["layout"]["yaxis"]["title"]["text"] == "layer ↓"
    assert drawn["layout"]["xaxis"]["title"]["text"] == "head →"


def test_no_number_reads_as_a_decimal_where_a_head_is_meant(lab):
    for query in ({}, {"order": "Induction heads"}, {"view": "One head"}, {"tab": "Predict"}):
        assert not re.search(r"(?i)\bhead \d+\.\d", words(lab(**query)))
    assert "Layer 5, head 0 " in words(lab(view="One head"))


@pytest.mark.parametrize("view", VIEWS[1:-1])
def test_every_view_draws_the_chosen_head_and_follows_the_head_slider(lab, view):
    app = lab(view=view)
    key = f"attention_{view.replace(' ', '')}"
    before = spec(app, key)["data"]
    app.slider(key="attention_head").set_value(5)
    finished(app)
    assert spec(app, key)["data"] != before


@pytest.mark.parametrize(
    ("model", "label", "first"),
    [
        ("storyteller", "Induction heads", "L5 H5<br>96%"),
        ("storyteller", "Previous-token heads", "L4 H7<br>"),
        (SMOLLM2_Q4, "Induction heads", "L18 H6<br>"),
        (SMOLLM2_Q4, "Previous-token heads", "L16 H0<br>"),
        (SMOLLM2_Q4, "Sinks", "L18 H"),
    ],
)
def test_one_choice_sorts_the_heads(lab, model, label, first):
    app = lab(order=label, model=model)
    assert spec(app, "attention_all")["layout"]["annotations"][0]["text"].startswith(first)


def test_a_text_that_repeats_itself_is_one_click_away(lab):
    app = lab(order="Induction heads")
    next(button for button in app.button if button.label == "Use a text that repeats itself").click()
    finished(app)
    assert app.text_area(key="attention_text").value == REPEATING_TEXT
    assert "“␣cat” next" in words(app)


def test_temperature_changes_the_map_and_the_next_token(lab):
    app = lab(view="What changed")
    assert "Nothing has changed yet" in words(app)
    app.slider(key="attention_temperature").set_value(3.0)
    finished(app)
    assert "The largest change" in words(app)
    assert "before your change" in words(app)


def test_a_dropped_token_is_named_and_gone(lab):
    app = lab(view="One head")
    app.selectbox(key="attention_drop").set_value(2)
    finished(app)
    assert "␣Sam" not in spec(app, "attention_Onehead")["layout"]["yaxis"]["ticktext"]
    assert "“␣Sam” (97.9%); now" in words(app)


def test_the_arithmetic_of_a_cell_has_its_numbers(lab):
    app = lab(view="One head", query="15 · ␣and", key="2 · ␣Sam")
    assert "How much does “␣and” look at “␣Sam”?" in words(app)
    assert "89.9%" in words(app)


def test_a_forbidden_cell_says_why(lab):
    assert "exactly $0$" in words(lab(view="Step by step", query="2 · ␣Sam", key="9 · ␣saw"))


def test_pinning_draws_both_runs(lab):
    app = lab(view="One head")
    next(button for button in app.button if button.label == "Pin as A").click()
    finished(app)
    app.slider(key="attention_head").set_value(6)
    finished(app)
    assert spec(app, "attention_OneheadA")["data"][0]["z"] != spec(app, "attention_OneheadB")["data"][0]["z"]
    assert "A: head 0 · B: head 6" in words(app)


def test_the_same_address_shows_the_same_page(lab):
    query = {"view": "Arcs", "model": SMOLLM2_Q4, "layer": 18, "head": 6, "threshold": 40, "text": REPEATING_TEXT}
    one, two = lab(**query), lab(**query)
    assert spec(one, "attention_Arcs") == spec(two, "attention_Arcs")
    assert one.slider(key="attention_layer").value == 18
    assert "at least 40 %" in words(one)


def test_another_model_keeps_the_text_and_moves_layer_and_head_to_what_it_has(lab):
    app = lab(model=SMOLLM2_Q4, layer=29, head=8)
    assert "Of 270 heads" in words(app)
    assert "4-bit source" in words(app)
    app.selectbox(key="_attention_model_chosen").set_value("storyteller")
    finished(app)
    assert "Of 48 heads" in words(app)
    assert (app.slider(key="attention_layer").value, app.slider(key="attention_head").value) == (5, 7)
    assert not app.warning


def test_nothing_is_asked_of_a_model_that_it_does_not_have(lab, real_runtime, monkeypatch):
    """While another model loads, the page still has the layers of the last one."""
    settled, submit, asked = ui.run._settled, real_runtime.submit, []
    app = lab(model=SMOLLM2_Q4, layer=29, head=8, view="One head")
    monkeypatch.setattr(ui.run, "_settled", lambda slot, key, seconds: settled(slot, key, 0))
    monkeypatch.setattr(
        real_runtime, "submit", lambda name, params, owner: asked.append(params) or submit(name, params, owner)
    )
    app.selectbox(key="_attention_model_chosen").set_value("storyteller")
    app.run()
    assert app.progress
    finished(app)
    heads = [params for params in asked if hasattr(params, "layer")]
    assert heads
    assert {(params.model, params.layer, params.head) for params in heads} == {("storyteller", 5, 7)}
    assert not app.warning


def test_a_model_that_cannot_be_loaded_is_said_once_beside_what_was_there(lab):
    app = lab()
    app.selectbox(key="_attention_model_chosen").set_value("another…")
    app.run()
    app.text_input(key="_attention_model_typed").set_value("./no/such/folder")
    finished(app)
    assert words(app).count("./no/such/folder") == 1
    assert len(app.warning) == 1
    assert "“␣Sam” next" in words(app)


def test_a_link_to_a_deeper_model_is_followed_in_a_session_that_knows_another(lab, monkeypatch):
    settled = ui.run._settled
    app = lab()
    app.switch_page("app_pages/home.py")
    app.run()
    monkeypatch.setattr(ui.run, "_settled", lambda slot, key, seconds: settled(slot, key, 0))
    app.switch_page("app_pages/attention.py")
    app.query_params.update({"attention_model": SMOLLM2_Q4, "attention_layer": "29", "attention_head": "8"})
    finished(app)
    assert app.slider(key="attention_layer").value == 29
    assert not app.warning


@pytest.mark.parametrize("held", [99, "13 · ␣to"])
def test_a_token_that_another_text_or_model_had_is_chosen_no_longer(lab, held):
    """A browser that still shows the old list sends the old label, and Streamlit hands it on as it is."""
    app = lab(state={"attention_query": held, "attention_key": held}, view="One head")
    assert "How much does “␣and” look at “␣Sam”?" in words(app)


def test_an_encoder_is_a_choice_of_this_lab(lab):
    app = lab()
    app.selectbox(key="_attention_model_chosen").set_value("all-minilm-l6-v2")
    finished(app)
    assert "Of 72 heads" in words(app)
    assert "An encoder predicts no next token" in words(app)


@pytest.mark.parametrize("start", ATTENTION.starts, ids=lambda start: start.label)
def test_every_start_of_the_home_page_opens_without_a_word_of_warning(lab, start):
    app = lab(**start.settings)
    assert not app.warning
    assert not app.error
    view = start.settings.get("view", VIEWS[0])
    assert spec(app, "attention_all" if view == VIEWS[0] else f"attention_{view.replace(' ', '')}")["data"]


class TestBadInput:
    @pytest.mark.parametrize(("text", "said"), [("", "The text is empty"), ("   ", "only spaces")])
    def test_nothing_to_read(self, lab, text, said):
        app = lab()
        app.text_area(key="attention_text").set_value(text)
        finished(app)
        assert said in words(app)
        app.text_area(key="attention_text").set_value("Good again")
        finished(app)
        assert said not in words(app)
        assert "Of 48 heads" in words(app)

    def test_emoji_alone_are_shown_as_their_pieces(self, lab):
        app = lab(text="😀😀", view="One token")
        assert "looks most at" in words(app)

    def test_a_long_text_is_counted_and_can_be_cut(self, lab):
        app = lab(text="word " * 300)
        assert f"tokens; the lab shows up to {MAX_TOKENS}" in words(app)
        app.toggle(key="attention_cut").set_value(True)
        finished(app)
        assert "Of 48 heads" in words(app)

    def test_an_unknown_model_is_one_sentence_and_the_way_back_works(self, lab):
        app = lab(model="nobody/no-such-model")
        assert "nobody/no-such-model" in words(app)
        assert app.text_input(key="_attention_model_typed").value == "nobody/no-such-model"
        app.selectbox(key="_attention_model_chosen").set_value("storyteller")
        finished(app)
        assert "Of 48 heads" in words(app)

    def test_nonsense_in_the_address_is_ignored_and_said(self, lab):
        app = lab(layer="banana", temperature="-7", view="nothing", head="999999")
        assert "banana" in words(app)
        assert app.slider(key="attention_layer").value == 5
        assert "Of 48 heads" in words(app)

    def test_a_window_longer_than_the_text_does_nothing_and_says_so(self, lab):
        app = lab(view="One head", mask="sliding window", window=100)
        assert "A window of 100 on 16 tokens allows exactly what the model's own mask allows" in words(app)


def test_the_untrained_layer_has_no_roles_and_predicts_nothing(lab):
    app = lab(weights="untrained")
    assert "Before training" in words(app)
    assert "predicts no next token" in words(app)


def test_predict_compares_the_guess_with_the_model(lab):
    app = lab(tab="Predict")
    app.text_input(key="attention_guess").set_value("Sam")
    finished(app)
    assert "Yes: “␣Sam” is first" in words(app)
    app.text_input(key="attention_guess").set_value("elephant")
    finished(app)
    assert "not among the ten" in words(app)
    app.selectbox(key="attention_answer0").set_value(0)
    finished(app)
    assert "most goes to" in words(app)


def test_the_tests_tab_is_green_on_these_settings(lab):
    assert "6 of 6 properties hold" in words(lab(tab="Tests"))


def test_the_code_tab_shows_the_engine(lab):
    app = lab(tab="Code")
    assert any("def attention_stages" in code.value for code in app.code)
