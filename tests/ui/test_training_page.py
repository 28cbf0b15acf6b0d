"""The training lab in Streamlit's own test harness, on the real runtime and a tiny model."""

import base64
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from engine.experiments import _training, attention, training
from engine.runtime.jobs import LocalJob
from tests.ui.lab_pages import SECONDS, finished, words
from ui.labs import TRAINING
from ui.training.settings import amount

TOO_SHORT = "Your text has 10 characters"
TINY = {"num_layers": 1, "d_model": 32, "num_heads": 2, "batch_size": 2, "steps": 60, "learning_rate": "0.01"}


@pytest.fixture
def lab(open_page):
    """Opens the lab, as a browser with this query string would."""
    return lambda **query: open_page(TRAINING, TINY | query)


def train(app):
    app.button(key="_training_train").click()
    return finished(app)


def spec(app, key):
    return decoded(json.loads(app.get_by_key(key).proto.spec))


def decoded(found):
    """Plotly's base64 arrays as lists."""
    for trace in found["data"]:
        for axis in "xy":
            if isinstance(trace[axis], dict):
                raw = base64.b64decode(trace[axis]["bdata"])
                trace[axis] = np.frombuffer(raw, trace[axis]["dtype"]).tolist()
    return found


def names(app, key):
    return [trace["name"] for trace in spec(app, key)["data"]]


def test_nothing_runs_before_it_is_asked_for_and_the_cost_is_predicted(lab):
    app = lab()
    assert "Nothing is trained yet" in words(app)
    recorded = _training.recorded_run()
    assert names(app, "training_storyteller_heads") == ["induction", "previous token"]
    induction = spec(app, "training_storyteller_heads")["data"][0]["y"]
    np.testing.assert_array_equal(induction, recorded.induction[recorded.checked > 0])
    assert "head formed" in str(spec(app, "training_storyteller_loss")["layout"]["annotations"])
    assert app.slider(key="training_random_share").value == 0.6  # not hidden in the expander
    assert not [slider for box in app.expander for slider in box.slider if slider.key == "training_random_share"]
    before = next(caption.value for caption in app.caption if caption.value.startswith("Predicted"))
    app.slider(key="training_num_layers").set_value(4)
    finished(app)
    after = next(caption.value for caption in app.caption if caption.value.startswith("Predicted"))
    assert before != after


def test_a_run_is_drawn_alone_along_its_steps(lab):
    app = train(lab())
    assert "All 60 steps were taken" in words(app)
    assert f"guessing evenly costs ln 320 = {math.log(training.VOCAB_SIZE):.2f}) to" in words(app)
    assert names(app, "training_loss")[:3] == ["training loss", "smoothed", "held-out loss"]
    # Its steps hold other numbers of tokens than the storyteller's, which is not drawn.
    assert names(app, "training_loss")[3:] == ["text it reads", "random, said again"]
    assert names(app, "training_heads") == ["induction", "previous token", "copied right"]
    assert "tokens to learn from; its last tenth" in words(app)
    assert "No induction head formed in 60 steps" in words(app)
    assert "One layer cannot have one" in words(app)
    assert "An induction head looks for the last time" in words(app)
    assert "60% of what it reads is random tokens said twice" in words(app)
    before, now = json.loads(app.get_by_key("training_look_back").proto.spec)["data"]
    assert before["z"] != now["z"]
    assert "on 24 random tokens said twice" in words(app)
    assert "Step 0\n" in words(app).replace("*", "")
    assert "One day, Lily and Tom went to the" in words(app)
    assert app.table[0].value.loc["parameters"].nunique() == 1


def test_along_the_tokens_both_runs_are_whole(lab):
    app = train(lab(along="Tokens read"))
    assert all(trace["x"][0] > 0 for trace in spec(app, "training_heads")["data"])
    assert names(app, "training_loss")[5:] == ["storyteller (recorded)"]
    shipped, recorded = spec(app, "training_loss")["data"][5], _training.recorded_run()
    assert shipped["line"]["dash"] == "dash"
    found = app.session_state["_run_training_run"].result
    nats_a_character = np.array(shipped["y"]) / found.characters_per_token
    np.testing.assert_allclose(nats_a_character, recorded.held_out_loss[1:] / recorded.characters_per_token)
    assert spec(app, "training_heads")["layout"]["xaxis"]["type"] == "log"
    assert len(spec(app, "training_heads")["data"][-1]["x"]) > 20
    for key in ("training_loss", "training_heads"):
        assert "storyteller: our model on an" in spec(app, key)["layout"]["annotations"][-1]["text"]
    assert "scored on random tokens of" in words(app)
    assert "80% text in blocks of 512 tokens" in words(app)


