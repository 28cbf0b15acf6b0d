"""What a mixture of experts costs, and the dense networks that it is fairly compared with.

A mixture has the parameters of a large network and the arithmetic of a small one. So there are two dense networks
beside it: one of equal parameters, which computes more, and one of equal FLOPs, which knows less. Bytes are those of
the layer as written in `engine.moe.feed_forward` and of `engine.model.SwiGLU` with gate and up as one product: each
step reads its inputs from the device's memory and writes its output there, with no cache between.

Legend: N tokens, D model width, F feed-forward width, E experts, K chosen per token, A = N·K assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import InputError

Direction = Literal["forward", "backward", "both"]

Form = Literal["concatenated", "grouped"]
"""How the products of a mixture of adapters are computed; the numbers are the same."""

_FLOPS_PER_BYTE = {"cpu": 10.0, "cuda": 150.0}
"""What a device multiplies and adds in the time in which it moves a byte, for half-wide products, in round numbers."""

_SORTING = {"cpu": 0.0, "cuda": 6e9}
"""What grouping takes besides, in the bytes that the device could have moved meanwhile: on a GPU it is many launches,
for sorting and for small products that do not fill it."""


@dataclass(frozen=True)
class Cost:
    """Of one feed-forward layer on N tokens.

    Args:
        parameters: that it has.
        active_parameters: that one token uses.
        flops: of the forward pass, a multiplication and an addition counted as two.
        weight_bytes: read from memory: the weights of every expert that has a token.
        activation_bytes: read and written between the steps.
    """

    parameters: int
    active_parameters: int
    flops: int
    weight_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        """Weights and activations."""
        return self.weight_bytes + self.activation_bytes

    def milliseconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least that the forward pass can take: arithmetic or memory, whichever is slower.

        Args:
            flops_per_second: of a large product on the device, see `engine.measure.ceilings`.
            bytes_per_second: of a large copy, read and written bytes together.
        """
        return 1e3 * max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def mixture(
    num_tokens: int,
    d_model: int,
    ffn_dim: int,
    num_experts: int,
    top_k: int,
    *,
    used_experts: float | None = None,
    element_bytes: int = 2,
) -> Cost:
    """Of E SwiGLU experts with a router, K experts a token.

    FLOPs: N·(2·D·E + K·6·D·F). Steps: logits, gathering, gate and up, silu-times, down, the weighted sum.

    Args:
        num_tokens: N.
        d_model: D.
        ffn_dim: F, of one expert.
        num_experts: E.
        top_k: K.
        used_experts: that have a token at all; what is expected of a balanced router when left out.
        element_bytes: width of a number, in bytes.

    Raises:
        InputError: a size is too small, or K is more than E.
    """
    _check(d_model=d_model, ffn_dim=ffn_dim, num_experts=num_experts, top_k=top_k, element_bytes=element_bytes)
    if top_k > num_experts:
        raise InputError(f"top_k ({top_k}) may not be more than num_experts ({num_experts}).")
    if used_experts is None:
        used_experts = expected_used_experts(num_tokens, num_experts, top_k)
    router, expert = d_model * num_experts, 3 * d_model * ffn_dim
    assignments = num_tokens * top_k
    routed = num_tokens * (d_model + num_experts)
    gathered = 2 * assignments * d_model
    combined = (assignments + num_tokens) * d_model
    activations = routed + gathered + assignments * _activations(d_model, ffn_dim) + combined
    return Cost(
        parameters=router + num_experts * expert,
        active_parameters=router + top_k * expert,
        flops=2 * num_tokens * router + 2 * assignments * expert,
        weight_bytes=round((router + used_experts * expert) * element_bytes),
        activation_bytes=activations * element_bytes,
    )


def dense(num_tokens: int, d_model: int, ffn_dim: int, *, element_bytes: int = 2) -> Cost:
    """Of one SwiGLU network: 6·N·D·F FLOPs.

    Args:
        num_tokens: N.
        d_model: D.
        ffn_dim: F.
        element_bytes: width of a number, in bytes.

    Raises:
        InputError: a size is too small.
    """
    _check(d_model=d_model, ffn_dim=ffn_dim, element_bytes=element_bytes)
    parameters = 3 * d_model * ffn_dim
    return Cost(
        parameters=parameters,
        active_parameters=parameters,
        flops=2 * num_tokens * parameters,
        weight_bytes=parameters * element_bytes,
        activation_bytes=num_tokens * _activations(d_model, ffn_dim) * element_bytes,
    )


def dense_width(ffn_dim: int, num_experts: int, top_k: int, equal: Literal["parameters", "FLOPs"]) -> int:
    """F of the dense network that equals a mixture: E·F + E/3 in parameters, K·F + E/3 in FLOPs, to the nearest.

    The third of E is the router, D numbers an expert where a unit of width has 3·D.

    Args:
        ffn_dim: F, of one expert.
        num_experts: E.
        top_k: K.
        equal: in what.
    """
    return round((num_experts if equal == "parameters" else top_k) * ffn_dim + num_experts / 3)


def expected_used_experts(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Experts that get at least one of N tokens if all are equally likely: E·(1 − (1 − K/E)^N).

    Args:
        num_tokens: N.
        num_experts: E.
        top_k: K.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def training_flops(forward: int, direction: Direction) -> int:
    """FLOPs of a direction: backward takes two products, for inputs and for weights, where forward takes one.

    Args:
        forward: FLOPs of the forward pass.
        direction: which.
    """
    return {"forward": 1, "backward": 2, "both": 3}[direction] * forward


def cheaper_form(num_experts: int, top_k: int, rank: int, width: int, device: str, num_tokens: int) -> Form:
    """The form of a mixture of adapters that takes less time: FLOPs / (FLOPs per byte) + bytes, of a forward pass.

    concatenated: N times 2·E·R·W FLOPs, and x, y, and u = x·A three times are moved
    grouped: N times 2·K·R·W FLOPs, and x and y are moved once for the tokens and twice for the assignments; and once
        what sorting the tokens takes

    Nothing hangs on it but time: the numbers are the same.

    Args:
        num_experts: E.
        top_k: K.
        rank: R.
        width: W, inputs and outputs of the adapted layer together.
        device: its kind; another than the CPU counts as a GPU.
        num_tokens: N.
    """
    E, K, R, W = num_experts, top_k, rank, width
    kind = device if device in _FLOPS_PER_BYTE else "cuda"
    size = 2  # bytes a number
    concatenated = num_tokens * (2 * E * R * W / _FLOPS_PER_BYTE[kind] + size * (W + 3 * E * R))
    grouped = num_tokens * (2 * K * R * W / _FLOPS_PER_BYTE[kind] + size * (1 + 2 * K) * W) + _SORTING[kind]
    return "concatenated" if concatenated <= grouped else "grouped"


def _activations(d_model: int, ffn_dim: int) -> int:
    """Numbers read and written for one row: D → 2F, 2F → F, F → D."""
    return (d_model + 2 * ffn_dim) + (2 * ffn_dim + ffn_dim) + (ffn_dim + d_model)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} ({size}) must be at least 1.")
