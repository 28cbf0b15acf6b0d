"""Triton kernels without a GPU: checks that run through Triton's interpreter, in a process of their own.

The interpreter must be chosen before Triton is imported. A test module with functions `check_…(device)` calls
`run_in_interpreter(__name__)` in a fixture, and at its end, where that process comes in, `report(CHECKS)`.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_in_interpreter(module: str) -> dict[str, str]:
    """What each check of a test module said: nothing, or how it failed, by the check's name."""
    pytest.importorskip("triton", reason="torch brings it on Linux")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def report(checks: Mapping[str, Callable[[str], object]]) -> None:
    """Run the checks on the CPU and print what `run_in_interpreter` reads."""
    found = {}
    for name, check in checks.items():
        try:
            check("cpu")
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