def test_a_text_of_ones_own_is_not_compared_with_a_loss_on_another(lab):
    app = train(lab(along="Tokens read", text="the cat sat on the mat. " * 120, steps=10))
    assert "storyteller (recorded)" not in names(app, "training_loss")
    assert "converted" not in words(app)
    assert "storyteller (recorded)" in names(app, "training_heads")
    assert "Lily" not in words(app)
    assert "the same dice" in words(app)


def test_a_batch_that_the_text_cannot_fill_is_said_and_foretold(lab):
    app = train(lab(text="the cat sat on the mat. " * 120, steps=10, batch_size=64))
    found = app.session_state["_run_training_run"].result
    assert f"so a batch holds {found.samples_to_learn}, not 64." in words(app)
    beside = next(caption.value for caption in app.caption if caption.value.startswith("Predicted"))
    assert f"{amount(found.predicted.flops)}FLOP" in beside.replace("\\", "")
    assert app.table[0].value.loc["arithmetic of 10 steps", "predicted"] == f"{amount(found.predicted.flops)}FLOP"


def test_other_settings_wait_for_the_button(lab):
    app = train(lab())
    app.slider(key="training_steps").set_value(20)
    finished(app)
    assert "had other settings" in words(app)
    assert "All 60 steps were taken" in words(app)
    train(app)
    assert "All 20 steps were taken" in words(app)
    assert "had other settings" not in words(app)


def test_the_same_settings_can_be_trained_again(lab):
    app = train(lab())
    before = app.session_state["_run_training_run"].result.seconds
    train(app)
    assert app.session_state["_run_training_run"].result.seconds != before  # measured anew, to the nanosecond


def test_a_rate_that_is_too_high_names_the_step_and_judges_no_guess(lab):
    app = train(lab(learning_rate=10, tab="Predict", guess=4.0))
    assert "but the run diverged before" in words(app)
    assert "expected" not in words(app)
    app.query_params["training_tab"] = app.session_state["training_tab"] = "Explore"
    finished(app)
    assert "Training diverged at step" in words(app)
    assert "What was learned until then is shown" in words(app)


def test_what_guessing_costs_is_told_apart_from_what_an_untrained_model_pays(lab):
    app = lab(tab="Predict")
    assert f"ln 320 = {math.log(training.VOCAB_SIZE):.2f} nats" in words(app)
    assert "has learned nothing pays a little more" in words(app)


def test_a_seed_is_typed_and_steps_say_that_the_rate_stretches_with_them(lab):
    app = lab(seed=7)
    assert app.number_input(key="training_seed").value == 7
    assert "stretch over all of them" in app.slider(key="training_steps").help


def test_a_link_says_that_it_brings_settings_alone(lab):
    assert "a link brings settings, not results" in words(lab())


