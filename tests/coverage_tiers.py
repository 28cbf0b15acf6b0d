"""Coverage by tier: the closer to the mathematics, the less may go unseen.

    python tests/coverage_tiers.py coverage.json

Reads coverage's JSON report and fails if a tier stays below its bound, in per cent of lines and of branches.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tier:
    """Modules that share a bound; a folder counts with all that is in it.

    Args:
        name: of the tier.
        lines, branches: least share covered, in per cent.
        paths: files and folders, from the repository's root.
    """

    name: str
    lines: float
    branches: float
    paths: tuple[str, ...]


TIERS = (
    Tier(
        "foundation",
        100,
        95,
        (
            "engine/attention.py",
            "engine/masks.py",
            "engine/rotary.py",
            "engine/head_statistics.py",
            "engine/lora/layer.py",
            "engine/lora/attention.py",
        ),
    ),
    Tier(
        "core",
        95,
        90,
        (
            "engine/architecture.py",
            "engine/catalogue.py",
            "engine/data.py",
            "engine/experiments",
            "engine/finetuning",
            "engine/flash",
            "engine/generation.py",
            "engine/llama.py",
            "engine/lora/__init__.py",
            "engine/lora/adapter_config.py",
            "engine/lora/adapter_files.py",
            "engine/lora/injection.py",
            "engine/lora/linear.py",
            "engine/lora/product.py",
            "engine/lora/spectrum.py",
            "engine/memory_budget.py",
            "engine/memory_measurement.py",
            "engine/model.py",
            "engine/optim.py",
            "engine/pretrained.py",
            "engine/quantization",
            "engine/saved_activations.py",
            "engine/settings.py",
            "engine/tracing.py",
            "engine/trainer.py",
            "engine/training_plan.py",
            "engine/training_state.py",
        ),
    ),
    Tier(
        "advanced",
        90,
        85,
        (
            "engine/runtime",
            "engine/pretraining",
            "engine/checkpoints.py",
            "engine/measure.py",
            "engine/memory.py",
            "engine/local_models.py",
            "engine/__main__.py",
        ),
    ),
    Tier("expert", 80, 70, ("engine/moe",)),
    Tier("pages", 90, 80, ("ui", "app_pages", "app.py")),
)


def shares(files: dict[str, dict], paths: tuple[str, ...]) -> tuple[float, float]:
    """Per cent of lines and of branches covered in the files under `paths`."""
    chosen = [
        report["summary"]
        for name, report in files.items()
        if any(name == path or name.startswith(f"{path}/") for path in paths)
    ]
    if not chosen:
        raise SystemExit(f"No coverage was recorded for {', '.join(paths)}.")

    def share(covered: str, total: str) -> float:
        count = sum(summary[total] for summary in chosen)
        return 100 * sum(summary[covered] for summary in chosen) / count if count else 100.0

    return share("covered_lines", "num_statements"), share("covered_branches", "num_branches")


def main(report: str) -> int:
    """Print every tier and return 1 if one is below its bound."""
    files = json.loads(Path(report).read_text())["files"]
    failed = False
    print(f"{'tier':<12}{'lines':>14}{'branches':>16}")
    for tier in TIERS:
        lines, branches = shares(files, tier.paths)
        below = lines < tier.lines or branches < tier.branches
        failed |= below
        print(
            f"{tier.name:<12}{lines:>7.1f} / {tier.lines:<4g}{branches:>9.1f} / {tier.branches:<4g}"
            f"{'  below its bound' if below else ''}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
