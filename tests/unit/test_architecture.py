"""Imports point one way, and the web process stays free of torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "bitsandbytes")
WEB = ("streamlit", "plotly")
LOADED = ("engine/experiments", "engine/runtime", "engine/catalogue.py", "engine/local_models.py")
ON_WORKERS = "engine/experiments/_on_workers"
"""Modules for workers, that nothing the web process loads imports at its top: the last test here sees to that."""


def sources(*places):
    return [
        path
        for place in places
        for path in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
    ]


def imports(path, *, at_import_only=False):
    """The modules that `path` imports, as dotted names; with `at_import_only`, not those inside functions and types."""
    pending, found = [ast.parse(path.read_text())], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
    return found


def within(module, *packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", sources("engine"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_knows_neither_the_web_nor_the_pages(path):
    assert not [module for module in imports(path) if within(module, *WEB, "ui", "app_pages", "app")]


@pytest.mark.parametrize("path", sources("app.py", "app_pages", "ui"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pages_reach_the_engine_through_experiments_and_the_runtime_only(path):
    """Beside errors, and the names of the models (`engine.catalogue`, `engine.local_models`): what a picker offers and
    where an upload lies is needed before there is anything to run, and neither imports torch, which is tested below."""
    allowed = ("engine.experiments", "engine.runtime", "engine.errors", "engine.catalogue", "engine.local_models")
    engine = [module for module in imports(path) if within(module, "engine") and module != "engine"]
    assert not [module for module in engine if not within(module, *allowed)]
    assert not [module for module in imports(path) if within(module, *HEAVY, "app_pages", "app")]


@pytest.mark.parametrize("path", sources("ui/charts"), ids=lambda path: str(path.relative_to(ROOT)))
def test_charts_know_neither_streamlit_nor_the_runtime(path):
    assert not [module for module in imports(path) if within(module, "streamlit", "engine.runtime")]


@pytest.mark.parametrize(
    "path",
    [path for path in sources(*LOADED) if not path.is_relative_to(ROOT / ON_WORKERS)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_the_web_process_loads_imports_nothing_heavy_at_its_top(path):
    assert not [module for module in imports(path, at_import_only=True) if within(module, *HEAVY)]


def test_the_checks_above_can_see_an_import(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bitsandbytes\n"
        "class A:\n    import torch.nn\n\ndef f():\n    from transformers import AutoModel\n"
    )
    assert {"torch.nn", "transformers", "bitsandbytes"} <= imports(path)
    assert "torch.nn" in imports(path, at_import_only=True)
    assert not {"transformers", "bitsandbytes"} & imports(path, at_import_only=True)


def test_loading_the_whole_web_process_leaves_torch_out():
    """Everything that app, pages and ui import, and every experiment, in a process of its own."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("app.py", "app_pages", "ui")]
    names = [module.removesuffix(".__init__") for module in modules]
    program = f"""
import importlib, sys
from engine import experiments
from engine.runtime import Runtime
for name in experiments.names():
    experiments.get(name)
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception as error:  # a page outside of its app may stop at a link or a device: its imports are done by then
        if isinstance(error, ImportError):
            raise
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    nowhere = {**os.environ, "WORKBENCH_SCHEDULER": "tcp://127.0.0.1:9"}  # the pages need no workers to be imported
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=nowhere, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
