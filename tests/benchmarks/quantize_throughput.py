"""How fast weights become 4-bit codes and weights again: our kernels, bitsandbytes', and a copy as the ceiling.

    python -m tests.benchmarks.quantize_throughput [--device cuda] [--small] [--tune] [--types nf4 …] [--json FILE]

Blocks of 64. GB/s are those of the bytes that have to move, the same for everyone and in both directions: N weights of
their dtype, N / 2 bytes of codes and 4 bytes of scale a block, read or written once; the copy's are its reads and
writes. `quantize()` is the public function, which besides waits for the kernel's word that every weight is finite. On a
CPU it is the reference implementation, and the kernels have no rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bitsandbytes import functional
from torch import Tensor

from engine.measure import Evidence, device_name, measure_time
from engine.quantization.grouping import per_block
from engine.quantization.tensor import kernels_for, quantize

BLOCK_SIZE = 64
SHAPES = ((4096, 4096), (16384, 8192))
SMALL_SHAPES = ((64, 128),)
DTYPES = (torch.bfloat16, torch.float32)
THEIR_NAMES = {"nf4": "nf4", "fp4-bnb": "fp4"}
TUNED = tuple((weights, warps) for weights in (1024, 2048, 4096, 8192) for warps in (2, 4, 8))


@dataclass(frozen=True)
class Case:
    """What is quantized.

    Args:
        shape: of the weights.
        dtype: of the weights.
        name: of the data type.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    name: str

    def __str__(self) -> str:
        return f"{' × '.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} {self.name}"

    def weights(self, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return (0.02 * torch.randn(self.shape, generator=generator, device=device)).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """What quantizing or dequantizing has to move."""
        count = self.shape[0] * self.shape[1]
        return count * self.dtype.itemsize + count // 2 + 4 * (-(-count // BLOCK_SIZE))


@dataclass(frozen=True)
class Figure:
    """What one way of doing one thing took, or how it failed.

    Args:
        case: in words.
        row: who does what.
        nbytes: that had to move.
        gb_per_s: at the median time.
        evidence: of the time.
        error: the exception's text.
    """

    case: str
    row: str
    nbytes: int
    gb_per_s: float | None = None
    evidence: Evidence | None = None
    error: str | None = None


def rows(case: Case, w: Tensor) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, bytes, and what to time."""
    target = torch.empty_like(w)
    yield "copy", 2 * w.nbytes, lambda: target.copy_(w)
    theirs, state = functional.quantize_4bit(w, blocksize=BLOCK_SIZE, quant_type=THEIR_NAMES[case.name])

    def quantize_theirs() -> object:
        return functional.quantize_4bit(w, blocksize=BLOCK_SIZE, quant_type=THEIR_NAMES[case.name])

    yield "quantize, bitsandbytes", case.nbytes, quantize_theirs
    yield "quantize, quantize()", case.nbytes, lambda: quantize(w, case.name, per_block(BLOCK_SIZE))
    if kernels := kernels_for(w):
        yield "quantize, kernel", case.nbytes, lambda: kernels.quantize_blocks(w, case.name, BLOCK_SIZE)
    yield "dequantize, bitsandbytes", case.nbytes, lambda: functional.dequantize_4bit(theirs, state)
    ours = quantize(w, case.name, per_block(BLOCK_SIZE))
    yield "dequantize, dequantize()", case.nbytes, ours.dequantize
    nested = quantize(w, case.name, per_block(BLOCK_SIZE), double_quantization=True)
    yield "dequantize, double quantization", case.nbytes, nested.dequantize
    double, double_state = functional.quantize_4bit(
        w, blocksize=BLOCK_SIZE, quant_type=THEIR_NAMES[case.name], compress_statistics=True
    )
    name = "dequantize, double quantization, bitsandbytes"
    yield name, case.nbytes, lambda: functional.dequantize_4bit(double, double_state)


def tuned_rows(case: Case, w: Tensor) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """The kernels under every launch of `TUNED`."""
    kernels = kernels_for(w)
    if kernels is None:
        return
    payload, absmax = kernels.quantize_blocks(w, case.name, BLOCK_SIZE)
    levels = functional.get_4bit_type(THEIR_NAMES[case.name], device=w.device)
    for weights, warps in TUNED:
        launch = kernels.Launch(weights, warps)

        def encode(launch: tuple = launch) -> object:
            return kernels.quantize_blocks(w, case.name, BLOCK_SIZE, launch=launch)

        def decode(launch: tuple = launch) -> object:
            return kernels.dequantize_blocks(payload, absmax, levels, BLOCK_SIZE, w.shape, w.dtype, launch)

        yield f"quantize, {weights} weights, {warps} warps", case.nbytes, encode
        yield f"dequantize, {weights} weights, {warps} warps", case.nbytes, decode


def measure(case: Case, device: str, tune: bool) -> list[Figure]:
    """Time every row, printing each; a row that fails says so, and the next is tried."""
    w = case.weights(device)
    found, waiting = [], (tuned_rows if tune else rows)(case, w)
    while True:
        row, nbytes = "what the other rows need", case.nbytes
        try:
            row, nbytes, function = next(waiting)
            function()
            evidence = measure_time(function, device, dtype=case.dtype, shape=str(case))
            figure = Figure(str(case), row, nbytes, nbytes / evidence.median_ms / 1e6, evidence)
        except StopIteration:
            return found
        except Exception as error:
            figure = Figure(str(case), row, nbytes, error=f"{type(error).__name__}: {error}")
        found.append(figure)
        print(described(figure), flush=True)


def described(figure: Figure) -> str:
    if figure.evidence is None:
        return f"{figure.case:<34}{figure.row:<48}failed: {figure.error}"
    time = figure.evidence
    return (
        f"{figure.case:<34}{figure.row:<48}{figure.nbytes / 1e6:>9.1f} MB{time.median_ms:>10.4f} ms"
        f"{time.low_ms:>10.4f} – {time.high_ms:<9.4f}{figure.gb_per_s:>8.0f} GB/s"
    )


def differing(case: Case, device: str) -> int:
    """Codes of `quantize()` that are not bitsandbytes'; two a byte."""
    w = case.weights(device)
    theirs, state = functional.quantize_4bit(w, blocksize=BLOCK_SIZE, quant_type=THEIR_NAMES[case.name])
    ours = quantize(w, case.name, per_block(BLOCK_SIZE))
    if not torch.equal(ours.scales, state.absmax):
        print(f"{case}: the scales differ")
    bytes_apart = ours.payload ^ theirs.flatten()
    return int(((bytes_apart & 15) != 0).sum() + ((bytes_apart >> 4) != 0).sum())


def main() -> int:
    """Measure, print the table, write the record; 1 if a row failed or a code differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one tiny matrix, to see that everything runs")
    parser.add_argument("--tune", action="store_true", help="compare ways to launch the kernels instead")
    parser.add_argument("--types", nargs="*", choices=list(THEIR_NAMES), default=["nf4"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    versions = {}
    for name in ("torch", "triton", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    print(" · ".join(f"{name} {version}" for name, version in versions.items()), "·", device_name(device))
    figures, codes = [], {}
    for name in arguments.types:
        for shape in SMALL_SHAPES if arguments.small else SHAPES:
            for dtype in DTYPES:
                case = Case(shape, dtype, name)
                figures += measure(case, device, arguments.tune)
                codes[str(case)] = differing(case, device)
                print(f"{case}: {codes[str(case)]} differing codes\n", flush=True)
    if arguments.json:
        record = {"versions": versions, "differing_codes": codes, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return int(any(figure.error for figure in figures) or any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
