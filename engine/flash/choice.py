"""The fastest correct backend, found by measuring once and remembered for as long as the process lives.

No backend is the fastest everywhere, and some take seconds to start. So a kind of call begins with a kernel that takes
no start, and once it has come often enough every backend that takes it is tried on the very tensors of that call: as
compilers do that interpret first and compile what turns out to be called often. What only helps is never an error: if
measuring fails, or the device is being measured already, the call is computed by the kernel that takes no start.

Correct is what errs at most twice as much as standard attention in the same dtype, both against a higher precision, one
rounding of the result beside it: the rule by which FlashAttention's own tests judge it.

Legend: B batch, H query heads, G key/value heads, Tq queries, Tk keys, d head width.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine import memory
from engine.errors import InputError
from engine.flash.backends import BACKENDS, HALF_PRECISION, Backend, Case, standard_attention
from engine.flash.traffic import held_matrices
from engine.measure import Evidence, exclusive, is_held, measure_time

STARTERS = ("torch-flash", "torch-efficient", "torch-math", "standard")
"""Without a cold start, the fastest first."""

CALLS_BEFORE_PLANNING = 32
"""Calls of one exact shape before it is worth a backend's plan for it; batches of any length come and go."""

CALLS_AFTER_A_FAILURE = 10_000
"""Calls of a kind that its starter serves once measuring has failed, before it is tried again."""

LONGEST_WAIT = 5.0
"""Seconds for which a call waits until other measurements are over."""

CLOSE, REMATCHES = 1.15, 3
"""Backends up to this many times as slow as the fastest are timed so many times more; the median counts."""

SCORES_AT_ONCE = 2**26

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Errors:
    """How far an output and its gradients are from the reference.

    Args:
        forward: root mean square difference of the outputs, relative to the reference's own root mean square.
        forward_max: largest difference, relative to the largest of the reference.
        backward: as `forward`, of the gradients of Q, K and V, the worst of the three; None where none are asked for.
        backward_max: as `forward_max`, likewise.
    """

    forward: float
    forward_max: float
    backward: float | None = None
    backward_max: float | None = None

    def within(self, baseline: Errors, dtype: torch.dtype) -> bool:
        """Whether each is at most twice the baseline's, beside what rounding a result to `dtype` costs."""
        rounding = torch.finfo(dtype).eps / 2
        pairs = zip(_numbers(self), _numbers(baseline), strict=True)
        return all(mine <= 2 * theirs + rounding for mine, theirs in pairs)


@dataclass(frozen=True)
class Choice:
    """What was measured for one kind of call.

    Args:
        backend: the fastest of those that are correct.
        evidence: of each that is correct, by name; with gradients, of the forward and the backward pass together.
        errors: of each that ran, by name.
        baseline: the errors of standard attention in the same dtype.
        refused: why the others were left out, in a sentence, by name.
    """

    backend: Backend
    evidence: dict[str, Evidence]
    errors: dict[str, Errors]
    baseline: Errors
    refused: dict[str, str] = field(default_factory=dict)

    def ranking(self) -> list[Backend]:
        """The correct ones that have not failed since, the fastest first."""
        names = sorted(self.evidence, key=lambda name: self.evidence[name].median_ms)
        return [BACKENDS[name] for name in names if name not in self.refused]


class Kind(NamedTuple):
    """Calls that share a choice: lengths and the number of heads are rounded up to powers of two.

    Lengths that grow token by token would otherwise be measured at every step; what is fastest changes over octaves.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    Tq: int
    Tk: int
    heads: int
    causal: bool
    grad: bool
    grouped: bool
    square: bool

    @classmethod
    def of(cls, Q: Tensor, K: Tensor, causal: bool, grad: bool) -> Kind:
        """The kind of these tensors: Q (B, H, Tq, d) and K (B, G, Tk, d)."""
        (batch, heads, queries, width), (groups, keys) = Q.shape, K.shape[1:3]
        rounded = (1 << (n - 1).bit_length() if n else 0 for n in (queries, keys, batch * heads))
        return cls(str(Q.device), Q.dtype, width, *rounded, causal, grad, heads != groups, queries == keys)


_choices: dict[Kind, Choice] = {}
_calls: Counter[Kind] = Counter()
_seen: Counter[tuple[object, ...]] = Counter()
"""Calls of an exact shape since its kind was measured."""
_settled: dict[tuple[object, ...], str] = {}
"""The backend's name for an exact shape, once calls have nothing faster to wait for."""


