"""A model in 4 or 8 bits for use: its linear layers become bitsandbytes' `Linear4bit` or `Linear8bitLt`.

    small = quantize_model_4bit(model)   # a copy
    small.quantization.left              # what kept its precision, and why
    get_model_memory_mb(small)

They run on the CPU and on CUDA, in training (of adapters beside them) and not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.quantization.layers import LeftAlone, Objection, Selection, copy_without_weights, select_layers
from engine.quantization.outliers import THRESHOLD, check_threshold
from engine.quantization.tensor import check_weights, kernels_for

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

QuantType = Literal["nf4", "fp4"]
"""Of 4 bits, as bitsandbytes calls them."""

_BLOCK_SIZES = (64, 32)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer in few bits.

    Args:
        name: of the layer.
        shape: of its weight, (outputs, inputs).
        nbytes: of its codes, its scales, and its own copy of the codebooks as bitsandbytes keeps it: 64 bytes in 4
            bits, with double quantization 1 KiB more.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 · `nbytes` / weights, the layer's copy of the codebooks included, so that it is higher for small layers.

        `QuantizedTensor.bits_per_weight` leaves codebooks out, which belong to the data type: 4.127 with double
        quantization, and 4.26 here for a layer of 256 × 256.
        """
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class QuantizationReport:
    """What happened to every matrix of a model.

    Args:
        quantized: layers in few bits, their copies of the codebooks counted.
        left: parameters that kept their precision, and why.
    """

    quantized: tuple[QuantizedLayer, ...]
    left: tuple[LeftAlone, ...]


def quantize_model_4bit(model: nn.Module, quant_type: QuantType = "nf4", double_quantization: bool = True) -> nn.Module:
    """A copy of `model` whose linear layers hold 4-bit weights in blocks; `model` is not touched.

    Its `state_dict` holds codes, scales and codebooks, and another copy with the same blocks and types loads it; any
    other state of these layers is refused with a RuntimeError, and they stay as they are.

    Each becomes a `bitsandbytes.nn.Linear4bit` that computes in its weight's dtype. What is left as it is, such as
    embeddings, a head that shares the embedding's weights, and three-dimensional tensors of experts, is listed with the
    reason in the copy's ``quantization``, a `QuantizationReport`.

    Blocks have 64 weights, or 32 in layers whose inputs 64 does not divide. Layers whose inputs 32 does not divide are
    left as they are: on CPUs with AVX512, bitsandbytes 0.50 dequantizes a matrix whose rows hold a fraction of a block
    with the wrong blocks' scales, and with it most of its weights come out wrong.

    On a CPU with AVX512-BF16 bitsandbytes would, at the first call in eval mode, undo double quantization, round the
    scales to bfloat16 and refuse shapes that 32 and 64 do not divide; that path is off here, so that the weights are
    the same on every CPU, and the memory what was counted.

    Args:
        model: on the CPU or CUDA, in float32, bfloat16 or float16.
        quant_type: NormalFloat or bitsandbytes' FP4.
        double_quantization: whether scales are quantized as well: 4.127 bits a weight instead of 4.5, if codebooks
            are left out.

    Raises:
        InputError: another `quant_type`, no linear layer, or a weight that is not finite or of a dtype that
            bitsandbytes does not take (the message says where).
    """
    if quant_type not in get_args(QuantType):
        raise InputError(f"There is no 4-bit type {quant_type!r}: choose {' or '.join(get_args(QuantType))}.")

    def make(linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=linear.weight.dtype,
            compress_statistics=double_quantization,
            quant_type=quant_type,
            device="meta",
        )
        layer.weight = Params4bit(
            linear.weight.detach(),
            requires_grad=False,
            blocksize=next(size for size in _BLOCK_SIZES if linear.in_features % size == 0),
            compress_statistics=double_quantization,
            quant_type=quant_type,
            module=layer,
        ).to(linear.weight.device)
        layer.support_avx512bf16_for_cpu = False
        layer.register_load_state_dict_pre_hook(_load_scales_of_4_bits)
        return layer

    return _replace_layers(model, make, _object_to_ragged)


