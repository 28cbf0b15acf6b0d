"""What lies on this machine, by path: models, when they changed, and what learners have uploaded. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_UPLOADS = "uploads"
_KEPT, _KEPT_BYTES = 100, 2 * 10**9  # uploads and what they hold together; the oldest go first
_NAME = re.compile(r"[0-9a-f]{32}")


def local_path(name: str) -> Path:
    """`name` read as a path; there need not be anything."""
    return Path(os.path.expanduser(name.strip()))  # unlike Path.expanduser, takes ~ before no user's name


def modified(name: str) -> int:
    """When a local model changed last, in ns since 1970; 0 if `name` is none."""
    path = local_path(name)
    try:
        files = [*path.iterdir()] if os.path.isdir(path) else [path]
        return max((file.stat().st_mtime_ns for file in files), default=0)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return 0


def cache_folder() -> Path:
    """Where models and uploads are kept: `WORKBENCH_CACHE`, else transformer-workbench in the user's cache folder."""
    if chosen := os.environ.get("WORKBENCH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer-workbench"


def keep_upload(files: Mapping[str, bytes]) -> Path:
    """Write uploaded files into a folder of their own, which is named by what they hold.

    The workers must see the same cache folder as the web process. Only the latest hundred uploads are kept, and of
    those no more than 2 GB, but always the latest one.

    Args:
        files: contents by name; the names are ours, never the uploader's.

    Returns:
        The folder; `uploaded` finds it again by its name.

    Raises:
        OSError: the disk is full, or may not be written to; nothing is left of the attempt.
    """
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}:{len(content)}:".encode() + content)
    uploads = cache_folder() / _UPLOADS
    folder = uploads / digest.hexdigest()[:32]
    with suppress(FileNotFoundError):
        os.utime(folder)
        return folder
    uploads.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=uploads))
    try:
        for name, content in files.items():
            (made / name).write_bytes(content)
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else the same files have arrived from somebody else meanwhile
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _forget_old(uploads)
    return folder


def uploaded(name: str) -> Path | None:
    """The folder of an upload by its name; None if there is none, or none any more."""
    folder = cache_folder() / _UPLOADS / name
    return folder if _NAME.fullmatch(name) and folder.is_dir() else None


def _forget_old(uploads: Path) -> None:
    """Remove the oldest, down to what is kept; another process may be doing the same."""
    found = []
    for folder in uploads.iterdir():
        with suppress(OSError):
            nbytes = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder.stat().st_mtime_ns, nbytes, folder))
    total = 0
    for place, (_, nbytes, folder) in enumerate(sorted(found, reverse=True)):
        total += nbytes
        if place >= _KEPT or (place > 0 and total > _KEPT_BYTES):
            shutil.rmtree(folder, ignore_errors=True)
