"""What the experiments of the FlashAttention lab share: the knobs of a shape, of a sweep over lengths, and words.

Needs no torch.

Legend: B batch, H heads, T tokens, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from engine.experiments import ExperimentParams

BackendName = Literal[
    "standard",
    "torch-math",
    "torch-flash",
    "torch-efficient",
    "torch-cudnn",
    "flex",
    "flash-attn-2",
    "flash-attn-3",
    "flash-attn-4",
    "triton",
]
"""The keys of `engine.flash.backends.BACKENDS`, for a process without torch."""

Dtype = Literal["float32", "bfloat16", "float16"]
Direction = Literal["forward", "backward", "forward and backward"]
Tokens = Literal["fixed batch", "constant tokens"]

BACKENDS: tuple[BackendName, ...] = BackendName.__args__
ELEMENT_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

GB = 1e9
RUNS_WORDS = (
    "Timed runs of a processor: their median is drawn, and their spread. A GPU is timed for 10 ms for each of them, "
    "and three times at least."
)
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

MIN_LENGTH = 128
MAX_LENGTH = 2**16


class ShapeParams(ExperimentParams):
    """One shape of attention."""

    head_dim: int = Field(
        64,
        ge=16,
        le=256,
        multiple_of=8,
        title="Head width",
        description="Numbers in each query, key and value of a head (d). Most kernels are made for 64 and 128.",
    )
    heads: int = Field(4, ge=1, le=64, title="Heads", description="Heads that are computed side by side.")
    batch: int = Field(1, ge=1, le=64, title="Batch", description="Sequences that are computed at once.")
    dtype: Dtype = Field(
        "float32",
        title="Number format",
        description="Of queries, keys and values. On a GPU most flash kernels take 16 bits only; on a processor "
        "float32 is usually the fastest.",
    )
    causal: bool = Field(
        True, title="Causal mask", description="A token sees itself and what comes before it: half of the work."
    )

    @property
    def element_bytes(self) -> int:
        """Bytes of one number."""
        return ELEMENT_BYTES[self.dtype]


class SweepParams(ShapeParams):
    """The same shape at one length after the other, by several backends.

    The runs check themselves what fits, as they can say what would: `_flash_cost.check_fits`, and a `Stop` for each
    line that ends early.
    """

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 1800.0
    stop_grace: ClassVar[float] = 120.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    max_length: int = Field(
        2048,
        ge=256,
        le=MAX_LENGTH,
        title="Longest sequence",
        description=f"Tokens. Lengths double from {MIN_LENGTH} up to this one.",
    )
    tokens: Tokens = Field(
        "fixed batch",
        title="As sequences grow",
        description="The batch stays as it is, or it shrinks so that batch × length stays the same: then "
        "batch counts sequences of the longest length.",
    )
    direction: Direction = Field(
        "forward",
        title="Direction",
        description="The pass that computes the output, the pass that computes gradients, or both.",
    )
    backends: tuple[BackendName, ...] = Field(
        BACKENDS,
        min_length=1,
        max_length=len(BACKENDS),
        title="Backends",
        description="Implementations to measure. What does not exist here is left out, and the reason is given.",
    )
    runs: int = Field(5, ge=3, le=50, title="Runs a point", description=RUNS_WORDS)

    @field_validator("max_length")
    @classmethod
    def _doubles(cls, length: int) -> int:
        if length & (length - 1):
            below = 1 << (length.bit_length() - 1)
            raise ValueError(
                f"The longest sequence is {length:,} tokens, and lengths double from {MIN_LENGTH}: choose {below:,} "
                f"or {min(2 * below, MAX_LENGTH):,}."
            )
        return length

    @property
    def lengths(self) -> tuple[int, ...]:
        """128, 256, … up to the longest."""
        return tuple(MIN_LENGTH << step for step in range((self.max_length // MIN_LENGTH).bit_length()))

    @property
    def grad(self) -> bool:
        """Whether gradients are wanted."""
        return self.direction != "forward"

    def batch_at(self, length: int) -> int:
        """Sequences at this length."""
        return self.batch if self.tokens == "fixed batch" else self.batch * self.max_length // length


@dataclass(frozen=True)
class Peaks:
    """What the device can do, measured on it.

    Args:
        flops: FLOP/s of a large matrix product in this number format.
        bandwidth: bytes/s of a large copy, reads and writes counted.
        evidence: how each is known, a line each.
    """

    flops: float
    bandwidth: float
    evidence: tuple[str, ...]

    @property
    def ridge(self) -> float:
        """FLOP a byte from which on the product's speed is the limit, and no longer memory."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class Stop:
    """Where a backend's line ends.

    Args:
        backend, label: which, and what it is called.
        length: T at which it ends; nothing was run there unless `kind` is ``"failed"``.
        kind: ``"memory"`` (it would not fit, so it was not tried), ``"time"`` (it would take too long), ``"cannot"``
            (the backend does not take this shape), or ``"failed"`` (it was tried and raised).
        reason: in a sentence.
        needed_bytes: predicted peak; 0 where memory is not the reason.
        free_bytes: what was free when that was asked; 0 where memory is not the reason.
    """

    backend: str
    label: str
    length: int
    kind: Literal["memory", "time", "cannot", "failed"]
    reason: str
    needed_bytes: int = 0
    free_bytes: int = 0


def why_above_peak(dtype: Dtype, *, on_gpu: bool) -> str:
    """How a kernel can be faster than the large product that stands for the device's peak."""
    if on_gpu and dtype == "float32":
        return "as kernels may put float32 together from products on tensor cores, which the large product leaves alone"
    return "so other work held that product up when it was measured: measure again, the best product counts"


def bytes_in_words(nbytes: float) -> str:
    """E.g. ``"5.2 MiB"``, ``"1,020 MiB"``, ``"1.3 GiB"``."""
    unit = min(3, int(math.log2(max(nbytes, 1)) // 10))
    if unit < 3 and round(nbytes / 1024**unit) == 1024:
        unit += 1
    value = nbytes / 1024**unit
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{number} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"


def number_in_words(value: float) -> str:
    """Two digits of a number, e.g. ``"0.25"``, ``"2.3 × 10⁻⁴"``."""
    rounded = float(f"{value:.2g}")
    if rounded == 0 or abs(rounded) >= 1e-3:
        return f"{rounded:.3g}".replace("-", "−")
    mantissa, power = f"{rounded:.1e}".split("e")
    return f"{float(mantissa):g} × 10{str(int(power)).translate(_RAISED)}".replace("-", "−")
