"""The frame's pieces that need no page: what they make of what they are given."""

import re
import subprocess
import sys
import tomllib
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from engine.experiments.attention_effect import Params
from engine.runtime.jobs import Progress
from ui import evidence, export, labs, run, source, theme
from ui.prose import plain

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2 contrast ratio."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_charts_lie_on_their_page_without_a_seam(mode):
    page, surface = CONFIG["theme"][mode], theme.SURFACES[mode]
    assert surface.paper == page["backgroundColor"]
    assert surface.ink == page["textColor"]
    assert surface.accent == page["primaryColor"]
    assert list(theme.CATEGORIES[mode]) == page["chartCategoricalColors"]


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("place", [(), ("sidebar",)])
def test_text_and_accent_can_be_read(mode, place):
    colours = CONFIG["theme"][mode]
    for step in place:
        colours = colours[step]
    for background in (colours["backgroundColor"], colours["secondaryBackgroundColor"]):
        assert contrast(colours["textColor"], background) >= 7
        assert contrast(colours["primaryColor"], background) >= 4.5
        assert contrast(colours["linkColor"], background) >= 4.5


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_categories_are_seen_on_the_page(mode):
    assert all(contrast(colour, theme.SURFACES[mode].paper) >= 2 for colour in theme.CATEGORIES[mode])


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_signed_scale_has_the_page_at_zero(mode):
    scale = theme.signed(mode)
    assert scale[len(scale) // 2] == (0.5, theme.SURFACES[mode].paper)
    assert (scale[0][0], scale[-1][0]) == (0.0, 1.0)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_template_is_small(mode):
    """It travels with every chart."""
    assert len(pio.templates[f"workbench_{mode}"].to_plotly_json().__repr__()) < 3000


def test_the_shipped_configuration_keeps_to_this_machine():
    assert CONFIG["server"]["address"] == "localhost"
    assert CONFIG["server"]["enableXsrfProtection"] is True
    assert CONFIG["server"]["maxCacheDataSize"]
    assert CONFIG["browser"]["gatherUsageStats"] is False
    assert CONFIG["client"]["showErrorDetails"] == "none"
    assert CONFIG["runner"]["postScriptGC"] is False
    assert "showSidebarNavigation" not in CONFIG["client"]


def test_every_lab_has_its_page_and_its_own_address():
    assert all((ROOT / lab.script).exists() for lab in labs.LABS)
    assert len({lab.url_path for lab in labs.LABS}) == len(labs.LABS)


@pytest.mark.parametrize("changed", [{}, {"layer": 3}, {"text": 'He said "no" ' * 20, "temperature": 0.5}])
def test_the_script_repeats_the_run(changed):
    text = export.script("attention_effect", Params(**changed))
    assert len(text.splitlines()) < 12
    program = text.replace("result = run(params, LocalJob())", "print(params.model_dump_json())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Params.model_validate_json(done.stdout) == Params(**changed)


def test_the_exported_page_needs_no_network():
    page = export.page(go.Figure(go.Bar(y=[1, 2])), "workbench_dark")
    assert "cdn.plot.ly" not in page.split("<script", 1)[0]
    assert "Plotly.newPlot" in page
    assert theme.SURFACES["dark"].paper in page
    assert len(page) > 1_000_000


def test_evidence_in_a_line_and_in_full():
    facts = {
        "median_ms": 1.23456,
        "low_ms": 1.2,
        "high_ms": 1.31,
        "runs": 10,
        "warmup": "2 runs",
        "device": "Some CPU",
        "dtype": "float32",
        "shape": "B=1",
        "versions": {"torch": "2.13.0", "python": "3.11"},
    }
    assert evidence.line(facts) == "median 1.23 ms (1.2 to 1.31) · 10 runs · Some CPU · float32"
    rows = evidence.rows(facts)
    assert rows["median"] == "1.235 ms"
    assert rows["10th to 90th percentile"] == "1.2 to 1.31 ms"
    assert rows["torch version"] == "2.13.0"
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("times", "said", "hovered"),
    [
        ((0.0123, 0.01234, 0.2), "median 0.0123 ms (0.0123 to 0.2)", "0.0123 ms, 0.0123 to 0.2 in 10 runs"),
        ((998.4, 999.6, 1374.2), "median 1,000 ms (998 to 1,374)", "1,000 ms, 998 to 1,374 in 10 runs"),
    ],
)
def test_a_long_time_is_written_out(times, said, hovered):
    facts = dict(zip(("low_ms", "median_ms", "high_ms"), times, strict=True))
    found = evidence.line(facts | {"runs": 10, "device": "Some CPU", "dtype": "float32"})
    assert found == f"{said} · 10 runs · Some CPU · float32"
    assert evidence.timing(SimpleNamespace(**facts, runs=10)) == hovered


def test_source_is_what_stands_in_the_file():
    found = source.read("engine.runtime.jobs:LocalJob.report")
    lines = (ROOT / found.path).read_text().splitlines()
    first = "def report(self, step: int, total: int, **numbers: float) -> None:"
    assert found.text.splitlines()[0] == lines[found.line - 1].strip() == first
    assert found.name == "LocalJob.report"


def test_source_starts_at_the_decorator():
    assert source.read("engine.runtime.jobs:Progress").text.startswith("@dataclass(frozen=True)\nclass Progress:")


def test_source_links_the_papers_of_its_docstring():
    links = source.read("engine.attention:ScaledDotProductAttention").links
    assert all(link.startswith("https://") for link in links)
    assert source._label("https://arxiv.org/abs/1706.03762") == "arXiv 1706.03762"
    assert source._label("https://github.com/x/y") == "github.com"


@pytest.mark.parametrize("name", ["engine.attention:Nothing", "engine.runtime.jobs:LocalJob.fly"])
def test_source_that_is_not_there_is_an_error(name):
    with pytest.raises(LookupError, match="there is no"):
        source.read(name)


def test_plain_text_leaves_no_markup():
    assert plain("![a](b)") == r"\!\[a\]\(b\)"
    assert plain("42 %, naïve 🐈") == "42 %, naïve 🐈"
    assert plain("- Layer 1.5 - the second.") == r"\- Layer 1.5 - the second."


@pytest.mark.parametrize(
    "text",
    [
        "www.example.org",
        "See WWW.example.org, or (www.example.org)",
        "http://example.org",
        "https://user@example.org/a?b=c",
        "HTTPS://example.org",
        "someone@example.org",
        "+49@example.org",
    ],
)
def test_plain_text_holds_no_address_even_once_escapes_are_resolved(text):
    """The patterns are those by which GitHub's Markdown finds bare addresses."""
    resolved = re.sub(r"\\(?=[!-/:-@\[-`{-~])", "", plain(text))
    assert not re.search(r"https?://|www\.|[-.\w+]@[-\w]", resolved, re.IGNORECASE)
    assert resolved.replace("\u2060", "") == text


@pytest.mark.parametrize("text", ["+ one", "- one", "1. one", "12. one", "1.", "-", "1) one", " - one", " 3. one"])
def test_plain_text_begins_no_list(text):
    assert not re.match(r"\s*([-+*]|\d+[.)])(\s|$)", plain(text))
    assert plain(text).replace("\\", "") == text


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n", "\u2028", "\x0b"])
def test_plain_text_is_one_line(end):
    shown = plain(f"one{end}# two{end}- three{end}")
    assert len(shown.splitlines()) == 1
    assert "\\# two" in shown


def test_plain_text_begins_no_block_of_code():
    assert plain("\t    x") == plain("\n\n    x") == " x"


@pytest.mark.parametrize("entity", ["&lt;b&gt;", "&#91;", "&amp;"])
def test_plain_text_holds_no_entity(entity):
    assert not re.search(r"(?<!\\)&", plain(entity))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("held_out_accuracy", 0.1417, "held-out accuracy 14%"),
        ("induction_score", 0.9, "induction score 90%"),
        ("tokens_per_second", 2138.4, "2,138 tokens/s"),
        ("loss", 1.3921, "loss 1.39"),
        ("run", 3.0, "run 3"),
        ("learning_rate", 0.008, "learning rate 0.008"),
    ],
)
def test_a_number_of_a_report_is_said_in_words(name, value, said):
    assert run._number(name, value) == said


