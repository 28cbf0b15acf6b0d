"""The command line, in this process and, for Ctrl-C, in one of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine.experiments
from engine.__main__ import main

ROOT = Path(__file__).parents[2]

LAB = '''"""Counts the letters of a text.

More about it.
"""
import dataclasses, time
from typing import Literal
import numpy as np
from pydantic import Field
from engine.errors import JobFailedError
from engine.experiments import ExperimentParams

class Params(ExperimentParams):
    text: str = Field(default="abc", max_length=40, description="What to count in.")
    top_k: int = Field(default=2, ge=1, le=9, description="How many to show.")
    share: float = Field(default=0.5, gt=0, lt=1)
    window: int | None = Field(default=None, ge=1, le=512)
    sizes: tuple[int, ...] = Field(default=(1, 2), description="Some sizes.")
    kind: Literal["good", "bad", "slow", "odd"] = "good"
    gigabytes: float = 0

    def memory_bytes(self):
        return int(self.gigabytes * 1e9)

@dataclasses.dataclass(frozen=True)
class Result:
    counts: np.ndarray  # (letters,)
    device: str

def run(params, job):
    if params.kind == "bad":
        raise JobFailedError("The letters have run away.")
    if params.kind == "odd":
        return Result(np.array([np.nan, 1]), job.device)
    for step in range(600 if params.kind == "slow" else 2):
        job.report(step + 1, 2, letters=1.5)
        time.sleep(0.1 if params.kind == "slow" else 0)
    return Result(np.array([params.top_k, len(params.text), sum(params.sizes)]), job.device)
'''


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    """One experiment of the test's own."""
    (tmp_path / "letters.py").write_text(LAB)
    monkeypatch.setattr(engine.experiments, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "engine.experiments.letters", raising=False)
    yield tmp_path
    sys.modules.pop("engine.experiments.letters", None)


def test_list_gives_summary_bounds_and_defaults(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "letters: Counts the letters of a text."
    text = "\n".join(lines)
    assert '--text  What to count in. (at most 40 characters, default "abc")' in text
    assert "--top-k  How many to show. (at least 1, at most 9, default 2)" in text
    assert "(more than 0, less than 1, default 0.5)" in text
    assert "--window   (at least 1, at most 512, default null)" in text
    assert 'one of good, bad, slow, odd, default "good"' in text


@pytest.mark.parametrize("arguments", [["--top-k", "7"], ["--top_k", "7"], ["--top-k=7"]])
def test_run_prints_json(capsys, arguments):
    assert main(["run", "letters", "--json", "--device", "cpu", "--text", "four", "--sizes", "3, 4", *arguments]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"counts": [7, 4, 7], "device": "cpu"}
    assert "step 2 of 2  letters 1.5" in captured.err


def test_run_prints_a_summary(capsys):
    assert main(["run", "letters", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "top_k = 2" in out
    assert "counts: int64 3, from 2 to 3, mean 2.667" in out
    assert "device: cpu" in out


def test_a_value_may_begin_with_a_dash(capsys):
    assert main(["run", "letters", "--device", "cpu", "--json", "--text", "--no"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"][1] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "letters", "--top-k", "12"], "top_k is '12': input should be less than or equal to 9."),
        (["run", "letters", "--top-k", "many"], "top_k is 'many'"),
        (["run", "letters", "--nonsense", "1"], "nonsense is '1'"),
        (["run", "letters", "--dev", "1"], "dev is '1'"),
        (["run", "letters", "--top-k"], "--top-k has no value"),
        (["run", "letters", "top-k", "3"], "'top-k' is out of place"),
        (["run", "letters", "--device", "nonsense"], "'nonsense' is no device: give cpu, cuda, or one GPU"),
        (["run", "letters", "--device", "cuda:x"], "'cuda:x' is no device"),
        (["run", "letters", "--device", "meta"], "'meta' is no device"),
        (["run", "letters", "--device", ""], "'' is no device"),
        (["run", "numbers"], "There is no experiment 'numbers'; there are: letters."),
        (["list", "--all"], "list takes no '--all'."),
    ],
)
def test_what_makes_no_sense_is_one_sentence(capsys, arguments, words):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(words)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "bad"], "The letters have run away."),
        (["--gigabytes", "1e9"], "This run needs about 1000000000.0 GB"),
    ],
)
def test_a_run_that_fails_is_one_sentence(capsys, arguments, words):
    assert main(["run", "letters", "--device", "cpu", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(words)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("cuda", 0, "There is no device cuda: PyTorch finds no GPU here; use cpu."),
        ("cuda:0", 0, "There is no device cuda:0: PyTorch finds no GPU here; use cpu."),
        ("cuda:2", 2, "There is no device cuda:2: the last GPU is cuda:1."),
    ],
)
def test_a_gpu_that_is_not_there_is_one_sentence(capsys, monkeypatch, device, gpus, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert main(["run", "letters", "--device", device]) == 2
    assert capsys.readouterr().err == f"{words}\n"


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there_is_used(capsys, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["run", "letters", "--device", device, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == device


def test_numbers_that_json_does_not_have_are_null(capsys):
    assert main(["run", "letters", "--device", "cpu", "--json", "--kind", "odd"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["counts"] == [None, 1]


def test_fetch_says_what_it_has_found_and_where_it_lies(capsys, monkeypatch):
    from engine import catalogue, checkpoints

    asked = []

    def find(name, *_):
        asked.append(name)
        return checkpoints.Checkpoint(name, Path("/models/smollm2"), "From the Hub.", "1")

    monkeypatch.setattr(checkpoints, "find", find)
    assert main(["fetch"]) == 0
    assert asked == [catalogue.SMOLLM2]
    assert capsys.readouterr().out == "From the Hub.\n/models/smollm2\n"


def test_ctrl_c_stops_without_a_traceback(lab):
    command = [sys.executable, "-m", "engine", "run", "letters", "--kind", "slow", "--device", "cpu"]
    environment = {**os.environ, "WORKBENCH_EXPERIMENTS": str(lab)}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background job ignores it
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **heard)
    while "step" not in process.stderr.read(5):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.endswith("Stopped.\n")
    assert "Traceback" not in errors
