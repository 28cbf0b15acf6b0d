"""Coverage by tier: the closer to the mathematics, the less may go unseen.

    python tests/coverage_tiers.py coverage.json            # every tier, from a run of the whole suite
    python tests/coverage_tiers.py coverage-core.json core  # one tier, from a run of its own tests
    python tests/coverage_tiers.py --tests core             # the files of these tests

Reads coverage's JSON report and fails if a tier stays below its bound, in per cent of lines and of branches. A tier's
own tests reach its bound alone: `make test-core` and the like see to that.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tier:
    """Modules that share a bound, and the tests that reach it; a folder counts with all that is in it.

    Args:
        name: of the tier.
        lines, branches: least share covered, in per cent.
        paths: files and folders, from the repository's root.
        tests: patterns of test files, from `tests/`; every test file belongs to one tier.
    """

    name: str
    lines: float
    branches: float
    paths: tuple[str, ...]
    tests: tuple[str, ...]

    def test_files(self) -> list[str]:
        """The test files there are, from the repository's root."""
        found = {path for pattern in self.tests for path in (ROOT / "tests").glob(pattern)}
        return sorted(path.relative_to(ROOT).as_posix() for path in found)


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
        (
            "unit/test_architecture.py",
            "unit/test_attention.py",
            "unit/test_coverage_tiers.py",
            "unit/test_head_statistics.py",
            "unit/test_lora.py",
            "unit/test_masks.py",
            "performance/test_measured_targets.py",
        ),
    ),
    Tier(
        "core",
        95,
        90,
        (
            "engine/architecture.py",
            "engine/autocast.py",
            "engine/catalogue.py",
            "engine/data.py",
            "engine/experiments",
            "engine/finetuning",
            "engine/flash",
            "engine/flat_optimizer.py",
            "engine/full_model.py",
            "engine/full_model_cost.py",
            "engine/full_model_memory.py",
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
            "engine/processes.py",
            "engine/quantization",
            "engine/saved_activations.py",
            "engine/settings.py",
            "engine/targets",
            "engine/tracing.py",
            "engine/trainer.py",
            "engine/training_plan.py",
            "engine/training_run.py",
            "engine/training_state.py",
        ),
        (
            "unit/test_catalogue.py",
            "unit/test_data.py",
            "unit/test_experiments.py",
            "unit/test_flash_*.py",
            "unit/test_flat_optimizer.py",
            "unit/test_full_model*.py",
            "unit/test_generation.py",
            "unit/test_lora_*.py",
            "unit/test_memory_budget.py",
            "unit/test_model.py",
            "unit/test_optim.py",
            "unit/test_pretrained.py",
            "unit/test_quantization*.py",
            "unit/test_router_*.py",
            "unit/test_targets.py",
            "unit/test_tracing.py",
            "unit/test_trainer*.py",
            "integration/test_*_experiment*.py",
            "integration/test_lora_peft.py",
            "integration/test_quantization_checks.py",
            "integration/test_router_collapse.py",
            "performance/test_flashattention.py",
            "performance/test_training_scaling.py",
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
        (
            "unit/test_checkpoints.py",
            "unit/test_cli.py",
            "unit/test_local_models.py",
            "unit/test_measure.py",
            "unit/test_memory.py",
            "unit/test_pretraining.py",
            "unit/test_results.py",
            "integration/test_runtime.py",
            "integration/test_smollm2.py",
        ),
    ),
    Tier(
        "expert",
        80,
        70,
        ("engine/moe",),
        ("unit/test_expert_*.py", "unit/test_moe_*.py", "performance/test_moe.py"),
    ),
    Tier(
        "integration",
        90,
        80,
        ("ui", "app_pages", "app.py"),
        ("integration/test_production_readiness.py", "ui/test_*.py", "browser/test_*.py"),
    ),
)

KERNELS = ("engine/moe/gating_kernels.py", "engine/moe/kernels.py")
"""In Triton, whose interpreter runs them in the tests where it is installed; elsewhere nothing can."""


def read(report: str | Path) -> dict[str, dict]:
    """What coverage's JSON report says of each file; not of kernels where nothing can run them."""
    files = json.loads(Path(report).read_text())["files"]
    if importlib.util.find_spec("triton") is None:
        return {name: file for name, file in files.items() if name not in KERNELS}
    return files


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


def check(report: str, tiers: tuple[Tier, ...]) -> int:
    """Print these tiers and return 1 if one is below its bound."""
    files = read(report)
    failed = False
    print(f"{'tier':<12}{'lines':>14}{'branches':>16}")
    for tier in tiers:
        lines, branches = shares(files, tier.paths)
        below = lines < tier.lines or branches < tier.branches
        failed |= below
        print(
            f"{tier.name:<12}{lines:>7.1f} / {tier.lines:<4g}{branches:>9.1f} / {tier.branches:<4g}"
            f"{'  below its bound' if below else ''}"
        )
    return int(failed)


def named(name: str) -> Tier:
    """The tier of this name."""
    for tier in TIERS:
        if tier.name == name:
            return tier
    raise SystemExit(f"There is no tier {name}: choose {', '.join(tier.name for tier in TIERS)}.")


def main(arguments: list[str]) -> int:
    """Do what the module's docstring says."""
    match arguments:
        case ["--tests", name]:
            print(*named(name).test_files())
            return 0
        case [report]:
            return check(report, TIERS)
        case [report, name]:
            return check(report, (named(name),))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
