"""What the quantization lab works on: a model at full precision, the weights of one of its layers, or drawn numbers.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from engine import catalogue
from engine.errors import InputError, JobCancelledError
from engine.experiments._quantization import (
    DRAWN_SHAPE,
    FormatParams,
    ModelParams,
    ScaleParams,
    WeightParams,
    type_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from engine.pretrained import Pretrained
    from engine.quantization.grouping import Grouping
    from engine.quantization.layers import Selection
    from engine.quantization.tensor import QuantizedTensor
    from engine.runtime.jobs import Job

DEGREES_OF_FREEDOM = 5
"""Of Student's t: the fewest with a fourth moment, without which the variance of a sample leaps from seed to seed."""

BITSANDBYTES_TYPES = {"nf4": "nf4", "fp4-bnb": "fp4", "int8": "int8"}
"""What bitsandbytes calls the data types that its layers have, by the engine's names."""

BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_QUANTIZED_SOURCE = "-bit source)"  # as engine.checkpoints words it for a GGUF file


@dataclass(frozen=True, eq=False)
class Weights:
    """What is quantized.

    Args:
        values: (O, I) float32.
        sentence: what they are.
        layer: dotted name; "" for drawn numbers.
        layers: names of all linear layers of the model; empty for drawn numbers.
        normal: whether they are independent draws of one normal distribution.
    """

    values: Tensor
    sentence: str
    layer: str
    layers: list[str]
    normal: bool

    @property
    def bound_note(self) -> str:
        """What the Gaussian rate-distortion bound means for them."""
        if self.normal:
            return "These weights are independent and normal: no code of so many bits does better than the bound."
        return (
            "The bound is that of independent normal weights. These are not, so it is a line to compare with, no "
            "limit: a code that fits them may cross it."
        )

    def quantize(self, params: FormatParams) -> QuantizedTensor:
        """They in the format of the page."""
        return quantize_as(self.values, type_name(params.data_type, params.bits, params.symmetric), params)


def quantize_as(values: Tensor, name: str, params: ScaleParams) -> QuantizedTensor:
    """Any values in the data type `name`, with the scales of the page."""
    from engine.quantization.tensor import quantize

    return quantize(values, name, grouping_of(params), double_quantization=params.double_quantization)


def grouping_of(params: ScaleParams) -> Grouping:
    """Which weights share a scale."""
    from engine.quantization.grouping import per_block, per_channel, per_tensor

    if params.scale == "per block":
        return per_block(params.block_size)
    return per_channel() if params.scale == "per channel" else per_tensor()


def read_weights(params: WeightParams, job: Job) -> Weights:
    """The weights that are meant, on the job's device.

    Raises:
        InputError: the model cannot be had or is quantized already, the layer does not exist, or a weight is not
            finite.
    """
    if params.source != "model layer":
        return _draw(params, job.device)
    from engine.quantization.tensor import check_weights

    model = load_model(params, job)
    selection = linear_layers(model)
    name = params.layer.strip() or default_layer(selection)
    if name not in selection.chosen:
        raise InputError(_no_such_layer(name, model, selection))
    values = selection.chosen[name].weight.detach().float()
    check_weights(values, f"The weights of {name}")
    outputs, inputs = values.shape
    sentence = f"{name} of {model.name}: {outputs} × {inputs} weights. {model.source}"
    return Weights(values, sentence, name, list(selection.chosen), normal=False)


def load_model(params: ModelParams, job: Job, predicts: bool = False) -> Pretrained:
    """The model on the job's device, in float32.

    Args:
        params: name it.
        job: where.
        predicts: whether it must be a decoder.

    Raises:
        InputError: it cannot be had, is quantized already, or is no decoder where one is needed.
    """
    from engine import pretrained

    if params.model == catalogue.SMOLLM2_Q4:
        raise InputError(_quantized_already(params.model, "it comes from a 4-bit GGUF file"))
    model = pretrained.load(params.model, job.device)
    if job.cancelled:
        raise JobCancelledError("The job was cancelled while its model was loaded.")
    if _QUANTIZED_SOURCE in model.source:
        raise InputError(_quantized_already(params.model, model.source.rstrip(".")))
    if predicts and model.kind != "decoder":
        raise InputError(
            f"{params.model} is an encoder: it predicts no next token, so that it has no perplexity; choose a decoder "
            f"such as {catalogue.STORYTELLER}."
        )
    return model


def _quantized_already(model: str, reason: str) -> str:
    return (
        f"The weights of {model} are quantized already ({reason}): rounding them again would show the error of their "
        f"grid, not of yours; choose a model at full precision, such as {catalogue.STORYTELLER}."
    )


def default_layer(selection: Selection) -> str:
    """The first block's down projection, or the first layer of a model that has none of that name."""
    names = list(selection.chosen)
    return next((name for name in names if name.endswith("down_proj")), names[0])


def _no_such_layer(name: str, model: Pretrained, selection: Selection) -> str:
    left = next((entry for entry in selection.left if entry.name in (name, f"{name}.weight")), None)
    if left is not None:
        return f"{name} of {model.name} keeps its precision: {left.reason}"
    weights = dict(model.model.named_parameters(remove_duplicate=False))
    weight = weights.get(f"{name}.weight")
    shared = next((entry.name for entry in selection.left if weights[entry.name] is weight), None)
    if shared is not None:
        return (
            f"{name} of {model.name} shares the weights of {shared.removesuffix('.weight')} and keeps its precision "
            "with them: a quantized copy would cost memory instead of saving it."
        )
    names = list(selection.chosen)
    several = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"There is no linear layer {name!r} in {model.name}: choose one of its {len(names)}, {several}"


