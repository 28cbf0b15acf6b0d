"""The command line: ``python -m engine.pretraining --text stories.txt --out folder``.

Exit status: 0, 1 if training diverged, 2 if something asked for makes no sense, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.errors import InputError, WorkbenchError
from engine.pretraining.recipe import Recipe
from engine.pretraining.run import pretrain

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_PLACES = {
    "steps": (),
    "block_size": (),
    "random_share": (),
    "passage_share": (),
    "min_period": (),
    "held_out_share": (),
    "evaluate_every": (),
    "probe_period": (),
    "num_layers": ("model",),
    "d_model": ("model",),
    "num_heads": ("model",),
    "num_kv_heads": ("model",),
    "ffn_dim": ("model",),
    "vocab_size": ("model",),
    "max_seq_len": ("model",),
    "dropout": ("model",),
    "learning_rate": ("options",),
    "batch_size": ("options",),
    "accumulate": ("options",),
    "weight_decay": ("options",),
    "precision": ("options",),
    "compile": ("options",),
    "seed": ("options",),
}
"""Where in the recipe each option of the command line belongs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    text, out, device, minutes = (given.pop(name) for name in ("text", "out", "device", "minutes"))
    try:
        pretrain(_recipe(given), text, out, device=device, minutes=minutes, say=_say)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.pretraining", description="Train the small model of the labs from a text of stories."
    )
    parser.add_argument("--text", type=Path, required=True, help="stories between <|endofstory|> lines; .xz is fine")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the record of its training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--minutes", type=float, help="stop training after so long")
    recipe = parser.add_argument_group("recipe", "each has a default that is known to work")
    for name in _PLACES:
        recipe.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS)
    return parser


def _recipe(given: dict[str, str]) -> Recipe:
    """The default recipe with what was given in its place; pydantic reads the numbers."""
    values = Recipe().model_dump()
    if any(name in given for name in ("d_model", "num_heads")):  # what follows from these follows from them anew
        for name in ("num_kv_heads", "head_dim", "ffn_dim"):
            del values["model"][name]
    for name, value in given.items():
        target = values
        for part in _PLACES[name]:
            target = target[part]
        target[name] = value
    return Recipe(**values)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
