"""Where a model's name leads on this machine, and when what lies there changed."""

import os
from pathlib import Path

import pytest

from engine.local_models import local_path, modified


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "/nowhere/at/all", "a\0b", "x" * 5000, "~nobody/x"])
def test_what_is_not_there_has_never_changed(name):
    assert modified(name) == 0


def test_the_home_folder_is_spelled_out():
    assert local_path(" ~/models/mine ") == Path.home() / "models" / "mine"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_change_is_seen(tmp_path, kind):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"old")
    (tmp_path / "config.json").write_text("{}")
    name = str(tmp_path if kind == "folder" else weights)
    before = modified(name)
    later = before + 10**9
    weights.write_bytes(b"new")
    os.utime(weights, ns=(later, later))
    assert modified(name) == later != before
    assert modified(name) == later
