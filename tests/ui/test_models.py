"""The model picker in Streamlit's own test harness: what is chosen, typed and linked is what the lab gets."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from engine.catalogue import DEFAULT, MINILM, MODELS, SMOLLM2
from ui.models import OTHER

PAGE = Path(__file__).parent / "models_page.py"
CHOICE, FIELD = "_probe_model_chosen", "_probe_model_typed"


@pytest.fixture
def open_page():
    def open_with(model=None, **state):
        app = AppTest.from_file(str(PAGE), default_timeout=20)
        if model is not None:
            app.query_params["probe_model"] = model
        for name, value in state.items():
            app.session_state[name] = value
        return run(app)

    return open_with


def run(app):
    app.run()
    assert not app.exception
    return app


def choose(app, option):
    app.selectbox(key=CHOICE).set_value(option)
    return run(app)


def enter(app, name):
    app.text_input(key=FIELD).set_value(name)
    return run(app)


def picked(app):
    return app.session_state["picked"]["model"]


def linked(app):
    held = app.query_params.get("probe_model")
    return held if held is None or isinstance(held, str) else held[0]  # what a test has set comes back as it was set


def test_the_default_is_chosen_and_not_in_the_address(open_page):
    app = open_page()
    assert picked(app) == app.selectbox(key=CHOICE).value == DEFAULT
    assert linked(app) is None
    assert not app.text_input


def test_every_model_is_named_with_its_size_and_its_facts_are_at_hand(open_page):
    select = open_page().selectbox(key=CHOICE)
    assert list(select.options) == [*(model.label for model in MODELS), OTHER]
    assert "4-bit source" in select.help
    assert all(model.facts in select.help for model in MODELS)


def test_a_choice_is_in_the_address_and_the_default_leaves_it(open_page):
    app = choose(open_page(), SMOLLM2)
    assert picked(app) == linked(app) == SMOLLM2
    choose(app, DEFAULT)
    assert picked(app) == DEFAULT
    assert linked(app) is None


@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_a_link_to_an_offered_model_chooses_it(open_page, name):
    app = open_page(name)
    assert picked(app) == app.selectbox(key=CHOICE).value == name
    assert not app.text_input


@pytest.mark.parametrize(
    "name", ["HuggingFaceTB/SmolLM2-360M", "/models/mine", "~/x.gguf", "smollm2-135m-q4", "two words"]
)
def test_a_link_to_any_other_model_shows_its_name(open_page, name):
    app = open_page(name)
    assert picked(app) == app.text_input(key=FIELD).value == name
    assert app.selectbox(key=CHOICE).value == OTHER


def test_until_a_name_is_typed_the_model_stays(open_page):
    app = choose(open_page(SMOLLM2), OTHER)
    assert picked(app) == linked(app) == SMOLLM2
    assert SMOLLM2 in app.caption[0].value.replace("\\", "")
    enter(app, "   ")
    assert picked(app) == SMOLLM2
    enter(app, " owner/model ")
    assert picked(app) == linked(app) == "owner/model"
    assert not app.caption


def test_an_emptied_field_keeps_the_model(open_page):
    app = enter(open_page("owner/model"), "")
    assert picked(app) == "owner/model"
    assert "owner/model" in app.caption[0].value


def test_what_was_typed_is_still_there_after_a_look_at_another_model(open_page):
    app = choose(open_page("owner/model"), DEFAULT)
    assert picked(app) == DEFAULT
    choose(app, OTHER)
    assert picked(app) == linked(app) == app.text_input(key=FIELD).value == "owner/model"


def test_typing_an_offered_name_chooses_it(open_page):
    app = enter(choose(open_page(), OTHER), SMOLLM2)
    assert picked(app) == app.selectbox(key=CHOICE).value == SMOLLM2
    assert not app.text_input


def test_a_new_address_in_the_same_session_wins(open_page):
    app = choose(open_page(), SMOLLM2)
    app.query_params["probe_model"] = "owner/model"
    run(app)
    assert picked(app) == app.text_input(key=FIELD).value == "owner/model"
    del app.query_params["probe_model"]
    run(app)
    assert picked(app) == app.selectbox(key=CHOICE).value == DEFAULT


def test_a_lab_without_encoders_offers_none(open_page):
    app = open_page(kinds=("decoder",))
    assert len(app.selectbox(key=CHOICE).options) == len(MODELS)
    app = open_page(MINILM, kinds=("decoder",))
    assert picked(app) == app.text_input(key=FIELD).value == MINILM
    assert app.selectbox(key=CHOICE).value == OTHER
