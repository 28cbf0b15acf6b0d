"""Attention with and without the matrix of weights: two layers with one signature, and no parameters.

Legend: B batch, H query heads, G key/value heads (G divides H), Tq queries, Tk keys, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.autocast import product_dtype, without_autocast
from engine.errors import InputError
from engine.flash import choice
from engine.flash.backends import BACKENDS, Backend, Case, standard_attention

LARGEST_SCORE = 2.0**7
"""Rounding queries and keys to float16, or to TF32, moves scores up to here by 1/8 at most, weights by a seventh."""

HALF_RANGE = (2.0**-14, 2.0**15)
"""Where float16 has all its digits, with room for sums: what the largest number of every row must lie in."""

LEAST_GRADIENT = 2.0**-12
"""Of a head's largest gradient in float16: there most of the others have TF32's digits too."""


class StandardAttention(nn.Module):
    """softmax(QKᵀ / √d) V as the formula has it: all (B, H, Tq, Tk) weights are held at once.

    Under autocast it is computed in autocast's dtype, as PyTorch's own attention is.

    Args:
        head_dim: d.
        causal: the last query sees the last key, and each one before it a key less.

    Source: Vaswani et al. 2017, equation 1, https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.head_dim, self.causal = _checked_width(head_dim), causal

    def forward(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Attend from Q (B, H, Tq, d) to K and V (B, G, Tk, d).

        Returns:
            (B, H, Tq, d), zero rows where nothing is visible.

        Raises:
            InputError: the shapes do not fit each other, or are not `head_dim` wide.
        """
        _check(self.head_dim, Q, K, V)
        Q, K, V = _cast_as_asked(Q, K, V)
        with without_autocast(Q):
            return standard_attention(Q, K, V, self.causal)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.head_dim}, causal={self.causal}"


class FlashAttention(nn.Module):
    """The same numbers without the matrix: softmax(QKᵀ / √d) V tile by tile, by the fastest kernel there is here.

    Flash kernels are half precision. On CUDA, float32 input is computed in float16 with float32 sums, and so are its
    gradients; the result is float32 again. That has TF32's 11 significant bits, but not its range: errors are relative
    to the largest numbers of a row that goes in and of a head that comes out, and what is ten thousand times smaller
    than these has fewer digits than TF32 would leave it. Input that this would spoil is computed in float32: scores
    beyond ±128, rows of Q, K, V or the upstream gradient beyond float16's range, gradients that overflow or vanish.
    Whether input is of that kind is read from the device at each call, which `torch.compile` and CUDA graphs do not
    allow: under these float32 stays float32.

    The first calls of a kind (device, dtype, d, lengths, heads, mask, gradients) go to a kernel that takes no time to
    start. Then the backends are measured once, on the tensors of that call, which can take a minute, and the fastest
    that is correct serves all calls after it, in every module of this process. Nothing is measured for a single query:
    on a GPU that is PyTorch's flash kernel, which splits a long cache among the processors.

    Under autocast it is computed in autocast's dtype, as PyTorch's own attention is; precision "exact" is not.

    No finite input gives anything but finite numbers, with one exception: half precision on CUDA is handed to the
    kernel as it is, which may overflow where bfloat16 goes beyond 10^18, or values come within a thousandth of the
    largest number. Precision "exact" holds there too.

    Args:
        head_dim: d.
        causal: the last query sees the last key, and each one before it a key less.
        precision: "fast" as above; "exact" keeps float32 on CUDA, and saturates what overflows in any dtype.
        backend: a name in `engine.flash.backends.BACKENDS`, to be used and no other; chosen by measuring if left out.
            Under `torch.compile`, where nothing is asked, one of PyTorch's may hand a causal mask over other numbers of
            keys than of queries to another of PyTorch's.
        calls_before_measuring: how many calls of a kind come before its backends are measured.

    Raises:
        InputError: an argument is not among what is allowed.

    Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135.
    """

    def __init__(
        self,
        head_dim: int,
        causal: bool = False,
        *,
        precision: Literal["fast", "exact"] = "fast",
        backend: str | None = None,
        calls_before_measuring: int = 32,
    ) -> None:
        super().__init__()
        if precision not in ("fast", "exact"):
            raise InputError(f'The precision is "fast" or "exact", and "{precision}" was given.')
        if backend is not None and backend not in BACKENDS:
            raise InputError(f'There is no backend "{backend}": choose one of {", ".join(BACKENDS)}.')
        if calls_before_measuring < 0:
            raise InputError(f"The calls before measuring are 0 or more, and {calls_before_measuring} were given.")
        self.head_dim, self.causal = _checked_width(head_dim), causal
        self.precision, self.backend = precision, backend
        self.calls_before_measuring = calls_before_measuring

    def forward(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Attend from Q (B, H, Tq, d) to K and V (B, G, Tk, d).

        Returns:
            (B, H, Tq, d) in the dtype of Q, or autocast's, zero rows where nothing is visible.

        Raises:
            InputError: the shapes do not fit each other or are not `head_dim` wide, or the given backend refuses them.
        """
        _check(self.head_dim, Q, K, V)
        if self.precision == "fast":
            Q, K, V = _cast_as_asked(Q, K, V)
        with without_autocast(Q):
            return self._forward(Q, K, V)

    def _forward(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        fast = self.precision == "fast" and Q.is_cuda
        if not fast:
            return self._saturated(Q, K, V)
        if Q.dtype in (torch.float16, torch.bfloat16):
            return self._attend(Q, K, V)
        if Q.dtype == torch.float32 and not _unreadable(Q) and fits_half_precision(Q, K, V, self.head_dim**-0.5):
            if _needs_gradients(Q, K, V):
                return self._differentiable_in_half(Q, K, V)
            return self._attend(Q.half(), K.half(), V.half()).float()
        return self._saturated(Q, K, V)

    def _differentiable_in_half(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        used: list[Backend] = []

        def attend(*halves: Tensor) -> Tensor:
            output, backend = self._run(*halves)
            used.append(backend)
            return output

        def leave_out(error: Exception, q: Tensor, k: Tensor) -> None:
            choice.leave_out(used[-1], error, q, k, causal=self.causal, grad=True)

        return InHalfPrecision.apply(Q, K, V, attend, self._saturated, leave_out)

    def _attend(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        return self._run(Q, K, V)[0]

    def _run(self, Q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Backend]:
        """The output, and the backend that it is from."""
        grad = _needs_gradients(Q, K, V)
        backend = self._backend(Q, K, V, grad)
        if self.backend is not None or torch.compiler.is_compiling():
            return backend.run(Q, K, V, self.causal), backend
        try:
            return backend.run(Q, K, V, self.causal), backend
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not choice.leave_out(backend, error, Q, K, causal=self.causal, grad=grad):
                raise
            return self._run(Q, K, V)

    def _backend(self, Q: Tensor, K: Tensor, V: Tensor, grad: bool) -> Backend:
        if self.backend is None:
            return choice.resolve(
                Q,
                K,
                V,
                causal=self.causal,
                scale=None,
                grad=grad,
                calls_before_measuring=self.calls_before_measuring,
            )
        backend = BACKENDS[self.backend]
        if not torch.compiler.is_compiling() and (reason := backend.why_not(Case.of(Q, K, self.causal, grad))):
            raise InputError(f"{backend.label} cannot compute this. {reason}")
        return backend

    def _saturated(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """`_attend` with what overflows on the way brought back: scores saturate, values are made smaller meanwhile.

        A kernel sums up to Tk values before it divides, and scores of d products.
        """
        summed = torch.promote_types(Q.dtype, torch.float32)
        sums, limits = torch.finfo(summed), torch.finfo(Q.dtype)
        limit = min(limits.max, math.sqrt(sums.max / (2 * self.head_dim)))
        if not Q.numel() or not K.numel():
            return self._attend(Q, K, V)
        if not Q.is_cuda and not torch.compiler.is_compiling():  # reading a number costs nothing there
            q, k, v = (torch.linalg.vector_norm(x.detach(), math.inf).item() for x in (Q, K, V))
            if max(q, k) <= limit and v <= limits.max / (2 * K.shape[-2]):
                return self._attend(Q, K, V)
        size = torch.linalg.vector_norm(V.detach(), math.inf).to(summed)
        factor = (size / (sums.max / (2 * K.shape[-2]))).clamp(min=1.0).to(Q.dtype)
        output = self._attend(Q.clamp(-limit, limit), K.clamp(-limit, limit), V / factor) * factor
        return output.clamp(limits.min, limits.max)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        given = "" if self.backend is None else f", backend={self.backend}"
        return f"{self.head_dim}, causal={self.causal}, precision={self.precision}{given}"


def fits_half_precision(Q: Tensor, K: Tensor, V: Tensor, scale: float) -> bool:
    """Whether float16 leaves these float32 tensors TF32's digits: small scores, and no row beyond float16's range.

    No score can exceed |q| |k| scale. The numbers are read from the device at once, and anew where a row is all zeros.

    Args:
        Q: (B, H, Tq, d).
        K: (B, G, Tk, d).
        V: (B, G, Tk, d).
        scale: of the scores.
    """
    if not Q.numel() or not K.numel():
        return False
    norm = torch.linalg.vector_norm  # all reductions are kernels of this one kind: a process loads each for some 10 ms
    found = torch.empty(8, dtype=Q.dtype, device=Q.device)
    with torch.no_grad():
        for place, x in enumerate((Q, K)):
            norm(norm(x, dim=-1), math.inf, out=found[place])
        for place, x in enumerate((Q, K, V)):
            rows = norm(x, math.inf, dim=-1)
            norm(rows, -math.inf, out=found[2 + place])
            norm(rows, math.inf, out=found[5 + place])
        q, k, *ends = found.tolist()
        least = [end if end else _least_row(x).item() for end, x in zip(ends[:3], (Q, K, V), strict=True)]
    inside = all(low >= HALF_RANGE[0] and high <= HALF_RANGE[1] for low, high in zip(least, ends[3:], strict=True))
    return inside and q * k * abs(scale) <= LARGEST_SCORE


def _least_row(x: Tensor) -> Tensor:
    """The least of the rows' largest numbers, (…, d), but for rows of zeros; infinite if there are no others."""
    rows = torch.linalg.vector_norm(x, math.inf, dim=-1)
    return torch.where(rows == 0, math.inf, rows).amin()


class InHalfPrecision(torch.autograd.Function):
    """A float32 function computed in float16, forward and backward.

    The function is linear in V, and its gradients are in the upstream gradient. So for each key head the largest number
    of V, if it is smaller, and of the upstream gradient, which of a mean is below float16's smallest, are brought
    between 1 and 2 by powers of two, which the results are divided by. Gradients that overflow or vanish, or whose
    upstream has rows that float16 cannot hold beside the largest, or that the function fails at, are computed anew in
    float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        function: Callable[[Tensor, Tensor, Tensor], Tensor],
        exact: Callable[[Tensor, Tensor, Tensor], Tensor],
        failed: Callable[[Exception, Tensor, Tensor], object],
    ) -> Tensor:
        """`function` of the three in float16; `exact` is the same in float32, for gradients that come out wrong.

        `failed` is told an error of the backward pass, and of which queries and keys.
        """
        needed = ctx.needs_input_grad[:3]
        enlarged = _to_one(V[:, :, None]).clamp(min=1.0)  # (B, G, 1, 1, 1)
        given = (Q, K, V * enlarged[:, :, 0])
        leaves = [x.detach().half().requires_grad_(wanted) for x, wanted in zip(given, needed, strict=True)]
        with torch.set_grad_enabled(any(needed)):
            output = function(*leaves)
        if any(needed):
            ctx.save_for_backward(Q, K, V)
            ctx.leaves, ctx.output, ctx.exact, ctx.failed, ctx.enlarged = leaves, output, exact, failed, enlarged
        return (_by_group(output.detach().float(), K) / enlarged).flatten(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of Q, K and V that are asked for."""
        needed = ctx.needs_input_grad[:3]
        try:
            found = _gradients_in_half(ctx.leaves, ctx.output, upstream, ctx.enlarged)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            ctx.failed(error, *ctx.leaves[:2])
            found = None
        if found is None:
            leaves = [x.detach().requires_grad_(each) for x, each in zip(ctx.saved_tensors, needed, strict=True)]
            with torch.enable_grad():
                output = ctx.exact(*leaves)
            found = torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], upstream)
        gradients = iter(found)
        return *(next(gradients) if each else None for each in needed), None, None, None


def _gradients_in_half(leaves: list[Tensor], output: Tensor, upstream: Tensor, enlarged: Tensor) -> list[Tensor] | None:
    """float32 gradients of those leaves that want them, or None where float16 spoils them.

    `enlarged` is what the last of the leaves, V, was multiplied with, (B, G, 1, 1, 1).
    """
    _, k, v = leaves
    upstream = _by_group(upstream, k)
    factor = _to_one(upstream)  # (B, G, 1, 1, 1)
    scaled = (upstream * factor).flatten(1, 2)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    halves = torch.autograd.grad(output, wanted, scaled.half(), retain_graph=True)
    empty = _largest(upstream) * _largest(v[:, :, None]) == 0  # heads whose gradients are 0
    found, good = [], [_least_row(scaled) >= HALF_RANGE[0]]
    for leaf, half in zip(wanted, halves, strict=True):
        gradient = _by_group(half.float(), k)
        good.append(gradient.isfinite().all())
        if leaf is not v:
            good.append((empty | (_largest(gradient) >= LEAST_GRADIENT)).all())
            gradient = gradient / enlarged
        found.append((gradient / factor).flatten(1, 2))
    return found if torch.stack(good).all() else None


def _by_group(x: Tensor, K: Tensor) -> Tensor:
    """(B, heads, T, d) → (B, G, heads / G, T, d), with the G of K."""
    return x.unflatten(1, (K.shape[1], -1))


def _largest(x: Tensor) -> Tensor:
    """The largest number of each key head of x (B, G, heads / G, T, d): (B, G, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, math.inf, dim=(2, 3, 4), keepdim=True)


def _to_one(x: Tensor) -> Tensor:
    """The powers of two that bring `_largest` between 1 and 2, or as far as float32 goes."""
    return torch.exp2(-torch.floor(torch.log2(_largest(x).clamp(min=torch.finfo(torch.float32).tiny))))


def _cast_as_asked(Q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, ...]:
    """The three in the dtype that autocast asks for, in their own without it."""
    dtype = product_dtype(Q)
    return Q.to(dtype), K.to(dtype), V.to(dtype)


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _unreadable(Q: Tensor) -> bool:
    """Whether no number may be read from the device now."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _checked_width(head_dim: int) -> int:
    if head_dim < 1:
        raise InputError(f"A head is at least 1 wide, and head_dim is {head_dim}.")
    return head_dim


def _check(head_dim: int, Q: Tensor, K: Tensor, V: Tensor) -> None:
    shapes = f"Q, K and V have the shapes {tuple(Q.shape)}, {tuple(K.shape)} and {tuple(V.shape)}"
    if not Q.dim() == K.dim() == V.dim() == 4:
        raise InputError(f"{shapes}, and should have four axes each: batch, heads, tokens, head_dim.")
    if not Q.shape[-1] == K.shape[-1] == V.shape[-1] == head_dim:
        raise InputError(f"{shapes}, and the last number should be head_dim ({head_dim}) in each.")
    if K.shape != V.shape or Q.shape[0] != K.shape[0]:
        raise InputError(f"{shapes}: K and V should have the same, and Q the same batch.")
    if K.shape[1] == 0 or Q.shape[1] % K.shape[1]:
        raise InputError(f"{shapes}: Q's heads ({Q.shape[1]}) should be a multiple of K's ({K.shape[1]}).")
    if not Q.dtype == K.dtype == V.dtype or not Q.is_floating_point():
        raise InputError(f"Q, K and V are {Q.dtype}, {K.dtype} and {V.dtype}, and should share one floating dtype.")