def quantize_model_8bit(model: nn.Module, threshold: float = THRESHOLD) -> nn.Module:
    """A copy of `model` whose linear layers hold int8 weights, one scale an output; `model` is not touched.

    Each becomes a `bitsandbytes.nn.Linear8bitLt` with LLM.int8's split of activations. The rest as
    `quantize_model_4bit`.

    Args:
        model: on the CPU or CUDA, in float32, bfloat16 or float16.
        threshold: from which magnitude on an activation is multiplied in full; 0 for never.

    Raises:
        InputError: a threshold below 0 or NaN, or as `quantize_model_4bit`.
    """
    check_threshold(threshold)

    def make(linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        layer = Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
        unquantized = Int8Params(linear.weight.detach().cpu(), requires_grad=False)
        layer.weight = unquantized.to(linear.weight.device)  # it quantizes on its way from the CPU
        layer.register_load_state_dict_pre_hook(_load_scales_of_8_bits)
        return layer

    return _replace_layers(model, make)


@dataclass(eq=False, slots=True)
class StoredWeight:
    """The weight of a `bitsandbytes.nn.Linear4bit` as it is stored, (O, I) when it is dequantized.

    Args:
        packed: its codes, two a byte; a plain tensor, for bitsandbytes' subclass is slow in Python.
        state: bitsandbytes' record of scales, levels and shape.
    """

    packed: Tensor
    state: QuantState

    @classmethod
    def of(cls, layer: nn.Module) -> StoredWeight | None:
        """That of `layer`; None where it is no `Linear4bit`, is not quantized yet, or packed for one CPU's kernels."""
        weight = layer._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is None or vars(state).get("packing_format_for_cpu", False):
            return None
        from bitsandbytes.nn import Linear4bit

        computes_plainly = getattr(type(layer), "forward", None) is Linear4bit.forward
        return cls(weight.detach(), state) if computes_plainly else None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, (O, I), in `dtype`."""
        state, packed = self.state, self.packed
        kernels = kernels_for(packed)
        if kernels is None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(packed, state).to(dtype)
        scales = state.absmax
        if state.nested:
            inner = state.state2
            scales = kernels.NestedScales(scales, inner.code, inner.absmax, state.offset, inner.blocksize)
        codes = packed.view(torch.uint8)
        return kernels.dequantize_blocks(codes, scales, state.code, state.blocksize, state.shape, dtype)


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """The scales of bitsandbytes' 4- and 8-bit weights, by name: to PyTorch no parameters and no buffers."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight, called = module._parameters.get("weight"), f"{name}.weight" if name else "weight"
        state = getattr(weight, "quant_state", None)
        if state is not None:
            # Named after their codebook, for with another one the same codes are other weights.
            found |= {f"{called}.{state.quant_type}.{part}": each for part, each in _scales(state).items()}
        if hasattr(weight, "SCB") and (scales := _scales_of_8_bits(module)) is not None:
            found[f"{called}.SCB"] = scales
    return found


def get_model_memory_mb(model: nn.Module) -> float:
    """Parameters and buffers of `model` in MB of 10⁶ bytes, shared ones once, quantized ones with all they carry."""
    return _nbytes(_tensors(model)) / _BYTES_PER_MB


@torch.no_grad()
def _replace_layers(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], objection: Objection | None = None
) -> nn.Module:
    selection = select_layers(model, objection)
    for name, linear in selection.chosen.items():
        called = f"The weights of {name}" if name else "The weights"  # a model may be a linear layer itself
        check_weights(linear.weight, called)
        if linear.weight.dtype not in _DTYPES:
            kind = str(linear.weight.dtype).removeprefix("torch.")
            raise InputError(
                f"{called} are {kind}: bitsandbytes takes float32, bfloat16 and float16, convert the model to one of "
                "them first, such as with model.float()."
            )
    duplicate = copy_without_weights(model, selection)
    made = {}
    for name, linear in selection.chosen.items():
        layer = make(linear)
        layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.clone(), linear.bias.requires_grad)
        made[name] = layer.train(linear.training)
    duplicate = _put(model, duplicate, selection, made)
    duplicate.quantization = QuantizationReport(
        tuple(
            QuantizedLayer(name, tuple(selection.chosen[name].weight.shape), _nbytes(_quantization_tensors(layer)))
            for name, layer in made.items()
        ),
        selection.left,
    )
    return duplicate


