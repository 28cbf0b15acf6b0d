"""Dask preload that imports heavy libraries in a fresh worker, so that its first job does not pay for them.

It is a preload, and not a job, so that a worker that replaces a dead one is warmed up as well. On an existing cluster:
``WORKBENCH_WARM_UP=torch,transformers dask worker --preload engine.runtime.warmup …``.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from typing import Any

MODULES_VARIABLE = "WORKBENCH_WARM_UP"

logger = logging.getLogger(__name__)
_finished = threading.Event()
_finished.set()


def dask_setup(worker: Any) -> None:
    """Import the modules named in ``WORKBENCH_WARM_UP`` (comma-separated) in a thread; `worker` is the one starting."""
    modules = [name for name in os.environ.get(MODULES_VARIABLE, "").split(",") if name]
    _finished.clear()
    threading.Thread(target=_import_all, args=(modules,), name="warm-up", daemon=True).start()


def wait() -> None:
    """Return when the imports are done: a job that imported the same modules beside them could see halves of them."""
    _finished.wait()


def _import_all(modules: list[str]) -> None:
    try:
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception:  # a broken library is the concern of the job that needs it, not of every job
                logger.warning("Warming up: %s cannot be imported.", module, exc_info=True)
    finally:
        _finished.set()
