"""Where a model's name leads on this machine, when what lies there changed, and which uploads are kept."""

import os
from pathlib import Path

import pytest

from engine import local_models
from engine.local_models import keep_upload, local_path, modified, uploaded

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """The folder of uploads, in a cache of its own."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return tmp_path / "uploads"


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


def test_an_upload_is_found_by_its_name_with_all_that_was_in_it(uploads):
    folder = keep_upload(FILES)
    assert uploaded(folder.name) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_equal_uploads_share_a_folder_and_others_have_their_own(uploads):
    folder = keep_upload(FILES)
    assert keep_upload(dict(reversed(FILES.items()))) == folder
    assert keep_upload({**FILES, "adapter_config.json": b"[]"}) != folder
    assert len(list(uploads.iterdir())) == 2


@pytest.mark.parametrize("name", ["", ".", "..", "../uploads", "0" * 32])
def test_what_was_not_uploaded_is_not_found(uploads, name):
    keep_upload(FILES)
    assert uploaded(name) is None


@pytest.mark.parametrize("limit", [("_KEPT", 3), ("_KEPT_BYTES", 17)], ids=["number", "bytes"])
def test_the_oldest_uploads_go_first(uploads, monkeypatch, limit):
    monkeypatch.setattr(local_models, *limit)
    folders = []
    for second in range(6):
        folders.append(keep_upload({"five": f"{second:05}".encode()}))
        os.utime(folders[-1], (second, second))
    assert [folder.exists() for folder in folders] == [False] * 3 + [True] * 3


def test_an_upload_that_arrives_again_is_young_again(uploads, monkeypatch):
    monkeypatch.setattr(local_models, "_KEPT", 2)
    first, second = keep_upload({"name": b"first"}), keep_upload({"name": b"second"})
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    keep_upload({"name": b"first"})
    keep_upload({"name": b"third"})
    assert first.exists()
    assert not second.exists()


def test_the_latest_upload_stays_however_large_it_is(uploads, monkeypatch):
    monkeypatch.setattr(local_models, "_KEPT_BYTES", 1)
    assert keep_upload(FILES).is_dir()


def test_a_full_disk_leaves_nothing_behind(uploads, monkeypatch):
    def full(path, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        keep_upload(FILES)
    assert not list(uploads.iterdir())


def test_what_somebody_else_has_uploaded_meanwhile_is_taken(uploads, monkeypatch):
    def late(path, target):
        monkeypatch.undo()
        monkeypatch.setenv("WORKBENCH_CACHE", str(uploads.parent))
        path.replace(target)
        raise OSError("Directory not empty")

    monkeypatch.setattr(Path, "rename", late)
    folder = keep_upload(FILES)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert list(uploads.iterdir()) == [folder]
