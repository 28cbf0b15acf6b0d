"""Experiments run on this device and written down, so that a learner without a GPU sees what one gives."""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine import experiments
from engine.measure import device_name, versions
from engine.runtime.jobs import LocalJob

DERIVED = ("predicted", "predicted_bytes", "predicted_ms", "sentence")
"""What a lab makes of the rest when it shows it, and is not written down."""


def measured(found: Any) -> Any:
    """Without what follows from the rest."""
    if isinstance(found, dict):
        return {name: measured(value) for name, value in found.items() if name not in DERIVED}
    return [measured(value) for value in found] if isinstance(found, list) else found


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


def record(what: str, help_text: str, wanted: Callable[[bool], Sequence[tuple[str, dict[str, Any]]]]) -> int:
    """Run the experiments that a record lacks, print a line each, and write the record anew after each.

    Args:
        what: the record's first line.
        help_text: of the command.
        wanted: names of experiments and their parameters; asked whether they are to be small.
    """
    parser = argparse.ArgumentParser(description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--json", type=Path, help="the record; one that exists is completed")
    arguments = parser.parse_args()
    given = arguments.json
    found = json.loads(given.read_text(encoding="utf-8")) if given and given.exists() else {"what": what, "runs": []}
    for run in found["runs"]:
        check_same_place(given, run["result"], arguments.device)
    there = [(run["experiment"], run["params"]) for run in found["runs"]]
    for name, values in wanted(arguments.small):
        if (name, values) in there:
            continue
        start = time.perf_counter()
        result = experiments.get(name).run(experiments.parse(name, values), LocalJob(arguments.device))
        plain, today = experiments.to_plain(result), datetime.date.today().isoformat()
        found["runs"].append({"experiment": name, "recorded": today, "params": values, "result": measured(plain)})
        print(f"{name} {values}: {time.perf_counter() - start:.0f} s")
        print(f"  {plain['sentence']}", flush=True)
        if given:
            given.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return 0