class TestBadInput:
    def test_only_heads_that_divide_the_width_are_offered(self, lab):
        app = lab(num_heads=3)
        assert "The link sets Heads to “3”, but it must be one of 1, 2, 4, 8, 16" in words(app)
        assert not app.button(key="_training_train").disabled
        app.slider(key="training_d_model").set_value(96)
        finished(app)
        app.selectbox(key="training_num_heads").set_value(3)
        finished(app)
        assert "must be" not in words(app)
        app.slider(key="training_d_model").set_value(64)
        finished(app)
        assert "must divide" not in words(app)
        assert app.selectbox(key="training_num_heads").value == 2

    def test_during_and_after_a_run_it_is_watched_all_the_same(self, lab):
        app = lab(**LONG)
        app.button(key="_training_train").click().run()
        watched(app, lambda app: True)
        app.text_area(key="training_text").set_value("Too short.").run()
        watched(app, lambda app: steps_drawn(app) > 0)
        assert TOO_SHORT in words(app)
        assert app.button(key="_training_train").disabled
        app.button(key="_cancel_training_run").click().run()
        finished(app)
        assert TOO_SHORT in words(app)
        assert "Cancelled after step" in words(app)
        assert chart_is_drawn(app)
        assert app.button(key="_training_train").disabled
        app.text_area(key="training_text").set_value("")
        finished(app)
        assert not app.button(key="_training_train").disabled

    @pytest.mark.parametrize("tab", ["Explore", "Predict", "Tests"])
    def test_before_a_run_every_tab_waits(self, lab, tab):
        app = lab(text="Too short.", tab=tab)
        assert TOO_SHORT in words(app)
        assert "Nothing to show for these settings" in words(app)
        assert app.button(key="_training_train").disabled

    def test_a_text_too_short_is_said_before_the_button_is_pressed_and_stays(self, lab):
        app = lab(text="Too short.")
        assert TOO_SHORT in words(app)
        assert app.button(key="_training_train").disabled
        assert app.text_area(key="training_text").value == "Too short."

    def test_a_text_whose_tokens_are_too_few_is_said_beside_the_button_too(self, lab):
        app = train(lab(text="word " * 200))
        assert "each part needs 65" in words(app)
        assert "This training gave no result" in words(app)
        app.text_area(key="training_text").set_value("")
        finished(app)
        train(app)
        assert "gave no result" not in words(app)

    def test_nonsense_in_the_address_is_ignored_and_said(self, lab):
        app = lab(steps="banana", learning_rate="fast")
        assert "banana" in words(app)
        assert "fast" in words(app)
        assert app.slider(key="training_steps").value == training.Params().steps


LONG = {"steps": 2000, "d_model": 64, "batch_size": 4}


def watched(app, condition):
    """Draw the page, as its polling fragment does in a browser, until something is shown and `condition` holds."""
    end = time.monotonic() + SECONDS
    while not (app.progress and chart_is_drawn(app) and condition(app)):
        assert time.monotonic() < end, "it was never shown"
        time.sleep(0.1)
        app.run()
    assert not app.exception
    return app


def chart_is_drawn(app):
    return any(element.proto.id.endswith("training_loss") for element in app.get("plotly_chart"))


def steps_drawn(app):
    return next((trace["x"][-1] for trace in spec(app, "training_loss")["data"] if trace["name"] == "training loss"), 0)


def ends(app):
    return [(spec(app, key)["layout"]["xaxis"]["range"]) for key in ("training_loss", "training_heads")]


def test_the_curves_grow_on_axes_that_stay_and_a_cancelled_run_keeps_them(lab):
    app = lab(**LONG)
    app.button(key="_training_train").click().run()
    watched(app, lambda app: "So far the held-out loss" in words(app))
    first, axes = steps_drawn(app), ends(app)
    assert axes[0] == axes[1]
    assert axes[0][0] <= 0 < 2000 <= axes[0][1]
    assert "No induction head has formed so far" in words(app)
    assert "Step 0\n" in words(app).replace("*", "")
    assert app.button(key="_training_train").disabled
    assert not app.get("download_button")
    watched(app, lambda app: steps_drawn(app) > first)
    assert ends(app) == axes
    app.button(key="_cancel_training_run").click()
    finished(app)
    last = steps_drawn(app)
    assert first < last < 2000
    assert f"Cancelled after step {last} of 2000" in words(app)
    assert "So far" not in words(app)
    assert "tokens to learn from" in words(app)
    assert not app.button(key="_training_train").disabled
    assert [button.label for button in app.get("download_button")] == ["Save model"]


def test_settings_changed_during_a_run_are_for_the_next(lab):
    app = lab(**LONG)
    app.button(key="_training_train").click().run()
    watched(app, lambda app: True)
    app.slider(key="training_steps").set_value(20).run()
    assert "these are for the next one" in words(app)
    assert "of 2000" in app.progress[0].text
    app.button(key="_cancel_training_run").click()
    finished(app)
    assert "had other settings" in words(app)
    train(app)
    assert "All 20 steps were taken" in words(app)