def _object_to_ragged(name: str, linear: nn.Linear) -> str | None:
    if linear.in_features % _BLOCK_SIZES[-1] == 0:
        return None
    return (
        f"Its rows of {linear.in_features} weights do not hold a whole number of blocks of {_BLOCK_SIZES[-1]}: "
        "bitsandbytes' CPU kernel would read other blocks' scales."
    )


def _put(model: nn.Module, duplicate: nn.Module, selection: Selection, made: dict[str, nn.Module]) -> nn.Module:
    """The copy with the new layers under every name that leads to the old ones in `model`."""
    if "" in made:
        return made[""]  # the model is a linear layer itself
    first = {id(linear): name for name, linear in selection.chosen.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in first:
            duplicate.set_submodule(name, made[first[id(module)]])
    return duplicate


def _scales(state: QuantState) -> dict[str, Tensor]:
    """Of a 4-bit weight."""
    nested = {"offset": state.offset, "nested_absmax": state.state2.absmax} if state.nested else {}
    return {"absmax": state.absmax} | nested


def _scales_of_8_bits(layer: nn.Module) -> Tensor | None:
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # the first forward pass moves them


@torch.no_grad()
def _load_scales_of_4_bits(
    layer: nn.Module, given: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """Take what bitsandbytes stores beside a weight's codes and does not load; see `load_state_dict` in PyTorch."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(layer)  # pickle makes it a plain parameter, whose copy has no scales
    name, own = f"{prefix}weight", layer.weight.quant_state
    stored = {key: given.pop(key) for key in list(given) if key.startswith(f"{name}.")}
    theirs = None
    if stored.keys() == {f"{name}.{key}" for key in own.as_dict(packed=True)} and _alike(given.get(name), layer.weight):
        theirs = QuantState.from_dict(stored, layer.weight.device)
    if theirs and (theirs.shape, theirs.blocksize) == (own.shape, own.blocksize):
        for part, scales in _scales(own).items():
            scales.copy_(_scales(theirs)[part])
        layer.quant_state = own  # of which a deep copy has two
    elif stored or name in given:
        inside = " with scales in 8 bits" if own.nested else ""
        _refuse(f"{own.quant_type} in blocks of {own.blocksize}{inside}", own.shape, layer, given, name, rest)
    _copy_not_assign(metadata)


@torch.no_grad()
def _load_scales_of_8_bits(
    layer: nn.Module, given: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """As `_load_scales_of_4_bits`; bitsandbytes loads them itself, but only if `strict` and before the first use."""
    name, own = f"{prefix}weight", _scales_of_8_bits(layer)
    theirs = given.pop(f"{prefix}SCB", None)
    if _alike(theirs, own) and _alike(given.get(name), layer.weight):
        own.copy_(theirs)
    elif theirs is not None or name in given:
        _refuse("int8", layer.weight.shape, layer, given, name, rest)
    _copy_not_assign(metadata)


def _refuse(kind: str, shape: torch.Size, layer: nn.Module, given: dict[str, Any], name: str, rest: tuple) -> None:
    """Leave the weight `name` as it is, and have `load_state_dict` raise."""
    given[name] = layer.weight
    rest[-1].append(
        f"{name}: what is given are not the codes and scales of {kind}, {' × '.join(map(str, shape))}: give the state "
        "of a model of the same configuration."
    )


def _copy_not_assign(metadata: dict[str, Any]) -> None:
    """A weight that were assigned would be a plain parameter, without scales."""
    metadata["assign_to_params_buffers"] = False


def _alike(given: Tensor | None, own: Tensor) -> bool:
    return given is not None and given.shape == own.shape and given.dtype == own.dtype


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from _quantization_tensors(module)


def _quantization_tensors(module: nn.Module) -> list[Tensor]:
    """Codes, scales and codebooks of one of bitsandbytes' layers; nothing for another."""
    weight = module._parameters.get("weight")
    if hasattr(weight, "SCB"):
        state = module.state
        return [tensor for tensor in (weight.data, weight.SCB, state.CB, state.SCB) if tensor is not None]
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    inner: Any = state.state2
    second = [inner.absmax, inner.code, state.offset] if state.nested else []
    return [weight.data, state.absmax, state.code, *second]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """What they take together, those that lie in the same place once."""
    return sum({(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}.values())
