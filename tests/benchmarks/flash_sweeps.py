"""What the FlashAttention lab's sweeps give on this device: recorded, they show a learner without a GPU what one does.

    python -m tests.benchmarks.flash_sweeps [--device cuda] [--small] [--json FILE]

The experiments themselves, in bfloat16: time and peak memory against sequence length at 16384 tokens a batch and width
2048, head width 64 and 128, with and without a causal mask, forward, and with gradients under the mask; one query
against a cache of up to 131072 tokens with 32 query heads on 8 key/value heads. A record that exists is completed, if
it is of this device and these versions. What the lab derives from the points is not recorded.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.benchmarks import recording

WHAT = "The FlashAttention lab's sweeps, by tests/benchmarks/flash_sweeps.py"
TOKENS, WIDTH = 16384, 2048


def sweeps(small: bool) -> list[tuple[str, dict[str, Any]]]:
    """Names of experiments and their parameters."""
    tokens, width, cache = (256, 128, 2048) if small else (TOKENS, WIDTH, 2**17)
    shared = {"dtype": "bfloat16", "tokens": "constant tokens", "batch": 1, "max_length": tokens}
    heads = [{"head_dim": head_dim, "heads": width // head_dim} for head_dim in (64, 128)]
    passes = [(False, "forward"), (True, "forward"), (True, "forward and backward")]
    speeds = [
        ("flash_speed", {**shared, **each, "causal": causal, "direction": direction})
        for each in heads
        for causal, direction in passes
    ]
    decode = {"dtype": "bfloat16", "max_length": cache, "heads": 32, "kv_heads": 8, "head_dim": 128, "splits": 16}
    return [*speeds, ("flash_decode", decode)]


def main() -> int:
    """Run those that the record lacks."""
    return recording.record(WHAT, __doc__, sweeps)


if __name__ == "__main__":
    sys.exit(main())