def fastest(
    Q: Tensor, K: Tensor, V: Tensor, *, causal: bool = False, scale: float | None = None, grad: bool = False
) -> Choice:
    """Measure every backend that takes these tensors, unless that has been done for their kind.

    Args:
        Q: (B, H, Tq, d).
        K: (B, G, Tk, d).
        V: (B, G, Tk, d).
        causal: the last query sees the last key, and each one before it a key less.
        scale: 1/√d when left out.
        grad: measure the forward and the backward pass.

    Returns:
        `Choice`, the same for every further call of this kind.

    Raises:
        InputError: nothing computes this correctly; the message says why for each.
    """
    kind = Kind.of(Q, K, causal, grad)
    if kind not in _choices:
        _choices[kind] = _measured(Q.detach(), K.detach(), V.detach(), causal, scale, grad)
        _seen[_shape(Q, K, causal, grad)] = CALLS_BEFORE_PLANNING  # every backend has its plan for this one
    return _choices[kind]


def resolve(
    Q: Tensor, K: Tensor, V: Tensor, *, causal: bool, scale: float | None, grad: bool, calls_before_measuring: int
) -> Backend:
    """The backend for this call: a starter for the first calls of a kind, then the fastest.

    A starter it is as well while `torch.compile` traces, a CUDA graph is recorded or this process measures something,
    which the call may be a part of, for a single query, whose cache grows through many kinds, and where measuring
    fails. A backend that plans for every shape serves those that have come often, and the best of the others the rest.
    """
    if torch.compiler.is_compiling() or (Q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return BACKENDS[_starter(str(Q.device), Q.dtype, Q.shape[-1], grad)]
    shape = _shape(Q, K, causal, grad)
    if shape in _settled:
        return BACKENDS[_settled[shape]]
    kind = Kind.of(Q, K, causal, grad)
    found = _choices.get(kind)
    if found is None and kind.Tq > 1:
        _calls[kind] += 1
        if _calls[kind] > calls_before_measuring and not is_held(kind.device):
            found = _tried(Q, K, V, causal, scale, grad)
    starter = BACKENDS[_starter(str(Q.device), Q.dtype, Q.shape[-1], grad)]
    if found is None:
        return starter
    _seen[shape] += 1
    often = _seen[shape] > CALLS_BEFORE_PLANNING
    case = Case.of(Q, K, causal, grad)
    able = [*(backend for backend in found.ranking() if backend.why_not(case) is None), starter]
    backend = next(each for each in able if often or not each.plans_per_shape)
    if backend is able[0]:
        _settled[shape] = backend.name
    return backend


def _tried(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float | None, grad: bool) -> Choice | None:
    """What `fastest` finds, or None where it finds nothing now."""
    kind = Kind.of(Q, K, causal, grad)
    try:
        with exclusive(kind.device, timeout=LONGEST_WAIT):
            _logger.info("Measuring once which backend is the fastest for %s.", kind)
            return fastest(Q, K, V, causal=causal, scale=scale, grad=grad)
    except Exception as error:
        reason = _failure(error)
    if Q.is_cuda:
        torch.cuda.empty_cache()
    _calls[kind] = -CALLS_AFTER_A_FAILURE
    _logger.warning("Nothing could be measured for %s, and it is computed without. %s", kind, reason)
    return None


def _shape(Q: Tensor, K: Tensor, causal: bool, grad: bool) -> tuple[object, ...]:
    return Q.device, Q.dtype, Q.shape, K.shape, causal, grad


def leave_out(backend: Backend, error: Exception, Q: Tensor, K: Tensor, *, causal: bool, grad: bool) -> bool:
    """Remember that a measured backend failed after all; False where it was none, and there is nothing to be done."""
    found = _choices.get(Kind.of(Q, K, causal, grad))
    if found is None or backend not in found.ranking():
        return False
    found.refused[backend.name] = _failure(error)
    _settled.clear()
    return True


def forget() -> None:
    """Forget every choice and every call."""
    for remembered in (_choices, _calls, _seen, _settled):
        remembered.clear()


def error_against_reference(
    backend: Backend,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    grad: bool = False,
) -> Errors:
    """How far a backend is from standard attention in float32, or in float64 where the input is float32 itself.

    All heads of the first and of the last key head are compared, block by block of queries, so that no matrix of scores
    is ever whole. Arguments as in `fastest`.
    """
    Q, K, V = Q.detach(), K.detach(), V.detach()
    upstream = _upstream(Q) if grad else None
    ends = sorted({(0, 0), (K.shape[0] - 1, K.shape[1] - 1)})
    reference = _Reference(Q, K, V, upstream, causal, scale, ends)
    return _distance(_results(backend, Q, K, V, upstream, causal, scale), reference)


@torch.compiler.assume_constant_result
def _starter(device: str, dtype: torch.dtype, head_dim: int, grad: bool) -> str:
    reasons = {}
    for name in STARTERS:
        reasons[name] = BACKENDS[name].why_not(Case(device, dtype, head_dim, 1024, 1024, False, grad, False))
        if reasons[name] is None:
            return name
    raise InputError("No backend computes this. " + _listed(reasons))


def _measured(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float | None, grad: bool) -> Choice:
    case = Case.of(Q, K, causal, grad)
    upstream = _upstream(Q) if grad else None
    every = list(itertools.product(range(K.shape[0]), range(K.shape[1])))  # a wrong stride shows in any of them
    reference = _Reference(Q, K, V, upstream, causal, scale, every)
    baseline = _distance(reference.in_dtype(Q.dtype), reference)
    evidence, errors, refused, timed = {}, {}, {}, {}
    shape = f"{' and '.join(' × '.join(map(str, x.shape)) for x in (Q, K))}{', causal' if causal else ''}"
    for name, backend in BACKENDS.items():
        if reason := backend.why_not(case) or _too_large(backend, Q, K, grad):
            refused[name] = reason
            continue
        try:
            errors[name] = _distance(_results(backend, Q, K, V, upstream, causal, scale), reference)
            if not errors[name].within(baseline, Q.dtype):
                refused[name] = "It errs more than twice as much as standard attention in the same precision."
                continue
            run = functools.partial(_results, backend, Q, K, V, upstream, causal, scale)
            timed[name] = functools.partial(measure_time, run, case.device, dtype=Q.dtype, shape=shape, runs=5)
            evidence[name] = timed[name]()
        except Exception as error:
            refused[name] = _failure(error)
    if evidence:
        _rematch(evidence, timed, refused)
    if not evidence:
        raise InputError("No backend computes this. " + _listed(refused))
    best = min(evidence, key=lambda name: evidence[name].median_ms)
    return Choice(BACKENDS[best], evidence, errors, baseline, refused)


def _rematch(evidence: dict[str, Evidence], timed: dict[str, Callable[[], Evidence]], refused: dict[str, str]) -> None:
    """Time those close to the fastest again, in turn: a device that has grown hot is slower for whoever comes last."""
    least = min(each.median_ms for each in evidence.values())
    rivals = [name for name, each in evidence.items() if each.median_ms <= CLOSE * least]
    if len(rivals) == 1:
        return
    rounds: dict[str, list[Evidence]] = {name: [] for name in rivals}
    for name in rivals * REMATCHES:
        try:
            rounds[name].append(timed[name]())
        except Exception as error:
            refused[name] = _failure(error)
    for name, times in rounds.items():
        if name in refused:
            del evidence[name]
        else:
            evidence[name] = sorted(times, key=lambda one: one.median_ms)[REMATCHES // 2]


def _results(
    backend: Backend, Q: Tensor, K: Tensor, V: Tensor, upstream: Tensor | None, causal: bool, scale: float | None
) -> list[Tensor]:
    """The output, and after it the gradients of Q, K and V where there is an upstream gradient."""
    if upstream is None:
        with torch.no_grad():
            return [backend.run(Q, K, V, causal, scale)]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (Q, K, V)]
        output = backend.run(*leaves, causal, scale)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


class _Reference:
    """Standard attention for some key heads, each a pair of batch and head, in a higher precision than the input's."""

    def __init__(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        upstream: Tensor | None,
        causal: bool,
        scale: float | None,
        picked: list[tuple[int, int]],
    ) -> None:
        self._groups, self._picked = K.shape[1], picked
        self._inputs = [self.pick(x) for x in (Q, K, V, *([] if upstream is None else [upstream]))]
        self._causal, self._scale = causal, scale
        self.results = self.in_dtype(torch.float32 if Q.dtype in HALF_PRECISION else torch.float64)

    def pick(self, x: Tensor) -> Tensor:
        """(B, heads, T, d) → (picked, heads that share a key head, T, d)."""
        return torch.stack([x[batch].unflatten(0, (self._groups, -1))[group] for batch, group in self._picked])

    def in_dtype(self, dtype: torch.dtype) -> list[Tensor]:
        """The output, and after it the gradients of Q, K and V where there is an upstream gradient."""
        scores = self._inputs[0].shape[1] * self._inputs[0].shape[2] * self._inputs[1].shape[2]  # of one key head
        at_once = max(1, SCORES_AT_ONCE // max(1, scores))
        split = (x.to(dtype).split(at_once) for x in self._inputs)
        parts = [self._in_blocks(*part) for part in zip(*split, strict=True)]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def _in_blocks(self, Q: Tensor, K: Tensor, V: Tensor, *upstream: Tensor) -> list[Tensor]:
        """The same block by block of queries."""
        queries, keys = Q.shape[-2], K.shape[-2]
        step = max(1, SCORES_AT_ONCE // max(1, Q.shape[0] * Q.shape[1] * keys))
        outputs, dQ = [], []
        dK, dV = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (K, V))
        for first in range(0, queries, step):
            rows = slice(first, min(first + step, queries))
            seen = min(max(rows.stop + keys - queries, 0), keys) if self._causal else keys
            parts = [Q[..., rows, :], K[..., :seen, :], V[..., :seen, :]]
            with torch.set_grad_enabled(bool(upstream)):
                leaves = [part.requires_grad_() if upstream else part for part in parts]
                outputs.append(standard_attention(*leaves, self._causal, self._scale))
            if upstream:
                dq, dk, dv = torch.autograd.grad(outputs[-1], leaves, upstream[0][..., rows, :])
                dQ.append(dq)
                dK[..., :seen, :] += dk
                dV[..., :seen, :] += dv
        output = torch.cat([part.detach() for part in outputs], dim=-2)
        return [output, torch.cat(dQ, dim=-2), dK, dV] if upstream else [output]


def _distance(found: Sequence[Tensor], reference: _Reference) -> Errors:
    relative = []
    for x, exact in zip(found, reference.results, strict=True):
        exact = exact.double()
        apart = (x if x.shape == exact.shape else reference.pick(x)).double() - exact
        relative.append((_ratio(_rms(apart), _rms(exact)), _ratio(apart.abs().max(), exact.abs().max())))
    forward, *backward = relative
    return Errors(*forward, *(max(each) for each in zip(*backward, strict=True)))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _ratio(error: Tensor, size: Tensor) -> float:
    """error / size; what is no number is infinitely far off."""
    value = error.item() / max(size.item(), torch.finfo(torch.float64).tiny)
    return math.inf if math.isnan(value) else value


def _numbers(errors: Errors) -> list[float]:
    values = (errors.forward, errors.forward_max, errors.backward, errors.backward_max)
    return [value for value in values if value is not None]


def _upstream(Q: Tensor) -> Tensor:
    """A gradient of the output, drawn without touching the global random numbers."""
    generator = torch.Generator(Q.device).manual_seed(0)
    return torch.randn(Q.shape, generator=generator, device=Q.device, dtype=torch.float32).to(Q.dtype)


def _too_large(backend: Backend, Q: Tensor, K: Tensor, grad: bool) -> str | None:
    """Why a backend that holds all weights is not even tried: running out of memory ends a process on the CPU."""
    numbers = Q.shape[0] * Q.shape[1] * Q.shape[2] * K.shape[2] * Q.dtype.itemsize
    needed = numbers * held_matrices(backend.name, Q.dtype.itemsize, grad, on_gpu=Q.is_cuda)
    if needed == 0:
        return None
    free = memory.free(str(Q.device))
    if needed <= free / 2:
        return None
    return f"It would hold {needed / 2**30:,.1f} GiB of scores and weights, and {free / 2**30:,.1f} GiB are free."


def _failure(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return f"It failed: {text}."


def _listed(reasons: dict[str, str]) -> str:
    return " ".join(f"{BACKENDS[name].label}: {reason}" for name, reason in reasons.items())
