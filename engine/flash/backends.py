"""Everything that may compute attention here, behind one signature, and why the rest cannot.

    for backend in choices(Case.of(Q, K, causal=True, grad=False)):
        output = backend.run(Q, K, V, causal=True, scale=None)

A kernel brings its own conventions, and `run` hides them: causal always means that the last query sees the last key,
query i the keys j ≤ i + Tk − Tq; a query that sees nothing has a zero output; H may be a multiple of G; every width
that the backend admits is filled up to what its kernel wants. Kernels differ most for a single query: without splitting
the keys among programs they keep B·H of these busy at most. PyTorch's flash splits them, FlashAttention-3 and our own
do not, and FlashAttention-4 cannot on compute capability 9.0.

Legend: B batch, H query heads, G key/value heads (G divides H), Tq queries, Tk keys, d head width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, bias, flex_attention, sdpa_kernel

HALF_PRECISION = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Case(NamedTuple):
    """What a backend is asked for.

    Args:
        device: torch device, e.g. ``"cuda:0"``.
        dtype: of Q, K and V.
        head_dim: d.
        Tq: number of queries.
        Tk: number of keys.
        causal: whether query i sees the keys j ≤ i + Tk − Tq only.
        grad: whether gradients will be asked for.
        grouped: whether query heads share key heads, G < H.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    Tq: int
    Tk: int
    causal: bool
    grad: bool
    grouped: bool

    @classmethod
    def of(cls, Q: Tensor, K: Tensor, causal: bool, grad: bool) -> Case:
        """The case of these tensors: Q (B, H, Tq, d) and K (B, G, Tk, d)."""
        shape = (Q.shape[-1], Q.shape[-2], K.shape[-2])
        return cls(str(Q.device), Q.dtype, *shape, causal, grad, Q.shape[-3] != K.shape[-3])


Kernel = Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]
Refusal = Callable[[Case], str | None]


