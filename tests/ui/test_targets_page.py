"""The targets page in Streamlit's own test harness, with a stand-in for what is measured, and its table by itself."""

import dataclasses
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from engine.errors import InputError, WorkbenchError
from engine.experiments import targets
from engine.experiments._targets_recorded import recorded_figures
from engine.experiments.targets import EVIDENCE, GROUPS, Figure, RecordedFigure, Result, Row, describe, unmeasured
from tests.ui.lab_pages import words
from ui import theme
from ui.targets import view
from ui.targets.table import COLUMNS, table

APP = Path(__file__).parents[2] / "app.py"
SCRIPT = "app_pages/targets.py"


class Cells(HTMLParser):
    """The rows of a table, a list of texts each."""

    def __init__(self, text):
        super().__init__()
        self.rows = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = self._inside and tag not in ("th", "td")

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][-1] += data


def cells(text):
    """The texts of each row after the first by that one, the name of a target, which a note may follow."""
    names = [row.target.name for row in unmeasured()]
    found = {}
    for first, *rest in (row for row in Cells(text).rows if len(row) > 1):
        name = next((name for name in names if first.startswith(name)), first)
        found[name] = [*rest, first.removeprefix(name)]
    return found


def result(rows, ended="finished"):
    return Result(tuple(rows), describe(rows), ended, "All were gone through.", 12.0, "2026-01-02", "Test CPU",
                  {"torch": "2.13.0"}, EVIDENCE)  # fmt: skip


def measured(rows):
    """One that passed, one that failed without a figure, one that missed its bound; the rest needs a GPU."""
    passed = Row(rows[0].target, "passed", Figure(5.0, 4.0, 6.0, 10))
    broken = Row(rows[1].target, "failed", note="RuntimeError: <no kernel>")
    missed = Row(rows[2].target, "failed", Figure(11.0, 10.0, 12.0, 10))
    return [passed, broken, missed, *(dataclasses.replace(row, note="Needs a GPU.") for row in rows[3:])]


@pytest.fixture
def page(runtime):
    """Opens the page; `runtime.stand_ins["targets"]` is what the button runs."""
    app = AppTest.from_file(str(APP), default_timeout=20)
    runtime.stand_ins["attention_effect"] = lambda *_: pytest.fail("this is home's")
    app.session_state["_unused"] = True
    app.switch_page(SCRIPT)
    return app.run()


def shown(app):
    (found,) = [element.proto.body for element in app.get("html") if "class='targets'" in element.proto.body]
    return cells(found)


def finish(app):
    end = time.monotonic() + 20
    while app.run().progress:
        assert time.monotonic() < end
        time.sleep(0.05)
    return app


def press(app, label="Measure"):
    (button,) = [button for button in app.button if button.label == label]
    return button.click().run()


def test_before_anything_is_measured_bounds_and_records_are_there(page, runtime):
    assert not page.exception
    assert page.title[0].value == view.QUESTION
    found, recorded = shown(page), recorded_figures()
    assert len(found) == 1 + len(unmeasured())
    for row in unmeasured():
        bound, figure, spread, verdict, gpu, _ = found[row.target.name]
        assert (bound, figure, spread, verdict) == (str(row.target.bound), "—", "—", "– not measured yet")
        assert ("H200" in gpu) == (row.target.key in recorded)
    assert f"None of the {len(unmeasured())} targets is measured here yet." in words(page)
    assert not runtime.tickets
    assert not page.get("download_button")


def test_the_button_measures_all_and_rows_fill_in(page, runtime):
    release = threading.Event()

    def run(params, job):
        rows = unmeasured()
        job.report(1, len(rows), share_of_time=0.1)
        job.show(lambda: result([*measured(rows)[:1], *rows[1:]], "running"))
        assert release.wait(20)
        return result(measured(rows))

    runtime.stand_ins["targets"] = run
    press(page)
    assert runtime.tickets[-1].params == targets.Params()
    while runtime.tickets[-1].shown is None:
        time.sleep(0.01)
    page.run()
    first, second = [row.target.name for row in unmeasured()[:2]]
    assert shown(page)[first][1:4] == ["5 ms", "4 – 6, 10 runs", "✓ passed"]
    assert shown(page)[second][3] == "– not measured yet"
    assert not page.get("download_button")
    release.set()
    finish(page)
    assert shown(page)[second][1:4] == ["—", "—", "✗ failed"]
    assert shown(page)[second][-1] == "RuntimeError: <no kernel>"
    assert [button.label for button in page.get("download_button")] == ["Report", "Figures as CSV"]
    said = words(page)
    assert "1 of the 3 targets that were measured here is met; missed: " in said
    assert "Measured on Test CPU; torch 2.13.0" in said
    assert not page.exception