def test_the_guess_is_seen_beside_the_run_as_it_goes(lab):
    app = lab(tab="Predict", guess=5.9, **LONG)
    app.button(key="_training_train").click().run()
    end = time.monotonic() + SECONDS
    while "You said 5.9" not in words(app):
        assert time.monotonic() < end
        time.sleep(0.1)
        app.run()
    assert "of 2000." in words(app)
    assert "than you expected" not in words(app)
    app.button(key="_cancel_training_run").click()
    finished(app)
    assert "You said 5.9" in words(app)
    assert "You guessed for 2000 steps, but the run was cancelled before" in words(app)
    assert "neither right nor wrong" in words(app)
    assert "than you expected" not in words(app)


def test_a_guess_is_not_judged_by_the_run_before(lab):
    app = lab(tab="Predict", guess=5.9)
    train(app)
    app.slider(key="training_steps").set_value(2000).run()
    app.button(key="_training_train").click().run()
    while "You said" not in words(app):
        assert "learned more" not in words(app)
        app.run()
    assert "of 2000." in words(app)
    app.button(key="_cancel_training_run").click()
    finished(app)


@pytest.mark.parametrize("tab", ["Code", "Tests"])
def test_a_training_started_from_a_tab_that_does_not_draw_it_runs_and_ends(lab, tab):
    app = lab(tab=tab)
    app.button(key="_training_train").click().run()
    end = time.monotonic() + SECONDS
    while app.button(key="_training_train").disabled:
        assert time.monotonic() < end, "the button never came back"
        time.sleep(0.1)
        app.run()
    assert app.session_state["_run_training_run"].result.ended == "finished"


def test_the_guess_lies_beside_what_was_measured(lab):
    app = lab(tab="Predict", guess=5.9)
    assert "Set your guess" in words(app)
    train(app)
    assert "You said 5.9, it is" in words(app)
    assert "learned more than you expected" in words(app)
    app.slider(key="training_guess").set_value(1.0)
    finished(app)
    assert "You said 5.9, it is" in words(app)  # a guess after the answer was seen is none
    train(app)
    assert "You said 1.0, it is" in words(app)
    assert "learned less than you expected" in words(app)


def test_a_guess_that_was_never_made_is_not_judged(lab):
    app = train(lab())
    app.query_params["training_tab"] = "Predict"
    app.session_state["training_tab"] = "Predict"
    finished(app)
    assert "Nothing was guessed before this run" in words(app)
    assert "You said" not in words(app)
    app.slider(key="training_guess").set_value(1.0)
    finished(app)
    assert "You said" not in words(app)
    train(app)
    assert "You said 1.0, it is" in words(app)


def test_a_guess_counts_that_was_made_before_another_tab_s_button_was_pressed(lab):
    app = lab(tab="Predict")
    app.slider(key="training_guess").set_value(5.9)
    finished(app)
    app.session_state["training_tab"] = "Explore"
    finished(app)
    train(app)
    app.session_state["training_tab"] = "Predict"
    finished(app)
    assert "You said 5.9, it is" in words(app)


def test_the_model_opens_in_the_attention_lab(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    app = train(lab())
    app.button(key="_training_look").click().run()
    assert not app.exception
    assert [title.value for title in app.title] == ["What does each attention head look at?"]
    folder = Path(app.query_params["attention_model"])
    assert folder.parent == tmp_path / "uploads"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    text = app.query_params["attention_text"]
    seen = attention.run(attention.Params(model=str(folder), text=text), LocalJob())
    assert seen.attention.shape[:2] == (1, 2)
    period = len(seen.tokens) // 2
    assert seen.tokens == list(text)  # one token each, so that the second round repeats the first
    assert seen.tokens[:period] == seen.tokens[period:]
    assert len(set(seen.tokens)) == period


def test_a_full_disk_is_one_sentence(lab, monkeypatch):
    app = train(lab())

    def keep(files):
        raise OSError("No space left on device")

    monkeypatch.setattr("engine.local_models.keep_upload", keep)
    app.button(key="_training_look").click()
    finished(app)
    assert "could not be kept on the server's disk" in words(app)


def test_the_tests_tab_is_green_on_this_shape(lab):
    assert "5 of 5 properties hold" in words(lab(tab="Tests"))


def test_the_code_tab_shows_the_step_and_the_block(lab):
    app = lab(tab="Code")
    assert any("def _take_step" in code.value for code in app.code)
    assert any("class Block" in code.value for code in app.code)
