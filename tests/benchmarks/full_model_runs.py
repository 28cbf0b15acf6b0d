"""What the Whole model lab's ablation and throughput give on this device, for its record of a GPU.

    python -m tests.benchmarks.full_model_runs [--device cuda] [--small] [--json FILE]

The experiments themselves, with every technique on, in the lab's default sizes and in its largest: 12 layers, 512 wide,
64 texts of 256 tokens a step. A record that exists is completed, if it is of this device and these versions.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.benchmarks import recording

WHAT = "The Whole model lab's ablation and throughput, by tests/benchmarks/full_model_runs.py"

LARGEST = {
    "d_model": 512, "num_layers": 12, "num_heads": 8, "rank": 16, "experts": 8, "batch_size": 64, "length": 256,
}  # fmt: skip
TINY = {"d_model": 32, "num_layers": 1, "num_heads": 1, "rank": 2, "experts": 2, "batch_size": 2, "length": 16}


def runs(small: bool) -> list[tuple[str, dict[str, Any]]]:
    """Names of experiments and their parameters."""
    sizes, steps = ([TINY], 5) if small else ([{}, LARGEST], 40)
    ablations = [("full_model_ablation", size | {"steps": steps}) for size in sizes]
    return ablations + [("full_model_throughput", size) for size in sizes]


def main() -> int:
    """Run those that the record lacks."""
    return recording.record(WHAT, __doc__, runs)


if __name__ == "__main__":
    sys.exit(main())
