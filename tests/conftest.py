"""For every test: threads that wait must not spin, and a page under test must not stay the main module.

No test reaches the Hugging Face Hub, so that they say the same with a network and without one.
"""

import os
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is first imported
os.environ["HF_HUB_OFFLINE"] = "1"  # likewise, by huggingface_hub


@pytest.fixture(autouse=True)
def _own_main_module():
    """Streamlit runs a page as ``__main__`` and leaves it there; a process that a later test spawns would run it."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main
