"""What the FlashAttention lab's sweeps give on this device: recorded, they show a learner without a GPU what one does.

    python -m tests.benchmarks.flash_sweeps [--device cuda] [--small] [--json FILE]

The experiments themselves, in bfloat16: time and peak memory against sequence length at 16384 tokens a batch and width
2048, head width 64 and 128, with and without a causal mask, forward, and with gradients under the mask; one query
against a cache of up to 131072 tokens with 32 query heads on 8 key/value heads. A record that exists is completed, if
it is of this device and these versions. What the lab derives from the points is not recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engine import experiments
from engine.measure import device_name, versions
from engine.runtime.jobs import LocalJob

WHAT = "The FlashAttention lab's sweeps, by tests/benchmarks/flash_sweeps.py"
TOKENS, WIDTH = 16384, 2048
DERIVED = ("predicted", "predicted_bytes", "predicted_ms", "sentence")


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


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """Without what follows from the rest."""
    return {name: value for name, value in found.items() if name not in DERIVED}


def check_same_place(path: Path, found: dict[str, Any], device: str) -> None:
    """End with a sentence unless `found`, a part of the record at `path`, is of this device and these versions."""
    here = {"device": device_name(device), "versions": versions()}
    there = {name: found[name] for name in here}
    if there != here:
        was, now = (
            f"{each['device']} with {', '.join(f'{name} {version}' for name, version in each['versions'].items())}"
            for each in (there, here)
        )
        raise SystemExit(f"{path} was recorded on {was}, and this is {now}: give another file.")


def main() -> int:
    """Run those that the record lacks, print a line each, write the record anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="short sequences, to see that everything runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    given = arguments.json
    record = json.loads(given.read_text(encoding="utf-8")) if given and given.exists() else {"what": WHAT, "runs": []}
    for run in record["runs"]:
        check_same_place(given, run["result"], arguments.device)
    there = [(run["experiment"], run["params"]) for run in record["runs"]]
    for name, values in sweeps(arguments.small):
        if (name, values) in there:
            continue
        start = time.perf_counter()
        result = experiments.get(name).run(experiments.parse(name, values), LocalJob(arguments.device))
        plain = experiments.to_plain(result)
        today = datetime.date.today().isoformat()
        kept = measured(plain) | {"points": [measured(point) for point in plain["points"]]}
        record["runs"].append({"experiment": name, "recorded": today, "params": values, "result": kept})
        print(f"{name} {values}: {len(plain['points'])} points, {time.perf_counter() - start:.0f} s")
        print(f"  {plain['sentence']}", flush=True)
        if given:
            given.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
