"""The levels that a weight can take in few bits: integers, NormalFloat, small floating-point formats.

    NF4 = normal_float(4)
    NF4.codebook              # 16 levels, sorted
    codes = NF4.encode(x)     # the bit pattern of the level nearest to each x
    NF4.decode(codes)         # those levels

A level times its group's scale is a weight. Every codebook follows from its definition.

Legend: b bits, L levels (at most 2^b), N numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from engine.errors import InputError
from engine.quantization.limits import MAX_BITS, MIN_BITS


@dataclass(frozen=True, eq=False)
class DataType:
    """Levels and the bit patterns that stand for them.

    Args:
        name: e.g. ``"nf4"``.
        bits: b, what one code takes.
        codebook: the levels, sorted, (L,) float32.
        patterns: the code of each level, (L,) uint8. For NormalFloat and integers it counts the levels from below; the
            floating-point formats have their own order: sign, exponent, mantissa.
        ties: where a number halfway between two levels goes: ``"down"`` to the lower one, or ``"even"`` to the one
            whose place counted from `even_from` is even.
        even_from: place in the codebook of a level that counts as even; for numbers with a zero that is zero's.
        has_zero_point: whether a group has a zero point beside its scale: w ≈ scale · (level − zero_point).
    """

    name: str
    bits: int
    codebook: Tensor
    patterns: Tensor
    ties: Literal["down", "even"] = "even"
    even_from: int = 0
    has_zero_point: bool = False

    @property
    def peak(self) -> float:
        """The largest magnitude of a level: a group's largest weight is scaled to it."""
        return self.codebook.abs().max().item()

    def encode(self, x: Tensor) -> Tensor:
        """The codes of the levels nearest to `x`, which is in units of the scale; beyond the last level, the last.

        Args:
            x: float32, any shape, finite.

        Returns:
            uint8, x's shape.
        """
        midpoints = self._midpoints.to(x.device)
        index = _count_below(x, midpoints, inclusive=False)  # on a midpoint: the level below
        if self.ties == "even":
            above = _count_below(x, midpoints, inclusive=True)
            index = torch.where((index - self.even_from) % 2 == 0, index, above)
        return _look_up(self.patterns.to(x.device), index)

    def decode(self, codes: Tensor) -> Tensor:
        """The levels that `codes` (uint8, any shape) stand for, float32."""
        return _look_up(self._levels.to(codes.device), codes)

    @cached_property
    def _midpoints(self) -> Tensor:
        """Between neighbouring levels, (L − 1,)."""
        return (self.codebook[:-1] + self.codebook[1:]) / 2

    @cached_property
    def _levels(self) -> Tensor:
        """By pattern, (2^b,); one that no level has reads as 0."""
        levels = torch.zeros(2**self.bits)
        levels[self.patterns.long()] = self.codebook
        return levels

    def round(self, x: Tensor) -> Tensor:
        """The levels nearest to `x`, without a scale."""
        return self.decode(self.encode(x.float())).to(x.dtype)


_FEW = 16
"""So many comparisons with a whole tensor take a CPU less time than a search for each number."""


def _count_below(x: Tensor, midpoints: Tensor, inclusive: bool) -> Tensor:
    """How many of `midpoints` are below each `x`, or equal to it where `inclusive`; int32."""
    if len(midpoints) >= _FEW or x.device.type != "cpu":
        return torch.bucketize(x, midpoints, out_int32=True, right=inclusive)
    below = torch.ge if inclusive else torch.gt
    count = torch.zeros(x.shape, dtype=torch.uint8)
    for midpoint in midpoints.tolist():
        count += below(x, midpoint)
    return count.int()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for an index of any shape and integer type; on a CPU this takes a quarter of its time."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


class _Integers(DataType):
    """Levels that are one apart, so that the nearest is found by rounding instead of a search: half goes to even."""

    def encode(self, x: Tensor) -> Tensor:
        """As `DataType.encode`."""
        low, high = self.codebook[0].item(), self.codebook[-1].item()
        return (x.round().clamp_(low, high) - low).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """As `DataType.decode`."""
        return codes.float() + self.codebook[0].item()


