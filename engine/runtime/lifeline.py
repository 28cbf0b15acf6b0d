"""Dask preload that ends a scheduler or a nanny when the process that started it is gone.

The starter ends its processes itself, unless it is killed with SIGKILL: then nobody would. A nanny's worker needs no
lifeline of its own: Dask ends it with its nanny.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

PARENT_VARIABLE = "WORKBENCH_PARENT_PID"
INTERVAL = 1.0  # seconds between two looks at the parent
CLOSING_TIME = 2.0  # seconds that an orderly end may take


def dask_setup(server: Any) -> None:
    """Watch the parent from a thread; `server` is the scheduler or the nanny that is starting."""
    parent = int(os.environ[PARENT_VARIABLE])
    threading.Thread(target=_follow, args=(parent,), name="lifeline", daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(CLOSING_TIME)
    os._exit(1)
