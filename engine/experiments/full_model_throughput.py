"""Latency and throughput against batch and length: a prompt is read at once, what follows token by token.

Legend: B batch, T tokens of a text, L layers, G key/value heads, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from engine.experiments._ending import Ending, stopped
from engine.experiments._full_model import SwitchParams
from engine.experiments._full_model_runs import overlap

if TYPE_CHECKING:
    from engine.measure import Evidence
    from engine.model import Decoder
    from engine.runtime.jobs import Job

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


class Params(SwitchParams):
    """A model, the largest batch and the longest text."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 3600.0  # on a GPU FlashAttention may take a minute to choose, for each prompt's size
    stop_grace: ClassVar[float] = 120.0
    cacheable: ClassVar[bool] = False
    returns_partial: ClassVar[bool] = True

    runs: int = Field(7, ge=3, le=50, title="Runs a point", description="Timed on the CPU; a GPU takes as many as fit.")

    @property
    def batches(self) -> tuple[int, ...]:
        """1, 2, 4, … and the batch that is set."""
        return (*(1 << power for power in range((self.batch_size - 1).bit_length())), self.batch_size)

    @property
    def lengths(self) -> tuple[int, ...]:
        """A quarter, half and all of the length that is set."""
        return self.length // 4, self.length // 2, self.length

    def memory_bytes(self) -> int:
        """The weights, and the largest prompt as it is read.

            4·(P + B·T·(2·L·G·d + 6 D + 5 F + 2 H·T + 4 E·R) + 2·B·V)

        Keys and values of all layers, and what the layer that is computed has of each token, its heads' weights among
        it if all of them are held.
        """
        config = self.architecture()
        weights = 0 if config.use_flashattention else 2 * config.num_heads * self.length
        cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        token = cache + 6 * config.d_model + 5 * config.ffn_dim + weights
        token += 4 * config.num_experts * config.lora_rank * config.use_moe
        whole = config.num_parameters * (2 if self.begin == "storyteller" else 1)
        return 4 * (whole + self.batch_size * (self.length * token + 2 * config.vocab_size))


@dataclass(frozen=True)
class Point:
    """One phase at one batch and length.

    Args:
        phase: "prefill" reads B prompts of T tokens and gives the next token's logits; "decode" reads one more token
            of each text, the T-th.
        batch, length: B and T.
        median_ms, low_ms, high_ms: median, 10th and 90th percentile.
        runs: that were timed.
        tokens_per_second: of the whole batch, by the median: B·T or B tokens a run.
    """

    phase: Phase
    batch: int
    length: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    tokens_per_second: float

    @property
    def spread_ms(self) -> tuple[float, float]:
        """From its low to its high end."""
        return self.low_ms, self.high_ms

    @property
    def spread_of_speed(self) -> tuple[float, float]:
        """The same in tokens a second."""
        tokens = self.tokens_per_second * self.median_ms
        return tokens / self.high_ms, tokens / self.low_ms


@dataclass(frozen=True)
class Result:
    """The points so far.

    Args:
        points: in the order in which they were measured: by length, batch and phase.
        total: how many there are to be.
        sentence: what they show.
        evidence: how it was measured, a line each.
        ended, ending: whether all are there, and why not.
        device: its name.
        versions: of what took part.
    """

    points: tuple[Point, ...]
    total: int
    sentence: str
    evidence: tuple[str, ...]
    ended: Ending
    ending: str
    device: str
    versions: dict[str, str]


def run(params: Params, job: Job) -> Result:
    """Time every batch at every length, in both phases, until the last or a cancellation."""
    import torch

    from engine import llama, pretrained
    from engine.full_model import create_optimized_model, optimize
    from engine.measure import device_name, versions

    torch.manual_seed(params.seed)
    config = params.architecture()
    if params.begin == "fresh":
        model = create_optimized_model(config).to(job.device)
    else:
        model = optimize(llama.from_transformers(pretrained.load("storyteller").model), config).to(job.device)
    where, software = device_name(job.device), versions()
    cases = [(length, batch, phase) for length in params.lengths for batch in params.batches for phase in PHASES]
    points: list[Point] = []

    def result(ended: Ending, ending: str) -> Result:
        return Result(
            points=tuple(points),
            total=len(cases),
            sentence=describe_points(points),
            evidence=_evidence(params, points),
            ended=ended,
            ending=ending,
            device=where,
            versions=software,
        )

    for length, batch, phase in cases:
        if job.cancelled:
            ended, words = stopped(params, job)
            return result(ended, f"{words} after {len(points)} of {len(cases)} points, which are shown.")
        measured = _measure(model, phase, batch, length, params, job.device)
        tokens = batch * (length if phase == "prefill" else 1)
        times = measured.median_ms, measured.low_ms, measured.high_ms
        points.append(Point(phase, batch, length, *times, measured.runs, 1e3 * tokens / measured.median_ms))
        job.report(len(points), len(cases), tokens=length, batch=batch)
        job.show(lambda: result("running", f"{len(points)} of {len(cases)} points so far."))
    return result("finished", f"All {len(cases)} points are there.")


