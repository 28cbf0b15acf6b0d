"""Which learning rate each run of the MoE-LoRA lab gets: the same few tries for all three, and the same rule.

    python -m tests.benchmarks.moe_lora_rates [--device cpu] [--steps N] [--json FILE]

Every run is trained with every rate of `RATES` and every seed of `SEEDS`, on the lab's default settings. A run's rate
is the one with most right answers to the questions that are never trained on, over both seeds together; of equal ones
that with the lower loss. The seeds are not the one that the lab opens with, but the questions are the lab's own, so
that the figures are a little too good, for all three alike. The record is written anew after each training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine import pretrained
from engine.experiments._moe_lora import ROLES, Try, best_rates
from engine.experiments._on_workers.moe_lora_training import Examination, Leg
from engine.experiments.moe_lora import Params
from engine.measure import device_name, versions

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
SEEDS = (5, 6)


def main() -> int:
    """Train, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=Params().steps)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = pretrained.load(Params().model, arguments.device)
    exam = Examination(base)
    tries: list[Try] = []
    run: dict[str, Any] = {"recorded": datetime.date.today().isoformat(), "steps": arguments.steps}
    record = {
        "what": "Learning rates tried for each run of the MoE-LoRA lab, by tests/benchmarks/moe_lora_rates.py",
        "device": device_name(arguments.device),
        "versions": versions(),
        "runs": [run],
    }
    for role in ROLES:
        for rate in RATES:
            for seed in SEEDS:
                params = Params(learning_rate=rate, seed=seed, steps=arguments.steps)
                leg = Leg(role, params, base, exam, follow=lambda: None, cancelled=lambda: False)
                leg.train()
                leg.end(examine=True)
                last = leg.checkups[-1]
                tries.append(Try(role, rate, seed, float(last.accuracy.mean()), float(last.loss.mean())))
                print(f"{role:<24}{rate:<8g}seed {seed}{tries[-1].right:>8.0%}{tries[-1].loss:>8.3f}", flush=True)
                run["tries"] = [asdict(one) for one in tries]
                if arguments.json:
                    arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    for role, rate in best_rates(tries).items():
        print(f"{role}: {rate:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
