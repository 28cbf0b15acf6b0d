"""Sentences that hold what somebody typed."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#$~|!:&])")
_LIST = re.compile(r"^( ?)(?:([+-])|(\d+)\.(?= |$))")
# A bare address becomes a link after escapes are resolved, so that an escape does not prevent it. What does is a word
# joiner: a character without width, and without a meaning for a line of text.
_ADDRESS = re.compile(r"(https?\\:(?=//)|www(?=\.)|@)", re.IGNORECASE)
_WORD_JOINER = "\u2060"


def plain(text: str) -> str:
    """`text` on one line that Markdown shows letter by letter: no link, image, formula or list can hide in it."""
    line = re.sub(r"^\s+", " ", " ".join(text.splitlines()))  # much space at the start makes a block of code
    line = _MARKUP.sub(r"\\\1", line)
    line = _ADDRESS.sub(rf"\1{_WORD_JOINER}", line)
    return _LIST.sub(lambda start: f"{start[1]}\\{start[2]}" if start[2] else f"{start[1]}{start[3]}\\.", line)