def ticket(**values):
    return SimpleNamespace(state="running", place=0, seconds=13.0, progress=None, **values)


def test_a_job_has_one_time_that_is_left():
    """That of the whole, not that of a part of it."""
    part_of_a_sweep = ticket()
    part_of_a_sweep.progress = Progress(52, 1200, {"loss": 1.392, "seconds_left": 18.55, "run": 1})
    share, words = run._status(part_of_a_sweep, Params())
    assert words == "Step 52 of 1200 · loss 1.39 · run 1 · about 287 s left"
    assert share == 52 / 1200


def test_a_job_whose_last_steps_take_longest_can_say_so():
    sweep = ticket()
    sweep.progress = Progress(15, 30, {"tokens": 4096, "share_of_time": 0.1})
    share, words = run._status(sweep, Params())
    assert words == "Step 15 of 30 · tokens 4,096 · about 117 s left"
    assert share == 0.1


@pytest.mark.parametrize("lane", ["short", "long"])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_what_waits_in_the_long_lane_says_for_what(monkeypatch, lane, place):
    runtime = Future()
    runtime.set_result(SimpleNamespace(devices=lambda: ["a device"]))
    monkeypatch.setattr(run, "starting", lambda: runtime)
    waiting = ticket()
    waiting.state, waiting.place = "queued", place
    _, words = run._status(waiting, SimpleNamespace(lane=lane))
    assert ("one at a time" in words) == (lane == "long")
    assert (f"{place - 1} job" if place > 1 else "Next in line") in words


def test_a_page_that_says_it_waits_is_drawn_again_once_when_the_job_begins(monkeypatch):
    drawn_again = []
    waiting = ticket(shown=None)
    waiting.state = "queued"
    state = {"_run_key": run._Slot("training", Params(), ticket=waiting)}
    page = SimpleNamespace(session_state=state, rerun=lambda: drawn_again.append(1), skeleton=lambda height: None)
    monkeypatch.setattr(run, "st", page)
    monkeypatch.setattr(run, "_show_progress", lambda *_: None)
    monkeypatch.setattr(run, "_status", lambda *_, **__: (0.0, ""))
    monkeypatch.setattr(run, "_settled", lambda slot, *_: slot)
    assert run.is_waiting("key")
    for _ in range(3):
        run._watch("key", lambda *_: None, 100)
    assert not drawn_again
    waiting.state = "running"
    run._watch("key", lambda *_: None, 100)
    assert drawn_again == [1]
    assert not run.is_waiting("key")
    run._watch("key", lambda *_: None, 100)
    assert drawn_again == [1]
