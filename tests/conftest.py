"""For every test: threads that wait must not spin, and a page under test must not stay the main module."""

import os
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is first imported


@pytest.fixture(autouse=True)
def _own_main_module():
    """Streamlit runs a page as ``__main__`` and leaves it there; a process that a later test spawns would run it."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main
