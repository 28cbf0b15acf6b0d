"""Sentences that hold what somebody typed."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#$~|!:])")


def plain(text: str) -> str:
    """`text` so that Markdown shows it letter by letter: no link, image or formula can hide in it."""
    return _MARKUP.sub(r"\\\1", text)
