"""For every test: threads that wait must not spin, a page under test must not stay the main module, and what is marked
`gpu` is skipped where there is none.

No test reaches the Hugging Face Hub, so that they say the same with a network and without one.
"""

import os
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is first imported
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the test processes share the cores
    threads = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
os.environ["HF_HUB_OFFLINE"] = "1"  # likewise, by huggingface_hub


@pytest.fixture(autouse=True)
def _own_main_module():
    """Streamlit runs a page as ``__main__`` and leaves it there; a process that a later test spawns would run it."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch  # not before: some tests are about processes that never load it

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def no_kernel_is_chosen():
    """What other tests have timed decides on nothing: FlashAttention starts with the kernel that needs no start."""
    from engine.flash import choice

    choice.forget()
    yield
    choice.forget()