def _draw(params: WeightParams, device: str) -> Weights:
    import torch

    generator = torch.Generator().manual_seed(params.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, size = math.prod(DRAWN_SHAPE), " × ".join(map(str, DRAWN_SHAPE))
    if params.source == "uniform":
        values = (torch.rand(DRAWN_SHAPE, generator=generator) - 0.5) * math.sqrt(12)
        what = "uniform between −√3 and √3, of variance 1"
    elif params.source == "Student-t":
        squares = normal(DEGREES_OF_FREEDOM, *DRAWN_SHAPE).square().mean(0)
        values = normal(*DRAWN_SHAPE) / squares.sqrt()
        what = f"of Student's t with {DEGREES_OF_FREEDOM} degrees of freedom, whose tails are heavy"
    else:
        values, what = normal(*DRAWN_SHAPE), "normal of variance 1"
    outliers = round(count * params.outliers / 100) if params.source == "normal with outliers" else 0
    if outliers:
        signs = torch.randint(0, 2, (outliers,), generator=generator) * 2.0 - 1
        values.view(-1)[torch.randperm(count, generator=generator)[:outliers]] = params.outlier_size * signs
        what += f", {outliers} of them outliers of ±{params.outlier_size:g} σ"
    sentence = f"{size} numbers, {what} (seed {params.seed})."
    plain = params.source == "normal" or (params.source == "normal with outliers" and not outliers)
    return Weights(values.to(device), sentence, "", [], normal=plain)


def not_comparable(params: FormatParams) -> str:
    """Why these settings are not those of a layer of bitsandbytes, with what could be compared; empty if they are."""
    name = type_name(params.data_type, params.bits, params.symmetric)
    if name not in BITSANDBYTES_TYPES:
        return (
            f"bitsandbytes' layers have no {params.in_words}: this compares 4 bits of NormalFloat or of its FP4 per "
            "block, and 8 bits of symmetric Integer per channel."
        )
    if name == "int8":
        if params.scale != "per channel":
            return f"bitsandbytes' layers have no 8-bit integers with one scale {params.scale}: choose one per channel."
        if params.double_quantization:
            return "bitsandbytes' 8-bit layers keep their scales in 32 bits: switch double quantization off."
    elif params.scale != "per block":
        return f"bitsandbytes' layers have no 4-bit weights with one scale {params.scale}: choose one per block."
    elif params.block_size not in BITSANDBYTES_BLOCKS:
        sizes = ", ".join(map(str, BITSANDBYTES_BLOCKS))
        return f"bitsandbytes has no 4-bit blocks of {params.block_size}: choose {sizes}."
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed here: `pip install bitsandbytes`."
    return ""


_PLACE = re.compile(r"(?:(.*?)\.)??(\d+)\.(.+)")


def places_of(layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The block that each layer belongs to, or ``"outside"``, and its kind; no two have the same place.

    ``"model.layers.0.mlp.up_proj"`` is at ``("0", "mlp.up_proj")``; where a model has several stacks of blocks, the
    number has the stack's name before it, as in ``"encoder 0"``.
    """
    found = {layer: _PLACE.fullmatch(layer) for layer in layers}
    stacks = _stack_names({place[1] or "" for place in found.values() if place})
    return {
        layer: (f"{stacks[place[1] or '']} {place[2]}".strip(), place[3]) if place else ("outside", layer)
        for layer, place in found.items()
    }


def _stack_names(stacks: set[str]) -> dict[str, str]:
    """Dotted names without the parts at their ends that all of them have."""
    parts = {stack: stack.split(".") for stack in stacks}
    for _ in range(2):  # from the front, then from the back
        common = sum(
            1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts.values(), strict=False))
        )
        parts = {stack: names[common:][::-1] for stack, names in parts.items()}
    return {stack: ".".join(names) for stack, names in parts.items()}


def labels_of(places: Mapping[str, tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Rows and columns of a map of layers at these places, in the model's order."""
    blocks, kinds = zip(*places.values(), strict=True)
    return list(dict.fromkeys(blocks)), list(dict.fromkeys(kinds))


def linear_layers(model: Pretrained) -> Selection:
    """The layers that can be quantized, and what cannot.

    Raises:
        InputError: there is none.
    """
    from engine.quantization.layers import select_layers

    return keep(model, "layers", lambda: select_layers(model.model))


def stored_bits(model: Pretrained) -> Literal[16, 32]:
    """Bits that hold every weight of the linear layers exactly: 16 as float16 or bfloat16, or the 32 of memory.

    Of the numbers, not of a file: a checkpoint that was published in 16 bits is float32 after a conversion.
    """
    import torch

    weights = [linear.weight.detach() for linear in linear_layers(model).chosen.values()]
    halves = (torch.float16, torch.bfloat16)
    return 16 if any(all(torch.equal(w.to(half).float(), w) for w in weights) for half in halves) else 32


_kept: WeakKeyDictionary[Pretrained, dict[str, Any]] = WeakKeyDictionary()


def keep(model: Pretrained, name: str, compute: Callable[[], Any]) -> Any:
    """What is computed from `model` once, and goes when the model goes."""
    kept = _kept.setdefault(model, {})
    if name not in kept:
        kept[name] = compute()
    return kept[name]