@cache
def integer(bits: int, symmetric: bool = True) -> DataType:
    """Integers: −n … n with n = 2^(b−1) − 1, or 0 … 2^b − 1 with a zero point where not `symmetric`.

    The lowest code of the symmetric type is not used, so that it has a zero in the middle. Halfway goes to the even
    integer, as everywhere in IEEE arithmetic.

    Args:
        bits: b, 2 to 8.
        symmetric: whether the levels are −n … n.

    Raises:
        InputError: another number of bits.
    """
    _check_bits(bits)
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        codebook = torch.arange(-largest, largest + 1, dtype=torch.float32)
        return _Integers(f"int{bits}", bits, codebook, _counted(codebook), even_from=largest)
    codebook = torch.arange(2**bits, dtype=torch.float32)
    return _Integers(f"uint{bits}", bits, codebook, _counted(codebook), has_zero_point=True)


@cache
def normal_float(bits: int) -> DataType:
    """NormalFloat: levels that standard-normal weights use about equally often, 0 and ±1 among them.

        levels = −Φ⁻¹(p⁻) ∪ {0} ∪ Φ⁻¹(p⁺), divided by the largest,
        p⁺: 2^(b−1) probabilities evenly from 1 − δ towards ½, p⁻: 2^(b−1) − 1 of them,
        δ = ½·(1/2^(b+1) + 1/(2^(b+1) − 2))

    The sides differ by one so that 0 is a level. For b = 4 this is QLoRA's NF4: δ = ½·(1/32 + 1/30), rounded like the
    reference to seven digits and in the reference's precision, so that the 16 levels are the same floats. The paper
    gives b = 4 only; δ for the others is its formula with 2^b in the place of 16. Halfway goes down, as in
    bitsandbytes.

    Args:
        bits: b, 2 to 8.

    Raises:
        InputError: another number of bits.

    Source: Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314; `create_normal_map` of bitsandbytes.
    """
    _check_bits(bits)
    outermost = round(1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2, 7)
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        probabilities = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float32)[:-1]
        return torch.special.ndtri(probabilities.double())  # falling

    levels = torch.cat([-quantiles(half - 1), torch.zeros(1, dtype=torch.float64), quantiles(half).flip(0)]).float()
    codebook = levels / levels.max()
    return DataType(f"nf{bits}", bits, codebook, _counted(codebook), ties="down")


Reserved = Literal["nothing", "nan", "inf and nan"]


