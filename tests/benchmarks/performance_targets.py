"""The targets that the software measures itself against, on the device at hand.

    python -m tests.benchmarks.performance_targets [--device cuda] [--json file]

Attention forward at T = 128, 512 and 1024 takes at most 10 ms and 100 MB (batch 1, 512 wide, 8 heads, causal).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine import MultiHeadAttention
from engine.masks import causal, materialize
from engine.measure import Evidence, measure_time, peak_memory

D_MODEL, NUM_HEADS = 512, 8
LENGTHS = (128, 512, 1024)
MAX_MS, MAX_MB = 10.0, 100.0


@dataclass(frozen=True)
class Target:
    """One measured length.

    Args:
        length: T.
        evidence: of the time.
        peak_mb: memory that the pass allocates at its peak, in MB of 10^6 bytes.
        passed: within both bounds.
    """

    length: int
    evidence: Evidence
    peak_mb: float
    passed: bool


def attention_forward(length: int, device: str, dtype: torch.dtype = torch.float32) -> Target:
    """Measure one forward pass of `MultiHeadAttention` that returns its weights."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(D_MODEL, NUM_HEADS).to(device, dtype).eval()
    x = torch.randn(1, length, D_MODEL, device=device, dtype=dtype)  # (B, T, D)
    mask = materialize(causal, length, device=device)

    def forward() -> None:
        with torch.inference_mode():
            layer(x, x, x, mask)

    forward()  # what a first call allocates for good, a workspace say, is not the pass's
    peak = peak_memory(forward, device) / 1e6
    evidence = measure_time(forward, device, dtype=dtype, shape=f"(1, {length}, {D_MODEL}), {NUM_HEADS} heads, causal")
    return Target(length, evidence, peak, evidence.median_ms <= MAX_MS and peak <= MAX_MB)


def main() -> int:
    """Print the table; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures with their evidence to this file")
    arguments = parser.parse_args()
    targets = [attention_forward(length, arguments.device) for length in LENGTHS]
    first = targets[0].evidence
    print(f"{first.device} · {first.dtype} · " + " · ".join(f"{k} {v}" for k, v in first.versions.items()))
    print(f"{'T':>6}{'median':>12}{'10–90 %':>20}{'peak':>12}")
    for target in targets:
        found = target.evidence
        print(
            f"{target.length:>6}{found.median_ms:>9.3f} ms{found.low_ms:>10.3f} – {found.high_ms:.3f}"
            f"{target.peak_mb:>9.1f} MB{'' if target.passed else '  missed'}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(target) for target in targets], indent=1, ensure_ascii=False))
    return int(not all(target.passed for target in targets))


if __name__ == "__main__":
    sys.exit(main())
