"""How far the predicted memory of training steps is from what a GPU's allocator counts.

    python -m tests.benchmarks.memory_prediction [--device cuda] [--small] [--rows full …] [--json FILE]

A Llama-shaped `Decoder` of 1.1 billion random parameters is trained in several ways on several batches and lengths:
each is predicted by `engine.memory_budget`, carried out for a few steps, and weighed. Then the paged optimizer's run:
plain AdamW on a model that leaves no room for its state, and paged AdamW on the same. A row that fails is
reported as failed, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from engine.architecture import ModelConfig
from engine.experiments import memory_paged
from engine.measure import device_name
from engine.memory_budget import GB, budget, optimizer_bytes, weight_bytes
from engine.memory_measurement import build, measure_step
from engine.runtime.jobs import LocalJob
from engine.training_plan import Plan

LARGE = ModelConfig(
    d_model=2048,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    ffn_dim=5632,
    vocab_size=32000,
    tie_embeddings=False,
)
SMALL = ModelConfig(d_model=128, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=1000, tie_embeddings=False)
LARGE_SIZES = [(4, 1024), (1, 512), (1, 1024), (1, 2048), (4, 512), (4, 2048)]
SMALL_SIZES = [(1, 64), (2, 128)]

ROWS = {
    "full": {"method": "full fine-tuning"},
    "LoRA": {"method": "LoRA"},
    "LoRA, checkpointing": {"method": "LoRA", "checkpointing": True},
    "QLoRA": {"method": "LoRA", "weights": "nf4, double quantized", "optimizer": "paged AdamW 8-bit"},
    "QLoRA, checkpointing": {
        "method": "LoRA",
        "weights": "nf4, double quantized",
        "optimizer": "paged AdamW 8-bit",
        "checkpointing": True,
    },
    "full, checkpointing": {"method": "full fine-tuning", "checkpointing": True},
    "full, paged 8-bit": {"method": "full fine-tuning", "optimizer": "paged AdamW 8-bit"},
    "QLoRA, 4-bit scales in float32": {"method": "LoRA", "weights": "nf4", "optimizer": "AdamW 8-bit"},
    "LoRA, int8": {"method": "LoRA", "weights": "int8"},
}
"""What is different from a bfloat16 base, rank 16 on seven projections and AdamW, in the order in which it runs."""


def measure_row(row: str, config: ModelConfig, sizes: list[tuple[int, int]], device: str) -> list[dict[str, object]]:
    """Build the model of one row once, and weigh its steps on every batch and length."""
    started = time.perf_counter()
    try:
        plan = Plan(config, **{"rank": 16, **ROWS[row]}, on_cuda=torch.device(device).type == "cuda")
        model, optimizer = build(plan, device)
    except Exception as error:  # whatever it is, the other rows are wanted
        return [{"row": row, "error": f"build: {type(error).__name__}: {error}"}]
    built = time.perf_counter() - started
    found = []
    for batch, length in sizes:
        began = time.perf_counter()
        sized = dataclasses.replace(plan, batch=batch, length=length)
        entry = {"row": row, "batch": batch, "length": length, **describe(sized)}
        try:
            entry |= {"measured": asdict(measure_step(sized, model, optimizer, device))}
            entry["error_percent"] = 100 * (entry["predicted"]["peak"] / entry["measured"]["peak"] - 1)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        entry["seconds"] = {"build": built, "measure": time.perf_counter() - began}
        found.append(entry)
        print(line(entry), flush=True)
        if "cuda" in device:
            torch.cuda.empty_cache()
    return found


def describe(plan: Plan) -> dict[str, object]:
    """A plan without its shape, and what is predicted for it in the same categories as are measured."""
    made = budget(plan)
    on_card, paged = optimizer_bytes(plan)
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "config"}
    return {
        "plan": fields,
        "predicted": {
            "peak": made.peak.total,
            "when": made.peak.name,
            "model": sum(weight_bytes(plan)) + made.peak.parts.get("adapters", 0),
            "optimizer": on_card,
            "paged": paged,
            "gradients": made.moments[-1].parts.get("gradients", 0),
            "saved": made.saved,
            "parts": made.peak.parts,
        },
    }


def line(entry: dict) -> str:
    """A row of the table: peak, error, and each category as predicted and as measured."""
    size = f"{entry['batch']} × {entry['length']}" if "batch" in entry else ""
    head = f"{entry['row']:<32}{size:>9}"
    if "error" in entry:
        return f"{head}  FAILED: {entry['error'][:200]}"
    predicted, measured = entry["predicted"], entry["measured"]
    parts = "  ".join(
        f"{name} {predicted[name] / GB:.3f}|{'-' if measured[name] is None else f'{measured[name] / GB:.3f}'}"
        for name in ("model", "optimizer", "paged", "gradients", "saved")
    )
    return (
        f"{head}{predicted['peak'] / GB:>10.3f}{measured['peak'] / GB:>10.3f}{entry['error_percent']:>8.2f} %"
        f"  {parts}  at {predicted['when']}"
    )


def paged_run(device: str) -> dict[str, object]:
    """The paged optimizer's run, or why there is none."""
    try:
        return asdict(memory_paged.run(memory_paged.Params(), LocalJob(device)))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    """Measure, print the table, write the record; 1 if a row failed or lies more than 10 % off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=150, help="no row is begun after this time")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    arguments = parser.parse_args()
    device, started = arguments.device, time.perf_counter()
    config, sizes = (SMALL, SMALL_SIZES) if arguments.small else (LARGE, LARGE_SIZES)
    versions = {"python": sys.version.partition(" ")[0]}
    versions |= {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "bitsandbytes")}
    record = {
        "what": "Peak memory of training steps of a Decoder, by tests/benchmarks/memory_prediction.py",
        "recorded": datetime.date.today().isoformat(),
        "device": device_name(device),
        "versions": versions,
        "model": {**config.model_dump(), "parameters": config.num_parameters},
        "rows": [],
    }

    def write() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    print(" · ".join(f"{name} {version}" for name, version in versions.items()), "·", record["device"])
    print(f"{'plan':<32}{'B × T':>9}{'predicted':>10}{'measured':>10}{'error':>10}  GB, predicted|measured")
    for row in arguments.rows:
        if time.perf_counter() - started > arguments.seconds:
            record["rows"].append({"row": row, "error": "no time was left"})
        else:
            record["rows"] += measure_row(row, config, sizes, device)
        gc.collect()
        if "cuda" in device:
            torch.cuda.empty_cache()
        write()
    record["paged"] = paged_run(device)  # last, for it limits the allocator while it runs
    errors = [entry["error_percent"] for entry in record["rows"] if "error" not in entry]
    failed = [entry for entry in record["rows"] if "error" in entry]
    for entry in failed:
        print(line(entry))
    if "cuda" in device:
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        record["outside_allocator"] = outside
        print(f"outside the allocator: {outside / GB:.3f} GB of {total / GB:.1f} GB (others on the card included)")
    paged = record["paged"]
    print("paged run:", paged.get("error") or paged["sentence"])
    if errors:
        worst = max(errors, key=abs)
        print(f"{len(errors)} rows, worst error {worst:.2f} %, {time.perf_counter() - started:.0f} s")
    write()
    return int(bool(failed) or not errors or max(map(abs, errors)) > 10)


if __name__ == "__main__":
    sys.exit(main())