def _measure(model: Decoder, phase: Phase, batch: int, length: int, params: Params, device: str) -> Evidence:
    import torch

    from engine.experiments._on_workers.full_model_throughput import continuing, reading
    from engine.experiments._on_workers.full_model_training import settle_attention
    from engine.measure import measure_time
    from engine.model import evaluating

    config = model.config
    if params.flash and phase == "prefill":  # a single query is never measured
        settle_attention(device, batch, length, config.num_heads, config.num_kv_heads, config.head_dim, grad=False)
    generator = torch.Generator().manual_seed(params.seed)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)
    with evaluating(model):
        step = reading(model, ids) if phase == "prefill" else continuing(model, ids)
        return measure_time(
            step, device, dtype=torch.float32, shape=f"{phase}, {batch} × {length} tokens", runs=params.runs
        )


def _evidence(params: Params, points: Sequence[Point]) -> tuple[str, ...]:
    runs = f"{min(point.runs for point in points)} runs or more a point" if points else "no point yet"
    lines = [
        f"{runs}, each point alone on the device, one after the other: median, 10th and 90th percentile, interpolated "
        "where runs are few; float32, random tokens",
        "prefill: prompts of T tokens are read at once into a fresh cache of keys and values; decode: the T-th token "
        "of every text is read with the others in the cache",
    ]
    if params.flash:
        lines.append("FlashAttention chooses its kernel for a prompt by measuring, before the point is timed")
    return tuple(lines)


def describe_points(points: Sequence[Point]) -> str:
    """What a larger batch does to a token's latency and to the throughput, and what length does."""
    decode = [point for point in points if point.phase == "decode"]
    if not decode:
        return "The first points are not there yet."
    longest = max(point.length for point in decode)
    row = sorted((point for point in decode if point.length == longest), key=lambda point: point.batch)
    one, most = row[0], row[-1]
    said = [f"With {longest} tokens a text, one token more takes {_time(one)} for {_texts(one.batch)}."]
    if most is not one:
        said[0] = f"{said[0][:-1]} and {_time(most)} for {most.batch} at once{_gain(one, most)}"
    shortest = min(point.length for point in decode)
    other = next((point for point in decode if (point.length, point.batch) == (shortest, most.batch)), None)
    if other is not None and shortest < longest:
        if overlap(other.spread_ms, most.spread_ms):
            said.append(f"Whether {shortest} or {longest} tokens are in the cache cannot be told from these times.")
        else:
            doubt = ", though less is read: other work held up one of them" if other.median_ms > most.median_ms else ""
            said.append(f"With {shortest} tokens in the cache it is {_time(other)}{doubt}.")
    read, written = (
        max((point for point in points if point.phase == phase), key=lambda point: point.tokens_per_second)
        for phase in PHASES
    )
    said.append(
        f"Reading prompts reaches {read.tokens_per_second:,.0f} tokens/s at {read.batch} × {read.length}, "
        + (
            "which cannot be told from writing at its best."
            if overlap(read.spread_of_speed, written.spread_of_speed)
            else f"{read.tokens_per_second / written.tokens_per_second:.1f} times as many as writing at its best."
        )
    )
    return " ".join(said)


def _time(point: Point) -> str:
    return f"{point.median_ms:.3g} ms ({point.low_ms:.3g} to {point.high_ms:.3g})"


def _gain(one: Point, most: Point) -> str:
    """The end of a sentence: what more texts at once do to the wait and to the throughput, if it can be told."""
    wait, speed = most.median_ms / one.median_ms, most.tokens_per_second / one.tokens_per_second
    waits, speeds = overlap(one.spread_ms, most.spread_ms), overlap(one.spread_of_speed, most.spread_of_speed)
    if waits and speeds:
        return "; neither these times nor the tokens a second can be told apart."
    told = [
        "times that cannot be told apart" if waits else f"{wait:.1f} times the wait",
        "tokens a second that cannot be told apart"
        if speeds
        else f"{speed:.1f} times the tokens a second, {most.tokens_per_second:,.0f}",
    ]
    return f": {', '.join(told)}."


def _texts(count: int) -> str:
    return "one text" if count == 1 else f"{count} texts"