def test_one_group_can_be_measured_alone(page, runtime):
    runtime.stand_ins["targets"] = lambda params, job: result(unmeasured(params.groups))
    (groups,) = page.button_group
    groups.set_value(["coverage", "attention"]).run()
    chosen = unmeasured(("attention", "coverage"))
    assert list(shown(page))[1:] == [row.target.name for row in chosen]
    press(page)
    assert runtime.tickets[-1].params == targets.Params(groups=("attention", "coverage"))
    assert list(shown(finish(page)))[1:] == [row.target.name for row in chosen]
    page.button_group[0].set_value([]).run()
    assert [warning.value for warning in page.warning] == ["Choose at least one group of targets."]
    assert not [button for button in page.button if button.label.startswith("Measure")]


def test_while_it_waits_the_table_stays(page, runtime):
    release = threading.Event()

    def run(params, job):
        assert release.wait(20)
        raise WorkbenchError("The worker has gone.")

    runtime.stand_ins["targets"] = run
    press(page)
    assert len(shown(page)) == 1 + len(unmeasured())
    assert not page.get("skeleton")
    release.set()
    finish(page)
    assert "The worker has gone." in words(page)
    assert len(shown(page)) == 1 + len(unmeasured())


def test_a_cancelled_run_keeps_its_rows_and_its_report(page, runtime):
    def run(params, job):
        while not job.cancelled:
            time.sleep(0.01)
        return result(measured(unmeasured()), "cancelled")

    runtime.stand_ins["targets"] = run
    press(page)
    press(page, "Cancel")
    finish(page)
    assert [row[3] for row in shown(page).values()][1:4] == ["✓ passed", "✗ failed", "✗ failed"]
    assert len(page.get("download_button")) == 2


def test_without_the_table_of_targets_one_sentence_says_so(runtime, monkeypatch):
    def missing():
        raise InputError("The table is not there: run this from a checkout.")

    monkeypatch.setattr(view, "unmeasured", missing)
    app = AppTest.from_file(str(APP), default_timeout=20)
    app.switch_page(SCRIPT)
    app.run()
    assert [error.value for error in app.error] == ["The table is not there\\: run this from a checkout."]
    assert not app.button


class TestTheTable:
    @pytest.mark.parametrize("mode", ["light", "dark"])
    def test_a_row_says_everything_in_words(self, mode):
        rows = measured(unmeasured())
        key = rows[0].target.key
        found = cells(table(rows, {key: RecordedFigure(Figure(0.5), "NVIDIA H200", "2026-01-01")}, mode=mode))
        assert found.pop("Target")[:-1] == list(COLUMNS[1:])
        assert list(found) == [row.target.name for row in rows]
        assert found[rows[0].target.name] == [
            str(rows[0].target.bound), "5 ms", "4 – 6, 10 runs", "✓ passed", "✓ 0.5 ms (H200, 2026-01-01)", ""
        ]  # fmt: skip
        assert found[rows[-1].target.name][3] == "– needs a GPU"

    def test_every_group_has_its_heading(self):
        text = table(unmeasured(), {}, mode="light")
        assert [row[0] for row in Cells(text).rows if len(row) == 1] == list(GROUPS.values())
        assert text.count("scope='row'") == len(unmeasured())

    def test_what_an_error_says_is_no_html(self):
        assert "<no kernel>" not in table(measured(unmeasured()), {}, mode="light")

    def test_a_note_is_not_repeated_row_after_row(self):
        noted = [Row(row.target, "passed", Figure(1.0), "By the run.") for row in unmeasured(("coverage",))]
        assert table(noted, {}, mode="light").count("By the run.") == 1

    def test_colours_are_those_of_the_mode(self):
        for mode in ("light", "dark"):
            text = table(unmeasured(), {}, mode=mode)
            assert theme.SURFACES[mode].muted in text
            assert "MUTED" not in text
            assert "TINTS" not in text


def test_figures_are_numbers_a_row_a_target():
    rows = measured(unmeasured())
    found = view.frame(rows, recorded_figures())
    assert list(found.key) == [row.target.key for row in rows]
    assert found.measured[0] == 5.0
    assert found.verdict[2] == "failed"
    assert found.measured.notna().sum() == 2
    assert found.recorded.notna().sum() == len(recorded_figures())
    assert set(found.direction) == {"at most", "less than", "at least", "more than"}
