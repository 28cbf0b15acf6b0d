"""Every test runs in one tier, every tier in one job of the workflow, and a bound fails when it should."""

import json
from pathlib import Path

import pytest
import yaml

from tests.coverage_tiers import ROOT, TIERS, main

NAMES = [tier.name for tier in TIERS]
JOBS = yaml.safe_load((ROOT / ".github/workflows/tdd-pipeline.yml").read_text())["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def before(name):
    """The jobs that have passed when this one starts."""
    needs = JOBS[name].get("needs", [])
    direct = [needs] if isinstance(needs, str) else needs
    return set(direct).union(*(before(other) for other in direct))


def report(folder, lines, branches):
    """A coverage report in which every path of every tier has these shares, of 100 lines and 100 branches."""
    summary = {"covered_lines": lines, "num_statements": 100, "covered_branches": branches, "num_branches": 100}
    path = folder / "coverage.json"
    path.write_text(json.dumps({"files": {name: {"summary": summary} for tier in TIERS for name in tier.paths}}))
    return str(path)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_every_test_file_belongs_to_one_tier(path):
    name = path.relative_to(ROOT).as_posix()
    assert len([tier.name for tier in TIERS if name in tier.test_files()]) == 1


def test_the_files_of_a_tier_are_printed_as_pytest_takes_them(capsys):
    assert main(["--tests", "foundation"]) == 0
    files = capsys.readouterr().out.split()
    assert "tests/unit/test_masks.py" in files
    assert all(Path(ROOT, file).is_file() for file in files)


@pytest.mark.parametrize("tier", TIERS, ids=NAMES)
def test_a_tier_alone_is_held_to_its_own_bound(tier, tmp_path, capsys):
    assert main([report(tmp_path, tier.lines, tier.branches), tier.name]) == 0
    assert main([report(tmp_path, tier.lines - 1, tier.branches), tier.name]) == 1
    assert main([report(tmp_path, tier.lines, tier.branches - 1), tier.name]) == 1
    assert not [other for other in NAMES if other != tier.name and other in capsys.readouterr().out]


def test_all_tiers_are_held_to_theirs(tmp_path):
    assert main([report(tmp_path, 100, 95)]) == 0
    assert main([report(tmp_path, 99, 95)]) == 1


def test_an_unknown_tier_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(SystemExit, match="There is no tier core2: choose foundation, core,"):
        main(["--tests", "core2"])


@pytest.mark.parametrize("name", NAMES)
def test_each_tier_is_a_job_that_runs_its_make_target(name):
    program, *targets = commands(JOBS[name])[-1].split()
    assert program == "make"
    assert f"test-{name}" in targets


def test_the_jobs_are_the_tiers_and_each_waits_for_the_one_before():
    assert list(JOBS) == NAMES
    assert {name: before(name) for name in JOBS} == {
        "foundation": set(),
        "core": {"foundation"},
        "advanced": {"foundation", "core"},
        "expert": {"foundation", "core", "advanced"},
        "integration": {"foundation", "core", "advanced"},
    }
