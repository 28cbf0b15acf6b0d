"""Our own Dask cluster on this machine: a scheduler, and for every device two workers, one a lane."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dask.system import CPU_COUNT
from distributed import SpecCluster
from distributed.deploy.subprocess import Subprocess
from distributed.system import MEMORY_LIMIT

from engine import experiments
from engine.runtime import lifeline, warmup

LANES: tuple[str, ...] = get_args(experiments.Lane)
HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
START_TIMEOUT = 30.0  # seconds
MEMORY_SHARE = 0.9  # of the host's memory, for all workers; the rest is for the web process, the scheduler, the system


class Node(Subprocess):
    """A Dask server in a process of its own, in a session of its own: Ctrl-C in the terminal is not for it.

    Args:
        spec: class and options for ``dask spec``.
        environment: variables it gets beside our own.
        addresses: of the scheduler, if it is not the scheduler itself.
    """

    def __init__(self, spec: dict[str, Any], environment: dict[str, str], *addresses: str) -> None:
        self._command = [sys.executable, "-m", "dask", "spec", *addresses, "--spec", json.dumps(spec)]
        self._environment = {**os.environ, **environment}
        super().__init__()

    async def _start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )


class SchedulerNode(Node):
    """The scheduler; with ``allowed_failures`` 0 it does not repeat a task whose worker died."""

    def __init__(self, directory: str, environment: dict[str, str]) -> None:
        self._identity = Path(directory) / f"scheduler-{uuid.uuid4().hex}.json"
        options = {
            "host": HOST,
            "port": 0,
            "dashboard": False,
            "dashboard_address": f"{HOST}:0",  # Dask serves HTTP all the same
            "allowed_failures": 0,
            "scheduler_file": str(self._identity),
            "preload": [lifeline.__name__],
        }
        super().__init__({"cls": "distributed.Scheduler", "opts": options}, environment)

    async def _start(self) -> None:
        await super()._start()
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.process.returncode is None:
            try:
                self.address = json.loads(self._identity.read_text())["address"]
                return
            except (OSError, json.JSONDecodeError):  # not there yet, or half written
                await asyncio.sleep(0.02)
        raise RuntimeError(f"the scheduler did not start within {START_TIMEOUT:.0f} s")


class WorkerNode(Node):
    """A nanny with its worker, which serves one lane on one device."""

    def __init__(self, scheduler: str, name: str, options: dict[str, Any], environment: dict[str, str]) -> None:
        super().__init__({"cls": "distributed.Nanny", "opts": {"name": name, **options}}, environment, scheduler)


def create_cluster(
    directory: str, gpus: Sequence[str], threads: int | None, memory_limit: int | None, warm_up: Sequence[str]
) -> SpecCluster:
    """The cluster, not started yet: await it in an event loop.

    Args:
        directory: where its processes may leave files.
        gpus: names for ``CUDA_VISIBLE_DEVICES``; none stands for the CPU.
        threads: what torch may use in each worker; None for an equal share of the cores for every device.
        memory_limit: host memory of each worker in bytes; None for an equal share of what there is.
        warm_up: modules that workers import when they start.
    """
    devices = list(gpus) or [""]
    threads = threads or max(1, CPU_COUNT // len(devices))
    memory_limit = memory_limit or int(MEMORY_SHARE * MEMORY_LIMIT / (len(devices) * len(LANES)))
    environment = _environment(threads, warm_up)

    def worker(lane: str, gpu: str) -> dict[str, Any]:
        options = {
            "host": HOST,
            "nthreads": 1,
            "resources": {lane: 1},
            "memory_limit": memory_limit,
            "local_directory": directory,
            "preload": [warmup.__name__],
            "preload_nanny": [lifeline.__name__],
            "silence_logs": "WARNING",
        }
        return {
            "cls": WorkerNode,
            "options": {"options": options, "environment": {**environment, "CUDA_VISIBLE_DEVICES": gpu}},
        }

    return SpecCluster(
        scheduler={"cls": SchedulerNode, "options": {"directory": directory, "environment": environment}},
        workers={f"{lane}-{index}": worker(lane, gpu) for index, gpu in enumerate(devices) for lane in LANES},
        name="workbench",
        asynchronous=True,
    )


async def close_cluster(cluster: SpecCluster, patience: float) -> None:
    """End all processes of the cluster, by force if it takes more than `patience` seconds to do it in order."""
    try:
        await asyncio.wait_for(cluster.close(), patience)
    except Exception:
        for node in [*cluster.workers.values(), cluster.scheduler]:
            await node.close()


def _environment(threads: int, warm_up: Sequence[str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": path,
        lifeline.PARENT_VARIABLE: str(os.getpid()),
        warmup.MODULES_VARIABLE: ",".join(warm_up),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Threads that wait for each other must not spin: both lanes, the web process and a browser share the cores, and
        # a pass that takes 90 ms alone took over a second beside two busy processes; so it takes a sixth of a second.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Dask's default hands every freed block back to the system at once, and with the page faults that follow an
        # elementwise operation on 4 MB takes ten times as long. These are what glibc itself arrives at by adapting.
        "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        # A worker whose libraries and models fill its memory must go on working, not pause or spill for good.
        "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "False",
        "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
        "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
        "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": "[]",
        "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES": "[]",
        # The sampling profiler would disturb what is timed.
        "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        "DASK_LOGGING__DISTRIBUTED": "warning",
    }
