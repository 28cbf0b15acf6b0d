"""How fast quantizing and dequantizing is on a GPU, ours beside bitsandbytes, as it was recorded. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Operation = Literal["quantize", "dequantize"]

TARGET = 4.0
"""Times bitsandbytes' throughput that quantizing is to reach."""

OURS: dict[Operation, tuple[str, ...]] = {
    "quantize": ("quantize()", "kernel"),
    "dequantize": ("dequantize()", "double quantization"),
}
"""Our ways of each operation, as the recording calls them."""

_RECORDED = Path(__file__).parents[1] / "recorded" / "quantize_throughput_h200.json"
_THEIRS = "bitsandbytes"


@dataclass(frozen=True)
class Throughput:
    """One way of one operation on one tensor.

    Args:
        operation: to 4 bits in blocks of 64, or back.
        way: ``"bitsandbytes"``, or what of ours: ``"quantize()"`` waits to hear from its kernel whether all weights are
            finite, ``"kernel"`` does not; ``"double quantization"`` has scales that are quantized themselves,
            ``"double quantization, bitsandbytes"`` too.
        tensor: shape and dtype, e.g. ``"4096 × 4096 bfloat16"``.
        data_type: name of the format in the engine.
        gb_per_s: bytes read and written, 10⁹ a second.
        evidence: of the time, as in `engine.measure.Evidence`.
    """

    operation: Operation
    way: str
    tensor: str
    data_type: str
    gb_per_s: float
    evidence: dict[str, Any]


@dataclass(frozen=True)
class RecordedThroughput:
    """All of them.

    Args:
        measured: in the order of the recording.
        copies: GB/s of copying each tensor, by its shape and dtype: what memory allows.
        differing_codes: in all comparisons with bitsandbytes together.
        device: where it ran.
        date: when.
        versions: of what took part.
    """

    measured: list[Throughput]
    copies: dict[str, float]
    differing_codes: int
    device: str
    date: str
    versions: dict[str, str]

    @property
    def provenance(self) -> str:
        """Where, when and with what, in words."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"recorded on an {self.device.removeprefix('NVIDIA ')}, {self.date}, {versions}"

    def speedups(self, way: str, data_type: str) -> tuple[float, float]:
        """Smallest and largest of GB/s over bitsandbytes' for the same operation, over all tensors."""
        ours = [one for one in self.measured if (one.way, one.data_type) == (way, data_type)]
        theirs = "double quantization, bitsandbytes" if way == "double quantization" else _THEIRS
        known = {(one.operation, one.way, one.tensor, one.data_type): one.gb_per_s for one in self.measured}
        ratios = [one.gb_per_s / known[one.operation, theirs, one.tensor, data_type] for one in ours]
        return min(ratios), max(ratios)


def recorded_throughput() -> RecordedThroughput | None:
    """What `tests.benchmarks.quantize_throughput` recorded; None if the file is not there."""
    if not _RECORDED.is_file():
        return None
    log = json.loads(_RECORDED.read_text())
    figures = [figure for figure in log["figures"] if figure["error"] is None]
    measured, copies = [], {}
    for figure in figures:
        tensor, _, data_type = figure["case"].rpartition(" ")
        operation, _, way = figure["row"].partition(", ")
        if operation == "copy":
            copies[tensor] = figure["gb_per_s"]
        else:
            measured.append(Throughput(operation, way, tensor, data_type, figure["gb_per_s"], figure["evidence"]))
    return RecordedThroughput(
        measured=measured,
        copies=copies,
        differing_codes=sum(log["differing_codes"].values()),
        device=figures[0]["evidence"]["device"],
        date=log["recorded"],
        versions=log["versions"],
    )
