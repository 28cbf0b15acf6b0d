"""What a mixture of experts costs beside the dense layers of equal parameters and of equal work, counted and measured.

Legend: N tokens, E experts, K chosen for a token, D model width, F feed-forward width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field, model_validator

from engine.experiments import ExperimentParams, _router
from engine.experiments._ending import Ending, stopped
from engine.moe.cost import Cost, dense, dense_width, mixture, training_flops

if TYPE_CHECKING:
    from torch import nn

    from engine.measure import Ceilings
    from engine.runtime.jobs import Job

Layer = Literal["mixture", "equal parameters", "equal work"]
LABELS: dict[Layer, str] = {
    "mixture": "Mixture of experts",
    "equal parameters": "Dense, equal parameters",
    "equal work": "Dense, equal FLOPs a token",
}

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_FEWEST_TOKENS = 16
_DOUBLINGS = 5


class Params(ExperimentParams):
    """A layer and how far to go with tokens and experts."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 300.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    d_model: int = Field(
        256, ge=32, le=4096, multiple_of=32, title="Width", description="Numbers that stand for a token."
    )
    ffn_dim: int = Field(
        256, ge=32, le=8192, multiple_of=32, title="Width of an expert", description="Inner width of each expert."
    )
    experts: int = Field(8, ge=1, le=64, title="Experts", description="While tokens grow.")
    top_k: int = Field(2, ge=1, le=64, title="Experts a token (K)", description="How many of them compute each token.")
    tokens: int = Field(
        1024, ge=16, le=65_536, title="Most tokens", description="They grow up to this; as many while experts grow."
    )
    most_experts: int = Field(32, ge=1, le=128, title="Most experts", description="They grow up to this.")
    direction: Literal["forward", "forward and backward"] = Field(
        "forward", title="Direction", description="Forward is what answering takes; training takes both."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", title="Number format", description="Of weights and tokens. bfloat16 is made for GPUs."
    )
    runs: int = Field(5, ge=3, le=50, title="Runs", description="Timed runs of each point; their median is drawn.")
    seed: int = Field(0, ge=0, le=9999, title="Seed", description="Of weights and tokens.")

    @model_validator(mode="after")
    def _enough_experts(self) -> Params:
        _router.check_top_k(self.top_k, self.experts)
        if self.most_experts < self.experts:
            raise ValueError(
                f"Most experts is {self.most_experts}, fewer than the {self.experts} experts: choose "
                f"{self.experts} or more."
            )
        return self

    def sizes(self) -> Iterator[Size]:
        """What is to be measured: all three layers at one size, then at the next."""
        tokens = [self.tokens >> shift for shift in range(_DOUBLINGS, -1, -1) if self.tokens >> shift >= _FEWEST_TOKENS]
        experts = [self.top_k]
        while 2 * experts[-1] <= self.most_experts:
            experts.append(2 * experts[-1])
        for axis, pairs in (
            ("tokens", [(count, self.experts) for count in tokens]),
            ("experts", [(self.tokens, count) for count in experts]),
        ):
            yield from (Size(axis, layer, *pair) for pair in pairs for layer in LABELS)

    def dense_dim(self, size: Size) -> int:
        """Inner width of a dense layer that equals the mixture of this size."""
        equal = "parameters" if size.layer == "equal parameters" else "FLOPs"
        return dense_width(self.ffn_dim, size.experts, self.top_k, equal)

    def cost(self, size: Size) -> Cost:
        """Of the forward pass of one layer."""
        sizes = {"element_bytes": _ELEMENT_BYTES[self.dtype]}
        if size.layer == "mixture":
            return mixture(size.tokens, self.d_model, self.ffn_dim, size.experts, self.top_k, **sizes)
        return dense(size.tokens, self.d_model, self.dense_dim(size), **sizes)

    def memory_bytes(self) -> int:
        """Weights of the largest layer, twice with their gradients, and what is read and written between its steps."""
        costs = [self.cost(size) for size in self.sizes()]
        copies = 1 if self.direction == "forward" else 2
        return max(
            _ELEMENT_BYTES[self.dtype] * copies * cost.parameters + copies * cost.activation_bytes for cost in costs
        )


class Size(NamedTuple):
    """What one point measures: along which axis it lies, which layer, N and E."""

    axis: Literal["tokens", "experts"]
    layer: Layer
    tokens: int
    experts: int


@dataclass(frozen=True)
class Point:
    """One layer at one size.

    Args:
        axis: along which this point lies: tokens grow, or experts do.
        layer: which of the three.
        tokens, experts: N and E of the mixture that it is compared with.
        parameters: of the layer.
        flops: of this direction, for all tokens.
        nbytes: moved by this direction if nothing stays in caches: weights that have tokens, and what goes in and out
            of each step.
        median_ms, low_ms, high_ms: of the timed runs: median, 10th and 90th percentile.
        runs: how many were timed.
        predicted_ms: by the device's measured peaks: the longer of computing and moving bytes. Caches can
            beat the bytes.
        tflops: 10¹² FLOP/s reached.
    """

    axis: Literal["tokens", "experts"]
    layer: Layer
    tokens: int
    experts: int
    parameters: int
    flops: int
    nbytes: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    predicted_ms: float
    tflops: float


