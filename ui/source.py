"""The Code tab: the engine's own source for what is drawn, read from its files and never imported."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import streamlit as st

_ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"https?://[^\s)>\]\"'`]+[^\s)>\]\"'`.,;]")


@dataclass(frozen=True)
class Source:
    """A definition as it stands in its file.

    Args:
        name: of the function or class, ``Class.method`` for a method.
        path: of the file, from the repository's root.
        line: its first line there, from 1; decorators count.
        text: the definition.
        links: the web addresses that its docstring cites, in order.
    """

    name: str
    path: str
    line: int
    text: str
    links: tuple[str, ...]


def show(names: Sequence[str]) -> None:
    """Draw the source of each of `names`, with the papers that it cites.

    Args:
        names: ``"package.module:function"``, ``"package.module:Class"`` or ``"package.module:Class.method"``.
    """
    for name in names:
        found = read(name)
        st.header(found.name, anchor=False)
        cited = "".join(f" · [{_label(link)}]({link})" for link in found.links)
        st.markdown(f"{found.path}, line {found.line}{cited}")
        st.code(found.text, language="python", wrap_lines=True)


@lru_cache(maxsize=128)
def read(name: str) -> Source:
    """The source of `name`, ``"package.module:definition"``.

    Raises:
        LookupError: the file has no such function or class.
    """
    module, _, definition = name.partition(":")
    path = _ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in definition.split("."):
        node = _child(node, part, name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return Source(
        name=definition,
        path=path.relative_to(_ROOT).as_posix(),
        line=first,
        text=textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno])),
        links=tuple(dict.fromkeys(_LINK.findall(ast.get_docstring(node) or ""))),
    )


def _child(node: ast.AST, part: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part:
            return child
    raise LookupError(f"there is no {part} in {name}")


def _label(link: str) -> str:
    """``"arXiv 1706.03762"`` for a paper there, and the host's name for any other link."""
    host, _, rest = link.split("://", 1)[1].partition("/")
    if host.endswith("arxiv.org"):
        return "arXiv " + rest.removeprefix("abs/").removeprefix("pdf/")
    return host
