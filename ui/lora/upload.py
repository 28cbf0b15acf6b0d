"""The two files of an adapter out of what a learner has uploaded: side by side, or in a zip. Nothing is opened here."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable
from typing import Protocol

from engine.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_MEGABYTES = 100
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of these `zipfile` unpacks no more at a time than is asked for; of the others, all that a block holds."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HOW = f"Give {WEIGHTS_FILE} and {CONFIG_FILE}, or a zip that holds both."


class IncompleteError(InputError):
    """One of the two files is not there yet."""


class Upload(Protocol):
    """A file as it was uploaded."""

    name: str

    def getvalue(self) -> bytes:
        """What it holds."""


def adapter_files(uploads: Iterable[Upload]) -> dict[str, bytes]:
    """The contents of `CONFIG_FILE` and `WEIGHTS_FILE`.

    Args:
        uploads: the files themselves or a zip of them, in any folder. Any name is fine for the two themselves.

    Raises:
        IncompleteError: one is missing.
        InputError: one is there twice, something is a pickle, damaged or too large.
    """
    found: dict[str, bytes] = {}
    for upload in uploads:
        members = _unpacked(upload) if upload.name.lower().endswith(".zip") else [(upload.name, upload.getvalue())]
        for name, content in members:
            if (kind := _kind(name)) in found:
                raise InputError(f"There are two files that could be {kind}: give those of one adapter.")
            found[kind] = content
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if name not in found]
    if missing:
        raise IncompleteError(f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing. {_HOW}")
    return found


def _kind(name: str) -> str:
    """Which of the two files `name` is."""
    lower = name.lower()
    if lower.endswith(".safetensors"):
        return WEIGHTS_FILE
    if lower.endswith(".json"):
        return CONFIG_FILE
    if lower.endswith(_PICKLES):
        raise InputError(f"{_shown(name)} is a pickle, which could run code, and is not opened. {_HOW}")
    raise InputError(f"{_shown(name)} is no part of an adapter. {_HOW}")


def _unpacked(upload: Upload) -> list[tuple[str, bytes]]:
    """The files of a zip that could be an adapter's; a tokenizer or a readme beside them does not matter."""
    try:
        with zipfile.ZipFile(io.BytesIO(upload.getvalue())) as archive:
            members = [member for member in archive.infolist() if _base(member.filename) in (CONFIG_FILE, WEIGHTS_FILE)]
            if sum(member.file_size for member in members) > MAX_MEGABYTES * 1_000_000:
                raise InputError(
                    f"{_shown(upload.name)} unpacks to more than {MAX_MEGABYTES} MB, which is not accepted."
                )
            if not members:
                pickles = [name for name in archive.namelist() if name.lower().endswith(_PICKLES)]
                if pickles:
                    raise InputError(
                        f"{_shown(pickles[0])} is a pickle, which could run code, and is not opened. {_HOW}"
                    )
                raise InputError(f"{_shown(upload.name)} holds no adapter. {_HOW}")
            if any(member.compress_type not in _BOUNDED for member in members):
                raise InputError(
                    f"{_shown(upload.name)} is compressed in a way that is not accepted: pack it with Deflate, as zips "
                    "usually are."
                )
            return [(_base(member.filename), _content(archive, member)) for member in members]
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{_shown(upload.name)} is no readable zip. {_HOW}") from error


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """What `member` holds.

    Its size is said by the zip itself, which may be wrong; `ZipFile.read` would unpack everything before it looks.

    Raises:
        BadZipFile: it holds something else or more than it says.
    """
    with archive.open(member) as file:
        return file.read(member.file_size + 1)


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _shown(name: str) -> str:
    base = _base(name)
    return f"“{base if len(base) <= 40 else base[:39] + '…'}”"