@dataclass(frozen=True)
class Result:
    """The points so far.

    Args:
        points: in the order in which they were measured.
        total: points that there are to be.
        peak_flops: FLOP/s of a large product here, measured.
        bandwidth: bytes/s of a large copy here, measured.
        evidence: how it was measured, a line each.
        ended, ending: whether all points are there, and why not.
        sentence: what the points show.
        device: its name.
        versions: of what took part.
    """

    points: tuple[Point, ...]
    total: int
    peak_flops: float
    bandwidth: float
    evidence: tuple[str, ...]
    ended: Ending
    ending: str
    sentence: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Measure the three layers while tokens double, then while experts do; a cancellation keeps what is there."""
    import torch

    from engine.measure import ceilings, device_name, versions

    dtype = getattr(torch, params.dtype)
    peaks = ceilings(job.device, dtype)
    where, software = device_name(job.device), versions()
    sizes = list(params.sizes())
    points: list[Point] = []
    evidence = (
        f"peak: {peaks.product.shape}, {peaks.product.low_ms:.3g} ms; {peaks.copy.shape}, {peaks.copy.low_ms:.3g} ms",
        f"a point: median of {params.runs} runs after {peaks.product.warmup} that do not count",
    )

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            points=tuple(points),
            total=len(sizes),
            peak_flops=peaks.flops,
            bandwidth=peaks.bandwidth,
            evidence=evidence,
            ended=ended,
            ending=ending,
            sentence=describe_points(tuple(points), params),
            device=where,
            versions=software,
        )

    job.report(0, len(sizes))
    for size in sizes:
        if job.cancelled:
            ended, words = stopped(params, job)
            return result(ended, f"{words} after {len(points)} of {len(sizes)} points, which are shown.")
        points.append(_measure(params, size, peaks, job.device))
        job.report(len(points), len(sizes), tokens=size.tokens, experts=size.experts, ms=points[-1].median_ms)
        job.show(lambda: result("running", f"{len(points)} of {len(sizes)} points so far."))
    return result("finished", f"All {len(sizes)} points are there.")


def _measure(params: Params, size: Size, peaks: Ceilings, device: str) -> Point:
    """Time one layer; the weights are drawn anew for each point and freed after it."""
    import torch

    from engine.measure import measure_time

    dtype = getattr(torch, params.dtype)
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(params.seed)
        layer = _make(params, size).to(device, dtype)
        x = torch.randn(size.tokens, params.d_model, device=device).to(dtype).requires_grad_()
        upstream = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), upstream, allow_unused=True)

    cost = params.cost(size)
    passes = training_flops(1, "forward" if params.direction == "forward" else "both")
    evidence = measure_time(
        forward if params.direction == "forward" else both,
        device,
        dtype=dtype,
        shape=f"{LABELS[size.layer]}, {size.tokens} tokens, {size.experts} experts",
        runs=params.runs,
    )
    flops, nbytes = passes * cost.flops, passes * cost.bytes
    return Point(
        axis=size.axis,
        layer=size.layer,
        tokens=size.tokens,
        experts=size.experts,
        parameters=cost.parameters,
        flops=flops,
        nbytes=nbytes,
        median_ms=evidence.median_ms,
        low_ms=evidence.low_ms,
        high_ms=evidence.high_ms,
        runs=evidence.runs,
        predicted_ms=passes * cost.milliseconds(peaks.flops, peaks.bandwidth),
        tflops=flops / evidence.median_ms / 1e9,
    )


def _make(params: Params, size: Size) -> nn.Module:
    from engine.model import SwiGLU
    from engine.moe.feed_forward import MoEFeedForward

    if size.layer == "mixture":
        return MoEFeedForward(params.d_model, params.ffn_dim, size.experts, params.top_k)
    return SwiGLU(params.d_model, params.dense_dim(size))


def describe_points(points: tuple[Point, ...], params: Params) -> str:
    """The mixture beside both dense layers where most tokens are, as measured and by arithmetic alone.

    Args:
        points: as `Result`'s.
        params: of the run.
    """
    along = [point for point in points if point.axis == "tokens"]
    complete = [size for size in {point.tokens for point in along} if sum(point.tokens == size for point in along) == 3]
    if not complete:
        return ""
    tokens = max(complete)
    row = {point.layer: point for point in along if point.tokens == tokens}
    mixture = row["mixture"]
    said = [
        f"At {tokens:,} token{'' if tokens == 1 else 's'} the mixture of {params.experts} "
        f"expert{'' if params.experts == 1 else 's'} takes {_time(mixture)}."
    ]
    for name, words in (("equal parameters", "as many parameters"), ("equal work", "as many FLOPs a token")):
        said.append(_compare(mixture, row[name], words))
    return " ".join(said)


class Spread(Protocol):
    """A time that was measured several times: the 10th and the 90th percentile, in ms."""

    low_ms: float
    high_ms: float


def overlap(one: Spread, other: Spread) -> bool:
    """Whether two spreads touch: then their runs show no difference."""
    return one.low_ms <= other.high_ms and other.low_ms <= one.high_ms


def _compare(mixture: Point, dense: Point, words: str) -> str:
    ratio = dense.median_ms / mixture.median_ms
    said = f"The dense layer of {words} takes {_time(dense)}"
    if overlap(mixture, dense):
        said += ": the spreads overlap, so these runs show no difference"
    else:
        said += f", {ratio:.2g} times as long" if ratio >= 1 else f", the mixture {1 / ratio:.2g} times as long"
    work = f"{dense.flops / mixture.flops:.2g}"
    return f"{said}; the dense layer computes {'as much' if work == '1' else f'{work} times as much'}."


def _time(point: Point) -> str:
    """The median with its 10th and its 90th percentile."""
    return f"{point.median_ms:.3g} ms ({point.low_ms:.3g} to {point.high_ms:.3g})"
