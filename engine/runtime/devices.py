"""The devices that experiments compute on: which there are, what they are, how much memory they have left."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import memory
from engine.errors import DoesNotFitError, InputError

GB = 1e9
LIBRARIES = ("torch", "transformers", "bitsandbytes", "triton", "numpy", "distributed")


@dataclass(frozen=True)
class DeviceInfo:
    """What an experiment runs on: the evidence beside every measured figure.

    Args:
        name: as its maker calls it, e.g. ``"NVIDIA H200"``.
        kind: ``"cpu"`` or ``"cuda"``.
        device: the torch device, e.g. ``"cuda:0"``.
        total_bytes: memory of the device that jobs may use.
        free_bytes: what of it was free when this was asked.
        cores: processor cores that the host gives to us.
        hostname: the host's name.
        python: version of Python.
        libraries: versions of the libraries that are installed, by name.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    device: str
    total_bytes: int
    free_bytes: int
    cores: int
    hostname: str
    python: str
    libraries: Mapping[str, str]


def visible_gpus() -> list[str]:
    """Names of the GPUs we may use, each fit for ``CUDA_VISIBLE_DEVICES``; asks the driver's own tool, not torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() and not gpu.strip().startswith("-")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed_gpus(answer.stdout)


def listed_gpus(listing: str) -> list[str]:
    """UUIDs in a listing of ``nvidia-smi -L``; of a GPU that is split (MIG), its parts instead of the whole."""
    gpus: list[str] = []
    for uuid in re.findall(r"UUID: ((?:GPU|MIG)-[^)\s]+)", listing):
        if uuid.startswith("MIG-") and gpus and gpus[-1].startswith("GPU-"):
            gpus.pop()
        gpus.append(uuid)
    return gpus


@functools.cache
def torch_device() -> str:
    """The torch device of this process: its first GPU, or the CPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise `InputError` unless `device` names the CPU or a GPU that there is, e.g. ``"cuda:1"``."""
    if device == "cpu":
        return
    named = re.fullmatch(r"cuda(?::(\d{1,4}))?", device)
    if named is None:
        raise InputError(f"{device!r} is no device: give cpu, cuda, or one GPU by its number, such as cuda:0.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError(f"There is no device {device}: PyTorch finds no GPU here; use cpu.")
    if int(named[1] or 0) >= count:
        raise InputError(f"There is no device {device}: the last GPU is cuda:{count - 1}.")


def check_fits(needed: int, device: str) -> None:
    """Refuse a run whose estimated peak is more than what is free now.

    Args:
        needed: estimated peak in bytes; 0 stands for "not worth a look".
        device: the torch device.

    Raises:
        DoesNotFitError: it does not fit; the message gives both figures.
    """
    if needed <= 0:
        return
    free = memory.free(device)
    if needed > free:
        raise DoesNotFitError(
            f"This run needs about {needed / GB:.1f} GB, and {_spoken(device)} has {free / GB:.1f} GB free: "
            "choose smaller settings."
        )


def describe() -> DeviceInfo:
    """This process's device, in full."""
    from dask.system import CPU_COUNT

    device = torch_device()
    return DeviceInfo(
        name=_name(device),
        kind="cuda" if device.startswith("cuda") else "cpu",
        device=device,
        total_bytes=memory.total(device),
        free_bytes=memory.free(device),
        cores=CPU_COUNT,
        hostname=socket.gethostname(),
        python=platform.python_version(),
        libraries={name: version for name in LIBRARIES if (version := _version(name)) is not None},
    )


def _spoken(device: str) -> str:
    return "the GPU" if device.startswith("cuda") else "this computer"


def _name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.MULTILINE)
        if model is not None:
            return model.group(1).strip()
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
