"""Models that lie on this machine, by path: where a name leads, and when what lies there changed. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path


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
