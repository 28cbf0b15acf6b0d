"""The settings of an adapter in PEFT's format, adapter_config.json: what is understood, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.lora.injection import listed, shortened

CONFIG_FILE = "adapter_config.json"
LARGEST = 1e30
"""Of α, of a factor and of the update, so that nothing made of them overflows in float32."""

_HIGHEST_RANK = 1_000_000
_UNDERSTOOD = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
}
_DESCRIPTIVE = {  # which layers the adapter is for is read from the weights' names
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_STARTS_BESIDE_THE_WEIGHT = (None, True, False, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields that are understood, each of its type; others must say nothing.

    Args:
        folder: with the file.

    Raises:
        InputError: the file is missing or damaged, or asks for what is not supported; the message says which.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"The folder {folder.name} has no {CONFIG_FILE}.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{CONFIG_FILE} is damaged or incomplete: fetch or save it again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"{CONFIG_FILE} describes an adapter of the type {shortened(repr(kind))}, not 'LORA'.")
    if "PISSA" in str(config.get("init_lora_weights")).upper():
        raise InputError(
            "The adapter started from PiSSA and holds for the reduced weights only: save it from PEFT with "
            "path_initial_model_for_weight_conversion, which makes an ordinary adapter of it."
        )
    if config.get("init_lora_weights") not in _STARTS_BESIDE_THE_WEIGHT:
        raise InputError(
            f"The adapter has init_lora_weights {shortened(repr(config['init_lora_weights']))}, which changes the "
            "base's weights and is not supported."
        )
    asked = {
        name: value
        for name, value in config.items()
        if name not in _UNDERSTOOD | _DESCRIPTIVE and value not in (None, False, "none", [], {})
    }
    if asked:
        wishes = listed([f"{name} = {json.dumps(value)[:40]}" for name, value in asked.items()])
        raise InputError(f"{CONFIG_FILE} asks for what is not supported here: {wishes}.")
    base_model = config.get("base_model_name_or_path")
    return {
        "base_model_name_or_path": shortened(base_model) if base_model and isinstance(base_model, str) else None,
        "r": _field(
            config,
            "r",
            None,
            lambda value: type(value) is int and 1 <= value <= _HIGHEST_RANK,
            f"a whole number from 1 to {_HIGHEST_RANK}",
        ),
        "lora_alpha": _field(
            config,
            "lora_alpha",
            8,  # PEFT's own default
            lambda value: type(value) in (int, float) and 0 < value <= LARGEST,
            f"a positive number, at most {LARGEST:g}",
        ),
        "lora_dropout": _field(
            config, "lora_dropout", 0.0, lambda value: type(value) in (int, float) and 0 <= value < 1, "from 0 to 1"
        ),
        "use_rslora": _field(config, "use_rslora", False, lambda value: type(value) is bool, "true or false"),
        "use_dora": _field(config, "use_dora", False, lambda value: type(value) is bool, "true or false"),
    }


def _field(config: Mapping[str, Any], name: str, default: Any, allowed: Callable[[Any], bool], what: str) -> Any:
    value = config.get(name, default)
    if not allowed(value):
        raise InputError(f"{CONFIG_FILE} has {name} = {json.dumps(value)[:40]}: it must be {what}.")
    return value