@dataclass(frozen=True)
class Backend:
    """One way of computing softmax(QKᵀ · scale) V.

    Args:
        name: its key in `BACKENDS`.
        label: its name for people.
        family: whose it is: "ours", "torch" or "flash-attn".
        why_not: one sentence that says why it does not take a case, or None; nothing is run.
        kernel: computes a case that is not refused, has keys, and where every query sees at least one of them.
        multiple: the kernel wants d to be one of this number; other widths are filled up with zeros.
        groups: whether the kernel lets query heads share key heads; otherwise these are repeated.
        plans_per_shape: every new shape costs it a compilation or a plan, of tenths of a second and more.
    """

    name: str
    label: str
    family: Literal["ours", "torch", "flash-attn"]
    why_not: Refusal
    kernel: Kernel
    multiple: int = 1
    groups: bool = True
    plans_per_shape: bool = False

    def run(self, Q: Tensor, K: Tensor, V: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
        """softmax(QKᵀ · scale) V.

        Args:
            Q: (B, H, Tq, d).
            K: (B, G, Tk, d), query head h reads key head h // (H / G).
            V: (B, G, Tk, d).
            causal: the last query sees the last key, and each one before it a key less.
            scale: 1/√d when left out.

        Returns:
            (B, H, Tq, d) in the dtype of Q.
        """
        (queries, width), keys = Q.shape[-2:], K.shape[-2]
        scale = width**-0.5 if scale is None else scale
        blind = max(queries - keys, 0) if causal or keys == 0 else 0  # queries that see nothing come first
        if blind == queries:
            nothing = K[..., :0, :].sum() + V[..., :0, :].sum()  # 0, and gradients of 0
            return F.pad(Q[..., :0, :], (0, 0, queries, 0)) + nothing
        if blind:
            Q = Q[..., blind:, :]
        sharing = Q.shape[-3] // K.shape[-3]
        if sharing > 1 and not self.groups:
            K, V = (x.repeat_interleave(sharing, dim=-3) for x in (K, V))  # (B, H, Tk, d)
        if missing := -width % self.multiple:
            Q, K, V = (F.pad(x, (0, missing)) for x in (Q, K, V))
        output = self.kernel(Q, K, V, causal and queries - blind > 1, scale)  # a single query sees every key
        if missing:
            output = output[..., :width]
        return F.pad(output, (0, 0, blind, 0)) if blind else output


def choices(case: Case) -> list[Backend]:
    """The backends that take a case, in the order of `BACKENDS`."""
    return [backend for backend in BACKENDS.values() if backend.why_not(case) is None]


def absent(case: Case) -> dict[str, str]:
    """Why the others do not, by label."""
    reasons = {backend.label: backend.why_not(case) for backend in BACKENDS.values()}
    return {label: reason for label, reason in reasons.items() if reason is not None}


def standard_attention(Q: Tensor, K: Tensor, V: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(QKᵀ · scale) V as the formula has it, all (B, H, Tq, Tk) weights at once, in the dtype of Q.

    What overflows saturates: entries of Q and K at √(largest float32 / 2d), scores and outputs at the largest number of
    their dtype. On a GPU the product itself scales the scores, which saves a pass over all of them.

    Args:
        Q: (B, H, Tq, d).
        K: (B, G, Tk, d), query head h reads key head h // (H / G).
        V: (B, G, Tk, d).
        causal: the last query sees the last key, and each one before it a key less.
        scale: 1/√d when left out.

    Returns:
        (B, H, Tq, d) in the dtype of Q, zero rows where nothing is visible.

    Source: Vaswani et al. 2017, equation 1, https://arxiv.org/abs/1706.03762.
    """
    return STANDARD.run(Q, K, V, causal, scale)


def _standard(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float) -> Tensor:
    limits, sums = torch.finfo(Q.dtype), torch.finfo(torch.promote_types(Q.dtype, torch.float32))
    limit = min(limits.max, math.sqrt(sums.max / (2 * Q.shape[-1] * max(abs(scale), 1.0))))
    queries, keys = (x.clamp(-limit, limit).flatten(0, 1) for x in (Q, K))  # (B·H, T, d)
    separate = not Q.is_cuda and Q.dtype not in HALF_PRECISION  # a CPU would scale and round the factors first
    scores = torch.baddbmm(Q.new_zeros(1, 1, 1), queries, keys.mT, beta=0, alpha=1.0 if separate else scale)
    scores = (scores.mul_(scale) if separate else scores).unflatten(0, Q.shape[:2])  # (B, H, Tq, Tk)
    if Q.dtype == torch.float16 and _may_overflow(queries, keys, scale):
        scores = scores.clamp(limits.min, limits.max)
    if causal:
        with torch.no_grad():  # hidden weights are 0, and so are their scores' gradients without being told
            scores.masked_fill_(_hidden(Q, K), -math.inf)
    return (scores.softmax(dim=-1) @ V).clamp(limits.min, limits.max)


def _may_overflow(Q: Tensor, K: Tensor, scale: float) -> bool:
    """Whether a score may overflow, scaled or not yet; on a GPU asked only where a pass over all of them costs more."""
    if torch.compiler.is_compiling():
        return True
    if Q.is_cuda and (Q.shape[0] * Q.shape[1] * K.shape[1] < 2**24 or torch.cuda.is_current_stream_capturing()):
        return True
    with torch.no_grad():
        lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (Q, K)]
        return not (lengths[0] * lengths[1]).item() * max(abs(scale), 1.0) < torch.finfo(Q.dtype).max / 2


def _hidden(Q: Tensor, K: Tensor) -> Tensor:
    """(Tq, Tk), True above the diagonal that ends at the bottom right."""
    queries, keys = Q.shape[-2], K.shape[-2]
    last = torch.arange(queries, device=Q.device)[:, None] + keys - queries
    return torch.arange(keys, device=Q.device) > last


def _sdpa(choice: SDPBackend) -> Kernel:
    """One of the kernels behind `torch.nn.functional.scaled_dot_product_attention`, and no other.

    While `torch.compile` traces, which cannot build PyTorch's causal bias for other numbers of keys than of queries, a
    mask is spelled out for these, and another of the kernels steps in where the chosen one takes none.
    """

    def kernel(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float) -> Tensor:
        options: dict[str, Any] = {}
        kernels = [choice]
        if Q.shape[-3] != K.shape[-3]:
            options["enable_gqa"] = True
        if causal and Q.shape[-2] == K.shape[-2]:
            options["is_causal"] = True
        elif causal:  # is_causal would align them at the top left
            fused = Q.is_cuda and choice is not SDPBackend.MATH
            if fused and not torch.compiler.is_compiling():
                options["attn_mask"] = bias.causal_lower_right(Q.shape[-2], K.shape[-2])
            else:
                options["attn_mask"] = ~_hidden(Q, K)
                kernels += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] * fused  # flash takes no written mask
        with sdpa_kernel(kernels):
            return F.scaled_dot_product_attention(Q, K, V, scale=scale, **options)

    return kernel


def _flex(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float) -> Tensor:
    queries, keys = Q.shape[-2], K.shape[-2]
    mask = _causal_blocks(queries, keys, str(Q.device)) if causal else None
    # every length and head count is a graph of its own, of which Dynamo keeps 8 unless told
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        return _compiled_flex()(Q, K, V, block_mask=mask, scale=scale, enable_gqa=Q.shape[-3] != K.shape[-3])


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch._functorch import config

    config.donated_buffer = False  # else a graph cannot be kept; every backward pass reads it, long after a patch
    return torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=64)
def _causal_blocks(queries: int, keys: int, device: str) -> flex_attention.BlockMask:
    """The blocks that queries see in part or whole, from arithmetic: `create_block_mask` holds all Tq × Tk booleans."""
    shift, side = keys - queries, 128

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + shift

    first = torch.arange(0, queries, side, device=device)  # (rows of blocks,), the first query of each
    after = (first + side).clamp(max=queries)
    columns = torch.arange(-(-keys // side), dtype=torch.int32, device=device)  # (columns of blocks,)
    seen = ((after + shift).clamp(min=0) + side - 1) // side  # blocks, counted from the left
    whole = ((first + shift + 1).clamp(min=0) // side).clamp(max=keys // side) * (after - first == side)
    order = (columns + whole[:, None]) % len(columns)  # what is cut begins after what is whole
    counts = [x.to(torch.int32)[None, None] for x in (seen - whole, whole)]  # (1, 1, rows)
    indices = [x.to(torch.int32).contiguous()[None, None] for x in (order, columns.expand_as(order))]
    return flex_attention.BlockMask.from_kv_blocks(
        counts[0], indices[0], counts[1], indices[1], side, visible, (queries, keys)
    )


def _flash_attn(module: str) -> Kernel:
    """`flash_attn_func` of one of the flash-attn packages; all of them align causal masks at the bottom right."""

    def kernel(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float) -> Tensor:
        function = _imported(module)
        if isinstance(function, str):
            raise RuntimeError(function)
        with torch.cuda.device_of(Q):
            output = function(
                Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2), softmax_scale=scale, causal=causal
            )  # (B, T, H, d) in and out
        output = output[0] if isinstance(output, tuple) else output  # some return the logsumexp as well
        return output.transpose(1, 2)

    return kernel


@functools.cache
def _imported(module: str) -> Callable[..., Any] | str:
    """The module's `flash_attn_func`, or in one sentence why there is none; compiled extensions can raise anything."""
    try:
        found = importlib.import_module(module)
        if getattr(found, "__file__", module) is None:  # a folder that other packages of the family put theirs into
            return f"The module {module} cannot be imported: {module} is not installed."
        return found.flash_attn_func
    except ModuleNotFoundError as error:
        return f"The module {module} cannot be imported: {error.name} is not installed."
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or "no reason given"
        return f"The module {module} cannot be imported: {type(error).__name__}, {reason.rstrip('.')}."


def _triton(Q: Tensor, K: Tensor, V: Tensor, causal: bool, scale: float) -> Tensor:
    from engine.flash import triton_forward

    return triton_forward.attend(Q, K, V, causal=causal, scale=scale)


def _all(*refusals: Refusal) -> Refusal:
    """The first reason of several."""
    return lambda case: next((reason for refusal in refusals if (reason := refusal(case))), None)


def _on_cuda(case: Case) -> str | None:
    if torch.device(case.device).type != "cuda":
        return f"It needs an NVIDIA GPU, and this device is {case.device}."
    return None if torch.cuda.is_available() else "It needs an NVIDIA GPU, and there is none here."


def _on_cpu_or_cuda(case: Case) -> str | None:
    kind = torch.device(case.device).type
    return _on_cuda(case) if kind == "cuda" else None if kind == "cpu" else f"It does not run on {kind}."


@functools.cache
def _capability(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _since(major: int, minor: int = 0, before: int = 100) -> Refusal:
    """GPUs of this compute capability on, and of majors below `before`."""

    def refusal(case: Case) -> str | None:
        found = _capability(case.device)
        if (major, minor) <= found < (before, 0):
            return None
        wanted = f"{major}.x" if before == major + 1 else f"{major}.{minor} or newer"
        return f"It needs a GPU of compute capability {wanted}, and this one has {found[0]}.{found[1]}."

    return refusal


def _dtypes(*allowed: torch.dtype) -> Refusal:
    names = [str(dtype).removeprefix("torch.") for dtype in allowed]

    def refusal(case: Case) -> str | None:
        if case.dtype in allowed:
            return None
        return (
            f"It takes {', '.join(names[:-1])} and {names[-1]}, and this is {str(case.dtype).removeprefix('torch.')}."
        )

    return refusal


def _widths(largest: int) -> Refusal:
    def refusal(case: Case) -> str | None:
        if case.head_dim <= largest:
            return None
        return f"It takes heads up to {largest} wide, and these are {case.head_dim} wide."

    return refusal


def _flash_cuda_or_cpu(case: Case) -> str | None:
    if torch.device(case.device).type == "cpu":
        return _dtypes(*FLOATS)(case)
    return _all(_on_cuda, _dtypes(*HALF_PRECISION), _since(8), _widths(256), _no_wide_gradients)(case)


def _no_wide_gradients(case: Case) -> str | None:
    small = _capability(case.device) in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
    if case.grad and small and 192 < case.head_dim <= 224:
        return f"On this GPU it has no gradients for heads 193 to 224 wide, and these are {case.head_dim} wide."
    return None


def _cudnn_shapes(case: Case) -> str | None:
    major, minor = _capability(case.device)
    if not torch.backends.cudnn.is_available():
        return "This PyTorch was built without cuDNN."
    if case.causal and 1 < case.Tq < case.Tk:
        return (
            f"Its causal mask starts at the top left, and {case.Tq} queries of {case.Tk} keys end at the bottom right."
        )
    if case.Tk == 1:
        return "It does not take a single key."
    return _widths(256 if (major, minor) == (9, 0) or major == 10 else 128)(case)


def _needs_triton(case: Case) -> str | None:
    return None if importlib.util.find_spec("triton") else "It needs Triton, which is not installed."


def _forward_only(case: Case) -> str | None:
    return "It computes the forward pass only, and gradients are asked for." if case.grad else None


def _importable(module: str) -> Refusal:
    def refusal(case: Case) -> str | None:
        found = _imported(module)
        return found if isinstance(found, str) else None

    return refusal


def _fa4_gradients(case: Case) -> str | None:
    major, minor = _capability(case.device)
    if case.grad and major < 9:
        return f"Its gradients need a GPU of compute capability 9.0 or newer, and this one has {major}.{minor}."
    return None


def _fa4_widths(case: Case) -> str | None:
    wide = 256 if _capability(case.device)[0] == 9 else 128
    return _widths(256)(case) if case.head_dim > 248 and wide == 128 else _widths(wide)(case)


STANDARD = Backend(
    "standard",
    "Standard attention",
    "ours",
    _all(_on_cpu_or_cuda, _dtypes(*FLOATS)),
    _standard,
    groups=False,
)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        STANDARD,
        Backend(
            "torch-math",
            "PyTorch, math",
            "torch",
            _all(_on_cpu_or_cuda, _dtypes(*FLOATS)),
            _sdpa(SDPBackend.MATH),
        ),
        Backend(
            "torch-flash", "PyTorch, flash", "torch", _flash_cuda_or_cpu, _sdpa(SDPBackend.FLASH_ATTENTION), multiple=8
        ),
        Backend(
            "torch-efficient",
            "PyTorch, memory-efficient",
            "torch",
            _all(_on_cuda, _dtypes(torch.float16, torch.bfloat16, torch.float32)),
            _sdpa(SDPBackend.EFFICIENT_ATTENTION),
            multiple=8,
            groups=False,
        ),
        Backend(
            "torch-cudnn",
            "PyTorch, cuDNN",
            "torch",
            _all(_on_cuda, _dtypes(*HALF_PRECISION), _since(8), _cudnn_shapes),
            _sdpa(SDPBackend.CUDNN_ATTENTION),
            multiple=8,
            plans_per_shape=True,
        ),
        Backend(
            "flex",
            "FlexAttention, compiled",
            "torch",
            _all(
                _on_cuda, _dtypes(torch.float16, torch.bfloat16, torch.float32), _since(8), _widths(256), _needs_triton
            ),
            _flex,
            multiple=16,
            plans_per_shape=True,
        ),
        Backend(
            "flash-attn-2",
            "FlashAttention-2",
            "flash-attn",
            _all(_on_cuda, _dtypes(*HALF_PRECISION), _since(8), _widths(256), _importable("flash_attn")),
            _flash_attn("flash_attn"),
            multiple=8,
        ),
        Backend(
            "flash-attn-3",
            "FlashAttention-3",
            "flash-attn",
            _all(
                _on_cuda,
                _dtypes(*HALF_PRECISION),
                _since(9, before=10),
                _widths(256),
                _importable("flash_attn_interface"),
            ),
            _flash_attn("flash_attn_interface"),
            multiple=8,
        ),
        Backend(
            "flash-attn-4",
            "FlashAttention-4",
            "flash-attn",
            _all(
                _on_cuda,
                _dtypes(*HALF_PRECISION),
                _since(8),
                _fa4_gradients,
                _fa4_widths,
                _importable("flash_attn.cute"),
            ),
            _flash_attn("flash_attn.cute"),
            multiple=8,
        ),
        Backend(
            "triton",
            "Ours, in Triton",
            "ours",
            _all(_on_cuda, _dtypes(*HALF_PRECISION), _since(8), _widths(256), _forward_only, _needs_triton),
            _triton,
        ),
    )
}
"""Every backend by name."""
