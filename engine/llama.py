"""Our decoder and Llama's checkpoints in the Hugging Face format: the same weights under the same names.

    write(model, tokenizer, "storyteller")  # a folder that transformers opens
    model = read("storyteller")             # and so do we, without transformers

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import InputError
from engine.model import Decoder, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_BODY = "model."
_HEAD = "lm_head."


def from_transformers(model: Any) -> Decoder:
    """A transformers model of Llama's shape as a `Decoder` with a copy of its weights, where it is and in eval mode.

    Args:
        model: e.g. ``engine.pretrained.load("smollm2-135m").model``.

    Raises:
        InputError: its architecture has something that ours lacks.
    """
    decoder = _build(model.config.to_dict(), model.state_dict())
    return decoder.to(model.device)


def read(folder: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder in a folder with config.json and one .safetensors file, in eval mode.

    Args:
        folder: written by `write`, or by `save_pretrained` of transformers.
        dtype: of the weights in memory.

    Raises:
        InputError: a file is missing or damaged, or the architecture is not Llama's.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"The folder {folder} has no {Path(error.filename or 'model.safetensors').name}.") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"The files of {folder} are damaged or incomplete: fetch or save them again.") from error
    if not isinstance(config, dict):
        raise InputError(f"The config.json of {folder} describes no model: fetch or save it again.")
    return _build(config, {name: weight.to(dtype) for name, weight in weights.items()})


def write(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files to `folder`, as transformers writes a Llama.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        folder: is made if it is missing.
        dtype: of the weights in the file; float16 has 11 bits of precision to bfloat16's 8.

    Returns:
        The folder.

    Raises:
        InputError: a weight has no finite value in `dtype`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, parameter in model.named_parameters():  # a tied head once
        stored = parameter.detach().to("cpu", dtype).contiguous()
        if not stored.isfinite().all():
            raise InputError(f"{name} has weights beyond the range of {_name(dtype)}: write it as float32.")
        weights[name if name.startswith(_HEAD) else _BODY + name] = stored
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_describe(model.config, tokenizer, dtype), indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _describe(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": _name(dtype),
    }


def _build(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(_shape(config))
    own = {name.removeprefix(_BODY): weight for name, weight in weights.items()}
    if decoder.config.tie_embeddings:
        own["lm_head.weight"] = own.get("embed_tokens.weight")
    for name, wanted in decoder.state_dict().items():
        given = own.get(name)
        if given is None or given.shape != wanted.shape:
            found = "missing" if given is None else "×".join(map(str, given.shape))
            raise InputError(
                f"The weights do not fit the config: {name} is {found}, it should be "
                f"{'×'.join(map(str, wanted.shape))}; fetch or save the model again."
            )
    decoder.load_state_dict({name: own[name].detach().clone() for name in decoder.state_dict()}, assign=True)
    if decoder.config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder.eval()


_NEEDED = (
    "num_attention_heads",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _shape(config: Mapping[str, Any]) -> ModelConfig:
    """What a Llama's config.json says, as ours; transformers 4 writes ``rope_theta``, 5 ``rope_parameters``."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    differences = {
        "model_type": (config.get("model_type"), ("llama",)),
        "hidden_act": (config.get("hidden_act", "silu"), ("silu", "swish")),
        "attention_bias": (config.get("attention_bias", False), (False,)),
        "mlp_bias": (config.get("mlp_bias", False), (False,)),
        "rope_type": (rotary.get("rope_type", "default"), ("default",)),
    }
    for name, (given, allowed) in differences.items():
        if given not in allowed:
            raise InputError(f"The model has {name} {given!r}, this decoder {allowed[0]!r}: choose a plain Llama.")
    if missing := [name for name in _NEEDED if not isinstance(config.get(name), int | float)]:
        raise InputError(f"The model's config.json does not say its {', '.join(missing)}: fetch or save it again.")
    heads = config["num_attention_heads"]
    return ModelConfig(
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_seq_len=config["max_position_embeddings"],
        rope_theta=rotary.get("rope_theta") or config.get("rope_theta", 10000.0),
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
