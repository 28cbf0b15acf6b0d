"""A tensor in few bits a weight: codes, scales, and the count of every bit.

    q = quantize(w, "nf4", per_block(64))
    q.dequantize()       # w's shape and dtype
    q.bits_per_weight    # 4.5

What is written here is the definition. On CUDA `engine.quantization.kernels` does the same for 4 bits in blocks.

Legend: N weights, G groups, S weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Size, Tensor

from engine.errors import InputError
from engine.quantization.data_types import DataType, data_type, dynamic_8bit
from engine.quantization.grouping import Grouping, per_block
from engine.quantization.packing import pack, unpack

SCALES_PER_BLOCK = 256
_TINY = 1e-38


@dataclass(frozen=True, eq=False)
class QuantizedScales:
    """Scales that are quantized themselves: their mean, and 8-bit codes of the differences from it.

    Args:
        differences: of the scales from the mean.
        mean: a float32 number.

    Source: double quantization, Dettmers et al. 2023, QLoRA, section 3.
    """

    differences: QuantizedTensor
    mean: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes, second scales and mean."""
        return self.differences.nbytes + self.mean.nbytes

    def dequantize(self) -> Tensor:
        """The scales, (G,) float32, within its range: the sum may be rounded beyond it."""
        return round_to(self.differences.dequantize() + self.mean, self.mean.dtype)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Codes (G,), levels by code (256,), scales of the scales, mean, and how many scales share one of them."""
        inner = self.differences
        levels = _levels_by_code(inner.data_type, inner.payload.device)
        return inner.payload, levels, inner.scales, self.mean, inner.grouping.size


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Weights as codes: w ≈ scale · level(code), or scale · (level(code) − zero_point) in asymmetric types.

    Args:
        payload: the codes packed to the bit, (⌈N·b / 8⌉,) uint8.
        scales: one a group, (G,) float32, or quantized themselves.
        zero_points: codes of the zero, packed like the payload, or None.
        data_type: what the codes mean.
        grouping: which weights share a scale.
        shape: of the weights.
        dtype: of the weights.
    """

    payload: Tensor
    scales: Tensor | QuantizedScales
    zero_points: Tensor | None
    data_type: DataType
    grouping: Grouping
    shape: Size
    dtype: torch.dtype

    @property
    def codes(self) -> Tensor:
        """The code of every weight, uint8 of the weights' shape."""
        return unpack(self.payload, self.data_type.bits, self.shape.numel()).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; the codebook belongs to the data type and is no part of it."""
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.payload.nbytes + self.scales.nbytes + zero_points

    @property
    def bits_per_weight(self) -> float:
        """8 · `nbytes` / N."""
        return 8 * self.nbytes / self.shape.numel()

    @property
    def _is_doubly_quantized(self) -> bool:
        return isinstance(self.scales, QuantizedScales)

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, computed in float32 and rounded once to `dtype`, within its range."""
        kernels = kernels_for(self.payload)
        if kernels and kernels.decodes(self.data_type, self.grouping, self.dtype):
            levels = _levels_by_code(self.data_type, self.payload.device)
            scales = kernels.NestedScales(*self.scales.parts) if self._is_doubly_quantized else self.scales
            return kernels.dequantize_blocks(self.payload, scales, levels, self.grouping.size, self.shape, self.dtype)
        levels = self.grouping.split(self.data_type.decode(self.codes))  # (G, S)
        scales = self.scales.dequantize() if self._is_doubly_quantized else self.scales  # (G,)
        if self.zero_points is not None:
            codes = unpack(self.zero_points, self.data_type.bits, len(scales))
            levels = levels - self.data_type.decode(codes)[:, None]
        return round_to(self.grouping.join(levels * scales[:, None], self.shape), self.dtype)


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of every group: what is left of quantization once the scales are chosen.

    Args:
        data_type: the levels in units of the scale.
        scales: (G,) float32.
        inverses: what a weight is multiplied with, (G,): 1/scale, taken from the group's largest weight.
        zero_points: levels of the zero, (G,), or None.
    """

    data_type: DataType
    scales: Tensor
    inverses: Tensor
    zero_points: Tensor | None

    @classmethod
    def fit(cls, groups: Tensor, data_type: DataType) -> Grid:
        """The grid that just holds every weight of `groups` (G, S): the largest falls on the last level.

        Where the largest is below 10⁻³⁸ times the last level, no inverse that float32 holds takes it there: such a
        group comes out smaller than it was. bitsandbytes' CPU kernels do so to the same number in NF4; its CUDA
        kernels, and ours, take magnitudes below 2⁻¹²⁶ for 0.

        An asymmetric one reaches from the smallest to the largest weight, and always holds zero exactly. Where that is
        further than float32 reaches, its scale is infinite, which `store` refuses.
        """
        if data_type.has_zero_point:
            low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)  # (G,)
            extent = high - low
        else:
            extent = groups.abs().amax(1)
        inverses = data_type.peak / extent.clamp_min(data_type.peak * _TINY)
        zero_points = (-low * inverses).round() if data_type.has_zero_point else None
        return cls(data_type, extent / data_type.peak, inverses, zero_points)

    def pick(self, groups: Tensor) -> Grid:
        """The grid of the groups with the numbers `groups` (P,) alone."""
        zero_points = None if self.zero_points is None else self.zero_points[groups]
        return Grid(self.data_type, self.scales[groups], self.inverses[groups], zero_points)

    def encode(self, groups: Tensor) -> Tensor:
        """The codes of (G, S) weights, uint8."""
        scaled = groups * self.inverses[:, None]
        return self.data_type.encode(scaled if self.zero_points is None else scaled + self.zero_points[:, None])

    def decode(self, codes: Tensor) -> Tensor:
        """The weights of (G, S) codes, float32."""
        levels = self.data_type.decode(codes)
        return self.scales[:, None] * (levels if self.zero_points is None else levels - self.zero_points[:, None])

    def store(self, codes: Tensor, grouping: Grouping, like: Tensor, double_quantization: bool) -> QuantizedTensor:
        """Codes of the shape of the weights `like`, with this grid's scales, as a tensor.

        Raises:
            InputError: a scale is not finite.
        """
        if not self.scales.isfinite().all():
            raise InputError(
                "The smallest and the largest weight of a group are further apart than float32 can count, so that no "
                f"scale of {self.data_type.name} fits them: make the weights smaller or use a symmetric data type."
            )
        bits = self.data_type.bits
        return QuantizedTensor(
            payload=pack(codes.flatten(), bits),
            scales=_quantize_scales(self.scales) if double_quantization else self.scales,
            zero_points=None if self.zero_points is None else pack(self.data_type.encode(self.zero_points), bits),
            data_type=self.data_type,
            grouping=grouping,
            shape=like.shape,
            dtype=like.dtype,
        )


@torch.no_grad()
def quantize(
    w: Tensor,
    to: str | DataType = "nf4",
    grouping: Grouping | None = None,
    *,
    double_quantization: bool = False,
) -> QuantizedTensor:
    """Round every weight to the nearest level of its group: scale = largest magnitude of the group / last level.

    Args:
        w: the weights, floating point, any shape and device, finite.
        to: a data type or its name (`engine.quantization.data_types.DATA_TYPE_NAMES`).
        grouping: which weights share a scale; blocks of 64 if left out.
        double_quantization: store the scales as 8-bit differences from their mean, in blocks of 256.

    Raises:
        InputError: no weights, not floating point, a NaN or Inf (the message says where), an unknown data type, or
            weights whose scales float32 cannot hold.

    Source: block-wise absmax as in bitsandbytes 0.50, `quantize_4bit`: same codes, same scales, same values for NF4 and
    its FP4. Within the last block of a tensor that S does not divide, its CPU kernel divides by the scale where it
    multiplies by the inverse elsewhere; here and on CUDA the inverse is used throughout. On CUDA codes are those of its
    CUDA kernels, which differ from the CPU's in what `engine.quantization.kernels` lists: among it that with double
    quantization a block of zeros is not 0 in NF4.
    """
    chosen = data_type(to) if isinstance(to, str) else to
    grouping = grouping or per_block()
    kernels = kernels_for(w)
    if kernels and w.numel() and kernels.encodes(chosen, grouping, w.dtype):
        broken = torch.zeros(1, dtype=torch.int32, device=w.device)
        payload, absmax = kernels.quantize_blocks(w.detach(), chosen.name, grouping.size, broken)
        if not broken.item():
            scales = _quantize_scales(absmax) if double_quantization else absmax
            return QuantizedTensor(payload, scales, None, chosen, grouping, w.shape, w.dtype)
    check_weights(w)
    groups = grouping.split(w.detach().float())  # (G, S)
    grid = Grid.fit(groups, chosen)
    codes = grouping.join(grid.encode(groups), w.shape)
    return grid.store(codes, grouping, w, double_quantization)


def _quantize_scales(scales: Tensor) -> QuantizedScales:
    mean = scales.mean()
    if not mean.isfinite():
        raise InputError(
            "The scales of these weights add up to more than float32 can count, so that they cannot be quantized "
            "themselves: make the weights smaller or leave double quantization off."
        )
    return QuantizedScales(quantize(scales - mean, dynamic_8bit(), per_block(SCALES_PER_BLOCK)), mean)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 `values` in `dtype`; what is beyond its largest number becomes that."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def kernels_for(like: Tensor) -> ModuleType | None:
    """`engine.quantization.kernels` for a tensor on CUDA, None elsewhere and where Triton is not installed."""
    return _triton_kernels() if like.is_cuda else None


@cache
def _triton_kernels() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from engine.quantization import kernels

    return kernels


@lru_cache(maxsize=32)
def _levels_by_code(data_type: DataType, device: torch.device) -> Tensor:
    """Every level at its code's place, (2^b,) float32."""
    return data_type.decode(torch.arange(2**data_type.bits, dtype=torch.uint8, device=device))


def check_weights(w: Tensor, name: str = "The weights") -> None:
    """Refuse what cannot be quantized.

    Args:
        w: the weights.
        name: how the message calls them.

    Raises:
        InputError: no weights, not floating point, or a NaN or Inf: the message names the first one's index.
    """
    if not w.is_floating_point():
        kind = str(w.dtype).removeprefix("torch.")
        raise InputError(f"{name} are {kind}: give floating-point numbers, such as float32 or bfloat16.")
    if w.numel() == 0:
        raise InputError(
            f"{name} have the shape {tuple(w.shape)}, there is nothing to quantize: give one number or more."
        )
    wrong = ~w.detach().float().isfinite()
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise InputError(
            f"{name} hold {w[index].item()} at index {list(index)}, the first of {int(wrong.sum())} that are not "
            "finite in float32: no scale fits them, find out where they come from."
        )
