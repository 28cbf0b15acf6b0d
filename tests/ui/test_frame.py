"""The page frame in Streamlit's own test harness: every piece that has state is changed and looked at again."""

import json
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import engine.experiments
import ui.run
from engine.errors import DoesNotFitError, WorkbenchError
from ui import theme
from ui.labs import LABS

HERE = Path(__file__).parent


def spec(app, key="figure"):
    """What the browser is told to draw."""
    return json.loads(app.get_by_key(key).proto.spec)


def captions(app):
    return [caption.value for caption in app.caption]


def warnings(app):
    return [warning.value.replace("\\", "").replace("\u2060", "") for warning in app.warning]


def asked(app, key="probe"):
    return app.session_state[f"_run_{key}"].params


def run_until(app, condition, seconds=10):
    """Draw the page again, as its polling fragment does in a browser, until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition(app):
        assert time.monotonic() < end, "the page never got there"
        time.sleep(0.05)
        app.run()
    return app


def test_a_control_changes_the_chart_and_its_sentence(open_lab):
    app = open_lab()
    before = spec(app)
    app.slider(key="probe_layer").set_value(7).run()
    assert not app.exception
    assert spec(app)["data"][0]["z"] != before["data"][0]["z"]
    assert "Layer 7 sums to 32." in captions(app)
    assert app.get_by_key("figure").proto.alt == "Layer 7 sums to 32."


def test_the_address_reopens_the_same_state(open_lab):
    moved = open_lab()
    moved.slider(key="probe_layer").set_value(7)
    moved.text_area(key="probe_text").set_value("a b c")
    moved.toggle(key="probe_average").set_value(True)
    moved.selectbox(key="probe_scale").set_value("e")
    moved.run()
    reopened = open_lab(probe_layer=7, probe_text="a b c", probe_average="true", probe_scale="e")
    assert not reopened.exception
    assert not reopened.warning
    assert spec(reopened) == spec(moved)
    assert asked(reopened) == asked(moved)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("layer", "3"),
        ("layer", "29"),
        ("temperature", "0.7"),
        ("mask", "none"),
        ("window", "20"),
        ("drop", "2"),
        ("average", "TRUE"),
        ("average", "false"),
        ("text", "När Mary och John 🐈 *gick*"),
    ],
)
def test_a_good_value_in_the_address_is_used_without_a_word(open_lab, field, given):
    app = open_lab(**{f"probe_{field}": given})
    assert not app.warning
    assert str(getattr(asked(app), field)).lower() == given.lower()


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("layer", "banana"),
        ("layer", "30"),
        ("layer", "-1"),
        ("layer", "9" * 30),
        ("layer", "1e400"),
        ("layer", "nan"),
        ("layer", ""),
        ("temperature", "0"),
        ("temperature", "5"),
        ("mask", "Causal!"),
        ("scale", "z"),
        ("average", "perhaps"),
        ("window", "0"),
        ("drop", "x"),
        ("drop", "-4"),
    ],
)
def test_nonsense_in_the_address_is_named_and_the_page_works(open_lab, field, given):
    app = open_lab(**{f"probe_{field}": given})
    assert not app.exception
    default = getattr(type(asked(app)).model_construct(), field)
    assert getattr(asked(app), field) == default
    (note,) = warnings(app)
    assert f"“{given}”"[:40] in note
    assert "is used instead" in note
    app.slider(key="probe_layer").set_value(5).run()
    assert not app.exception
    assert "Layer 5 sums to 32." in captions(app)


def test_the_note_about_the_address_goes_when_the_control_is_moved(open_lab):
    app = open_lab(probe_layer="banana")
    app.toggle(key="probe_average").set_value(True).run()
    assert len(app.warning) == 1
    app.slider(key="probe_layer").set_value(4).run()
    assert not app.warning
    app.slider(key="probe_layer").set_value(3).run()
    assert not app.warning


def test_markup_in_the_address_is_shown_letter_by_letter(open_lab):
    app = open_lab(probe_layer="![x](http://example.org/x.png)")
    assert "![x]" not in app.warning[0].value
    assert "![x](http://example.org/x.png)" in warnings(app)[0]


def test_a_value_that_the_model_refuses_gets_a_sentence_and_stays(open_lab):
    app = open_lab()
    app.text_area(key="probe_text").set_value("   ").run()
    assert not app.exception
    assert app.error[0].value == "The text is empty\\: type a few words."
    assert app.text_area(key="probe_text").value == "   "
    app.text_area(key="probe_text").set_value("again").run()
    assert not app.error
    assert asked(app).text == "again"


def test_a_bound_that_shrinks_with_the_data_takes_the_value_along(open_lab):
    app = open_lab(probe_layer=20)
    app.session_state["deepest"] = 11
    app.run()
    assert not app.exception
    assert app.slider(key="probe_layer").value == 11
    assert asked(app).layer == 11
    app.session_state["deepest"] = 29
    app.run()
    assert app.slider(key="probe_layer").value == 11


def test_closed_tabs_cost_nothing(open_lab, runtime):
    app = open_lab(probe_tab="Code")
    assert not app.exception
    assert runtime.tickets == []
    assert [block.language for block in app.code] == ["python", "python"]
    assert "class ExperimentParams(BaseModel):" in app.code[0].value
    assert app.code[1].value.lstrip().startswith("def report(")
    assert app.slider(key="probe_layer").value == 3


def test_the_code_tab_works_while_the_settings_do_not(open_lab):
    app = open_lab(probe_tab="Code")
    app.text_area(key="probe_text").set_value(" ").run()
    assert app.error
    assert app.code


def test_checks_are_counted_and_the_failed_come_first(open_lab):
    app = open_lab(probe_tab="Tests", probe_layer=25)
    assert app.error[0].value == "1 of 2 properties hold on these settings."
    lines = [element.value for element in app.markdown]
    assert next(line for line in lines if "badge" in line).endswith("**A layer is drawn**")
    app.slider(key="probe_layer").set_value(5).run()
    assert app.success[0].value == "2 of 2 properties hold on these settings."


def test_equal_parameters_are_not_run_twice(open_lab, runtime):
    app = open_lab()
    app.run()
    app.run()
    assert len(runtime.tickets) == 1


def test_a_slow_run_shows_progress_and_then_its_result(open_lab, runtime):
    app = open_lab(probe_seconds=1.0, probe_layer=9)
    app.session_state["wait"] = 0.1
    app.slider(key="probe_layer").set_value(8).run()
    assert app.progress
    assert "Step" in app.progress[0].text
    assert "loss" in app.progress[0].text
    assert "left" in app.progress[0].text
    run_until(app, lambda app: not app.progress)
    assert "Layer 8 sums to 32." in captions(app)
    assert len(runtime.tickets) == 2


def test_the_previous_result_stays_and_is_called_so(open_lab):
    app = open_lab()
    app.session_state["wait"] = 0.05
    app.slider(key="probe_seconds").set_value(5.0)
    app.slider(key="probe_layer").set_value(12).run()
    assert "previous result" in app.progress[0].text
    assert "Layer 3 sums to 32." in captions(app)
    app.button(key="_cancel_probe").click().run()
    run_until(app, lambda app: not app.progress)
    assert warnings(app) == ["Cancelled. What you see is the previous result."]
    assert "Layer 3 sums to 32." in captions(app)


def test_a_job_can_be_cancelled_and_asked_for_again(open_lab, runtime):
    app = open_lab(probe_seconds=30)
    app.session_state["wait"] = 0.05
    app.run()
    app.button(key="_cancel_probe").click().run()
    run_until(app, lambda app: not app.progress)
    assert runtime.tickets[0].state == "cancelled"
    assert warnings(app) == ["Cancelled."]
    app.slider(key="probe_seconds").set_value(0.0).run()
    assert "Layer 3 sums to 32." in captions(app)
    assert not app.warning


class TestWatching:
    """A job that grows as `ORDERS` tell it, on a page that has a button of its own."""

    @pytest.fixture
    def orders(self, runtime):
        queue = engine.experiments.get("growing").run.__globals__["ORDERS"]
        yield queue.put
        while not all(ticket.wait(0.05) for ticket in runtime.tickets):
            queue.put("return")
        while not queue.empty():
            queue.get()

    @pytest.fixture
    def page(self, orders):
        app = AppTest.from_file(str(HERE / "watching_page.py"), default_timeout=20).run()
        app.button(key="go").click().run()
        assert app.get("skeleton")
        return app

    def test_what_it_has_shown_is_drawn_as_the_result_will_be(self, page, orders, runtime):
        for length in (1, 2):
            orders("grow")
            run_until(page, lambda app: f"{length} for 7" in captions(app))  # noqa: B023
            assert page.progress
            assert not page.get("skeleton")
        orders("return")
        run_until(page, lambda app: not app.progress)
        assert captions(page) == ["2 for 7, whole"]
        assert len(runtime.tickets) == 1
        assert not page.warning

    def test_the_page_knows_whether_it_is_under_way(self, page, orders):
        assert page.button(key="go").disabled
        orders("return")
        run_until(page, lambda app: not app.progress)
        assert not page.button(key="go").disabled

    def test_numbers_that_are_drawn_are_not_said_as_well(self, page, orders):
        run_until(page, lambda app: "grown 0" in app.progress[0].text)
        orders("grow")
        run_until(page, lambda app: "Step 1 of 9" in app.progress[0].text)
        assert "grown" not in page.progress[0].text

    def test_a_failure_leaves_what_was_shown(self, page, orders):
        orders("grow")
        orders("fail")
        run_until(page, lambda app: not app.progress)
        assert warnings(page) == ["The worker died. What you see is what it had until then."]
        assert captions(page) == ["1 for 7"]
        assert not page.button(key="go").disabled

    def test_a_cancelled_job_leaves_what_was_shown(self, page, orders):
        orders("grow")
        run_until(page, lambda app: "1 for 7" in captions(app))
        page.button(key="_cancel_watched").click().run()
        orders("look")
        run_until(page, lambda app: not app.progress)
        assert warnings(page) == ["Cancelled. What you see is what it had until then."]
        assert captions(page) == ["1 for 7"]

    @pytest.mark.parametrize(("keeps", "said"), [(True, "Stopping after this step…"), (False, "Stopping…")])
    def test_while_it_stops_the_page_says_so(self, page, orders, monkeypatch, keeps, said):
        monkeypatch.setattr(engine.experiments.get("growing").Params, "returns_partial", keeps)
        orders("grow")
        run_until(page, lambda app: "1 for 7" in captions(app))
        page.button(key="_cancel_watched").click().run()
        assert page.progress[0].text == said
        assert page.button(key="_cancel_watched").disabled

    def test_the_previous_result_stays_until_something_is_shown(self, page, orders):
        orders("grow")
        orders("return")
        run_until(page, lambda app: not app.progress)
        page.session_state["n"] = 8
        page.button(key="go").click().run()
        assert captions(page) == ["1 for 7, whole"]
        assert "previous result" in page.progress[0].text
        orders("grow")
        run_until(page, lambda app: "1 for 8" in captions(app))
        assert "previous result" not in page.progress[0].text

    def test_a_job_that_cannot_be_submitted_does_not_lock_the_page(self, page, orders, runtime):
        orders("return")
        run_until(page, lambda app: not app.progress)
        runtime.refuse = WorkbenchError("The workbench is shutting down.")
        page.button(key="go").click().run()
        assert warnings(page)[0].startswith("The workbench is shutting down.")
        assert not page.button(key="go").disabled


def test_a_superseded_job_is_cancelled(open_lab, runtime):
    app = open_lab(probe_seconds=30)
    app.session_state["wait"] = 0.05
    for layer in (4, 5, 6):
        app.slider(key="probe_layer").set_value(layer).run()
    *old, last = runtime.tickets
    assert len(old) == 3
    assert all(ticket.wait(5) and ticket.state == "cancelled" for ticket in old)
    assert last.state == "running"
    last.cancel()


def test_a_failure_is_one_sentence_and_can_be_tried_again(open_lab, runtime):
    app = open_lab(probe_fail="true")
    assert not app.exception
    assert warnings(app) == ["The worker ran out of memory: choose a shorter text."]
    app.run()
    assert len(runtime.tickets) == 1
    app.button(key="_again_probe").click().run()
    assert len(runtime.tickets) == 2
    app.toggle(key="probe_fail").set_value(False).run()
    assert not app.warning
    assert "Layer 3 sums to 32." in captions(app)


def test_a_refused_job_is_one_sentence(open_lab, runtime):
    runtime.refuse = DoesNotFitError("This needs 12 GB, there are 8: choose a rank below 64.")
    app = open_lab()
    assert not app.exception
    assert warnings(app) == ["This needs 12 GB, there are 8: choose a rank below 64."]


def test_a_session_keeps_one_name_and_stays_signed_in(open_lab, runtime):
    app = open_lab()
    app.slider(key="probe_layer").set_value(8).run()
    assert len(set(runtime.owners)) == 1
    assert set(runtime.kept) == set(runtime.owners)
    assert len(runtime.kept) >= 2


def test_two_sessions_have_two_names(open_lab, runtime):
    open_lab()
    open_lab()
    assert len(set(runtime.owners)) == 2


def test_pin_keeps_a_in_the_address_and_draws_both(open_lab):
    app = open_lab(probe_layer=5)
    app.button(key="_probe_pin_set").click().run()
    assert json.loads(app.query_params["probe_pin"]) == {"layer": 5}
    app.slider(key="probe_layer").set_value(9).run()
    assert "A is layer 5." in captions(app)
    assert "Layer 9 sums to 32." in captions(app)
    assert "A\\: layer 5 · B\\: layer 9" in captions(app)
    assert spec(app, "figure_a") != spec(app)

    reopened = open_lab(probe_layer=9, probe_pin='{"layer":5}')
    assert spec(reopened, "figure_a") == spec(app, "figure_a")

    app.button(key="_probe_pin_clear").click().run()
    assert "probe_pin" not in app.query_params
    assert not any("A is" in caption for caption in captions(app))


@pytest.mark.parametrize(
    "pin",
    [
        "banana",
        "{}[",
        "[1]",
        '{"layer": 99}',
        '{"nothing": 1}',
        "null",
        '{"layer": "x"}',
        "[" * 40_000,
        json.dumps({"text": "x" * 60_000}),
        json.dumps({"layer": "x" * 24_000}),
    ],
    ids=lambda pin: pin[:16],
)
def test_a_pin_that_makes_no_sense_is_ignored_with_a_sentence(open_lab, pin):
    app = open_lab(probe_pin=pin)
    assert not app.exception
    assert warnings(app)[0].startswith("The link's pinned run A is ignored.")
    assert len(warnings(app)[0]) < 200
    assert "Layer 3 sums to 32." in captions(app)
    assert app.button(key="_probe_pin_set")


class TestALinkToNoSuchChoice:
    NO_VIEW = "The link sets the view to “Nonsense”, but it must be one of Whole, Parts. Whole is used instead."

    def test_is_said_until_another_one_is_made(self, open_lab):
        app = open_lab(probe_view="Nonsense")
        assert warnings(app) == [self.NO_VIEW]
        app.slider(key="probe_layer").set_value(7).run()
        assert warnings(app) == [self.NO_VIEW]
        app.button_group(key="probe_view").set_value("Parts").run()
        assert warnings(app) == []
        app.button_group(key="probe_view").set_value("Whole").run()
        assert warnings(app) == []

    def test_of_many_choices_the_ends_are_named_and_what_is_used_instead(self, open_lab):
        app = open_lab(probe_view="Parts", probe_part="x" * 500, probe_marks="c", probe_guess="")
        assert set(warnings(app)) == {
            f"The link sets probe_part to “{'x' * 40}…”, but it must be one of 100 choices, part 0, part 1 … part 99. "
            "part 0 is used instead.",
            "The link sets probe_marks to “c”, but it must be one of a, b. a and 1 more are used instead.",
        }
        app = open_lab(probe_view="Parts", probe_guess="none")
        assert warnings(app) == [
            "The link sets probe_guess to “none”, but it must be one of more, less. Nothing is chosen."
        ]

    def test_waits_for_the_view_that_has_the_choice_and_goes_with_it(self, open_lab):
        app = open_lab(probe_part="part 100")
        assert warnings(app) == []
        app.button_group(key="probe_view").set_value("Parts").run()
        assert "“part 100”" in warnings(app)[0]
        app.button_group(key="probe_view").set_value("Whole").run()
        app.button_group(key="probe_view").set_value("Parts").run()
        assert warnings(app) == []

    def test_nor_to_a_tab(self, open_lab):
        app = open_lab(probe_tab="Nowhere")
        assert warnings(app) == [
            "The link sets the tab to “Nowhere”, but it must be one of Explore, Code, Tests. Explore is used instead."
        ]

    def test_is_said_once_where_the_control_says_it(self, open_lab):
        said = warnings(open_lab(probe_scale="z", probe_mask="y"))
        assert sorted(words[:26] for words in said) == ["The link sets Mask to “y”,", "The link sets Scale to “z”"]

    @pytest.mark.parametrize(
        "query", [{"view": "Whole"}, {"view": "Parts", "part": "part 7", "marks": "", "guess": "less"}]
    )
    def test_what_there_is_is_taken_without_a_word(self, open_lab, query):
        app = open_lab(**{f"probe_{name}": value for name, value in query.items()})
        assert warnings(app) == []
        assert app.session_state["probe_view"] == query["view"]


def test_the_evidence_says_where_and_how_often(open_lab):
    app = open_lab()
    (card,) = [expander for expander in app.expander if "median" in expander.label]
    assert card.label == "median 1.24 ms \\(1.2 to 1.31\\) · 10 runs · Test CPU · float32"


def test_the_export_menu_costs_nothing_until_it_is_open(open_lab):
    app = open_lab()
    assert not app.get("download_button")
    app.session_state["figure_export"] = True
    app.slider(key="probe_layer").set_value(6).run()
    assert not app.exception
    assert [button.label for button in app.get("download_button")] == ["HTML, interactive", "Data as CSV"]
    (code,) = app.code
    assert "params = Params(layer=6)" in code.value


def test_home_shows_a_live_prediction_and_the_way_to_every_lab(open_app, runtime):
    app = open_app()
    assert not app.exception
    assert [bar.text for bar in app.progress] == ["**Mary** 90.0%", "**the** 5.0%"]
    app.text_input(key="home_text").set_value("The cat").run()
    assert runtime.tickets[-1].params.text == "The cat"
    app.text_input(key="home_text").set_value("  ").run()
    assert app.error[0].value == "The text has only spaces\\: type a few words."
    assert len(app.progress) == 2
    links = {link.proto.page for link in app.page_link}
    assert {lab.url_path for lab in LABS} <= links


def test_the_badge_names_the_device(open_app):
    app = open_app()
    assert "Test CPU · 8 GB · 2 cores · torch 2.13.0" in captions(app)


def test_the_page_is_there_while_the_runtime_starts(open_app, runtime, monkeypatch):
    starting = Future()
    monkeypatch.setattr(ui.run, "starting", lambda: starting)
    monkeypatch.setattr(ui.run.futures, "wait", lambda waited_for: waited_for[0].set_result(runtime))
    app = open_app()
    assert starting.done()
    assert app.title[0].value == "See what happens inside a transformer"
    assert any("starting…" in element.value for element in app.markdown)
    app.run()
    assert "Test CPU · 8 GB · 2 cores · torch 2.13.0" in captions(app)


def test_what_waits_for_the_worker_says_so_in_the_word_of_the_badge(open_lab, runtime, monkeypatch):
    app = open_lab(probe_seconds=30)
    (ticket,) = runtime.tickets
    ticket.state, ticket.place = "queued", 1
    assert "Next in line…" in app.run().progress[0].text
    monkeypatch.setattr(runtime, "devices", lambda: ())
    assert ui.run.STARTING in app.run().progress[0].text
    ticket.cancel()


def test_a_runtime_that_does_not_start_is_one_sentence_and_can_be_tried_again(open_lab, runtime, monkeypatch):
    calls = []

    def start(**_):
        calls.append(1)
        if len(calls) == 1:
            raise WorkbenchError("The Dask scheduler at tcp://x:1 cannot be reached.")
        return runtime

    monkeypatch.undo()
    monkeypatch.setattr(engine.experiments, "__path__", [*engine.experiments.__path__, str(HERE / "experiments")])
    monkeypatch.setattr("engine.runtime.Runtime.start", start)
    app = open_lab()
    assert not app.exception
    assert "The Dask scheduler at tcp://x:1 cannot be reached." in app.error[0].value.replace("\\", "")
    app.button(key="_start_again").click().run()
    assert not app.error
    assert "Layer 3 sums to 32." in captions(app)


def test_sessions_that_start_again_at_once_get_one_runtime(open_lab, runtime, monkeypatch):
    calls = []

    def start(**_):
        calls.append(1)
        if len(calls) == 1:
            raise WorkbenchError("The Dask scheduler at tcp://x:1 cannot be reached.")
        return runtime

    monkeypatch.undo()
    monkeypatch.setattr(engine.experiments, "__path__", [*engine.experiments.__path__, str(HERE / "experiments")])
    monkeypatch.setattr("engine.runtime.Runtime.start", start)
    sessions = [open_lab() for _ in range(3)]
    assert all(app.error for app in sessions)
    for app in sessions:
        app.button(key="_start_again").click().run()
        assert not app.error
    assert len(calls) == 2


def test_a_superseded_job_may_end_and_a_cancelled_one_must(open_lab, runtime, monkeypatch):
    app = open_lab()
    forces = []
    ticket = type(runtime.tickets[0])
    cancel = ticket.cancel
    monkeypatch.setattr(ticket, "cancel", lambda self, force=True: (forces.append(force), cancel(self, force)))
    app.session_state["wait"] = 0.05
    app.slider(key="probe_seconds").set_value(30.0).run()
    app.slider(key="probe_layer").set_value(4).run()
    app.button(key="_cancel_probe").click().run()
    assert forces == [False, True]


def test_a_closed_browser_releases_its_jobs(open_lab, runtime):
    open_lab()
    assert runtime.released == []
    st.cache_resource.clear()
    assert runtime.released == [runtime.owners[0]]


def test_the_charts_follow_the_appearance(open_lab):
    app = open_lab()
    light = spec(app)["layout"]["template"]["layout"]["paper_bgcolor"]
    app.context = {"theme": "dark"}
    app.run()
    dark = spec(app)["layout"]["template"]["layout"]["paper_bgcolor"]
    assert (light, dark) == (theme.SURFACES["light"].paper, theme.SURFACES["dark"].paper)