@cache
def floating_point(exponent_bits: int, mantissa_bits: int, reserved: Reserved = "nothing") -> DataType:
    """Sign, exponent e and mantissa m in few bits.

        e > 0:  ±(1 + m/2^M) · 2^(e − bias)        e = 0:  ±(m/2^M) · 2^(1 − bias)        bias = 2^(E−1) − 1

    Halfway goes to the even mantissa. Beyond the largest finite level a number saturates to it (the OCP's saturating
    mode; PyTorch's cast gives infinity in E5M2 and, by version, NaN in E4M3). −0 is written as 0.

    Args:
        exponent_bits: E.
        mantissa_bits: M.
        reserved: patterns that are no numbers: the one of all ones (``"nan"``, as in E4M3FN), all those with the
            highest exponent (``"inf and nan"``, as in IEEE 754 and E5M2), or none (as in E2M1).

    Source: OCP, "Microscaling Formats (MX)" and "8-bit Floating Point (OFP8)", 2023; Micikevicius et al. 2022,
    https://arxiv.org/abs/2209.05433.
    """
    bits = 1 + exponent_bits + mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1

    def value(pattern: int) -> float:
        exponent, mantissa = divmod(pattern, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        return (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)

    count = 2 ** (bits - 1) - {"nothing": 0, "nan": 1, "inf and nan": 2**mantissa_bits}[reserved]
    name = f"fp{bits}-e{exponent_bits}m{mantissa_bits}"
    return _signed(name, bits, [value(pattern) for pattern in range(count)])


@cache
def bitsandbytes_fp4() -> DataType:
    """FP4 as bitsandbytes has it, divided by its largest level: E2M1 but for a smallest number 1/16 as large.

    Its patterns e, m stand for (1 + m/2)·2^(4−e), and with e = 0 for m/16: 0, 1/16, 2, 3, 4, 6, 8, 12, over 12. E2M1's
    0, ½, 1, 1½, 2, 3, 4, 6, over 6, are the same but for ½ : 6 = 0.0833, which is 0.0052 here, so that the range
    between 0 and 1/6 is all but empty. That costs: see `engine.quantization.distortion`.

    Zero has two codes, both of them used, as on bitsandbytes' CPU path: numbers from just below zero up to it get
    0000, those just above it 1000. On CUDA it is 1000 for negative ones. Halfway goes down, as on the CPU; CUDA rounds
    magnitudes, so that there a negative number halfway goes towards zero. The values of either zero are the same.

    Source: `get_4bit_type` and `create_fp8_map` of bitsandbytes 0.50.
    """
    magnitudes = torch.tensor([m / 16 if e == 0 else (1 + m / 2) * 2.0 ** (4 - e) for e in range(4) for m in range(2)])
    levels = torch.cat([magnitudes, -magnitudes]) / magnitudes.max()  # (16,) by pattern
    order = torch.argsort(levels, stable=True)  # 0000 before 1000
    return DataType("fp4-bnb", 4, levels[order], order.to(torch.uint8), ties="down")


@cache
def dynamic_8bit() -> DataType:
    """A sign, a tenth's power and as many bits of fraction as are left: 256 levels from 5.5·10⁻⁷ to 1, and 0.

    Of the seven bits after the sign, z zeros and a one say the power 10⁻ᶻ, the rest is a fraction between 0.1 and 1.
    It is what bitsandbytes keeps block scales and 8-bit optimizer state in. Halfway goes to the even place, as in its
    CUDA kernel; its CPU kernel finds the place by a faster search that misses the nearest level for 0.15 % of normal
    numbers.

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", https://arxiv.org/abs/2110.02861.
    """
    positive = []
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        positive.append(10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2)
    magnitudes = torch.cat(positive)  # (127,) rising
    codebook = torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes, torch.ones(1)])
    return DataType("dynamic8", 8, codebook, _counted(codebook))


_BUILDERS: dict[str, Callable[[], DataType]] = {
    **{f"int{bits}": (lambda bits=bits: integer(bits)) for bits in range(MIN_BITS, MAX_BITS + 1)},
    **{f"uint{bits}": (lambda bits=bits: integer(bits, symmetric=False)) for bits in range(MIN_BITS, MAX_BITS + 1)},
    **{f"nf{bits}": (lambda bits=bits: normal_float(bits)) for bits in range(MIN_BITS, MAX_BITS + 1)},
    "fp4-e2m1": lambda: floating_point(2, 1),
    "fp4-bnb": bitsandbytes_fp4,
    "fp8-e4m3": lambda: floating_point(4, 3, "nan"),
    "fp8-e5m2": lambda: floating_point(5, 2, "inf and nan"),
    "dynamic8": dynamic_8bit,
}

DATA_TYPE_NAMES = tuple(_BUILDERS)
"""What `data_type` knows: symmetric (int) and asymmetric (uint) integers, NormalFloat, floating point."""


def data_type(name: str) -> DataType:
    """The data type called `name`, one of `DATA_TYPE_NAMES`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _BUILDERS:
        raise InputError(
            f"There is no data type {name!r}: choose one of {', '.join(DATA_TYPE_NAMES)}; a weight needs at least "
            f"{MIN_BITS} bits, one for its sign and one for its size."
        )
    return _BUILDERS[name]()


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(
            f"bits is {bits}: give {MIN_BITS} to {MAX_BITS}; one bit is a sign without a size, and more than "
            "eight are a 16-bit format."
        )


def _counted(codebook: Tensor) -> Tensor:
    return torch.arange(len(codebook), dtype=torch.uint8)


def _signed(name: str, bits: int, magnitudes: list[float]) -> DataType:
    """A sign bit before the patterns of rising `magnitudes`, whose first is 0."""
    positive = torch.tensor(magnitudes)
    patterns = torch.arange(len(positive), dtype=torch.uint8)
    negative = slice(1, None)  # −0 is left out
    codebook = torch.cat([-positive[negative].flip(0), positive])
    coded = torch.cat([(patterns[negative] + 2 ** (bits - 1)).flip(0), patterns])
    return DataType(name, bits, codebook, coded, even_from=len(positive) - 1)
