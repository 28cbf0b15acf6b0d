"""A mixture of low-rank adapters: each token is adapted by K of E experts, without a loop over them.

Legend: N tokens, I inputs, O outputs, E experts, K chosen per token, R rank, A assignments of a token to an expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.lora.layer import LARGEST_ALPHA, SMALLEST_ALPHA, check_rank
from engine.lora.product import product_dtype
from engine.moe.grouped import Groups, grouped_product
from engine.moe.kinds import Kind, Unit
from engine.moe.routing import ExpertRouter, Routing

Form = Literal["concatenated", "grouped"]
"""How the experts' products are computed; the numbers are the same."""

_FLOPS_PER_BYTE = {"cpu": 10.0, "cuda": 150.0}
"""What a device multiplies and adds in the time in which it moves a byte, for half-wide products, in round numbers."""

_WEIGHT_ROOM = 2.0**24
"""Of |B|: with it no sum overflows float32."""


class LoRAExpert(nn.Module):
    """One expert's factors.

    Args:
        A: (I, R), its own or shared with others.
        out_features: O; B (R, O) starts at 0.
    """

    def __init__(self, A: nn.Parameter, out_features: int) -> None:
        super().__init__()
        self.A = A
        self.B = nn.Parameter(A.new_zeros(A.shape[1], out_features))


class MoELoRALayer(nn.Module):
    """y = s·Σ gₑ(x)·x·Aₑ·Bₑ over the K experts that a router chooses for x, with s = α / R.

    As in `LoRALayer` each A starts uniform in ±1/√I and each B at exactly 0, and so does the output. The gate g of an
    expert that was not chosen is exactly 0, and so is its gradient.

    There is no loop over the experts. One form takes all of them for all tokens, as two products with the gates in
    between,

        u = x·[A₁ … A_E]    (N, E·R)
        y = s·(u ⊙ gates)·[B₁; …; B_E]    (N, O)

    E / K times the arithmetic but hardly any traffic, since R is small. The other gathers each expert's tokens and
    takes grouped products, which pays once E·R is large. `cheaper_form` chooses by cost.

    Every expert keeps its own parameters, and they are put side by side in each forward pass: a copy of E·R·(I + O)
    numbers, small beside the tokens, whose gradient is handed back to the experts as views, without another copy.
    Experts that were views of one tensor would save it, but not survive `to`, `deepcopy` or an optimizer's ideas.

    Experts are kept busy by the router's selection bias, without a loss, so that two inputs with opposite targets end
    on different experts. Three things make that hold:

    - What the bias balances are texts: a text counts for the expert that most of its tokens chose. Balanced tokens
      would be content if half of every text went to each of two experts.
    - The gates are sigmoids. With softmax an expert that gets all tokens learns a gate of 1, which drives the other's
      to 0: tokens that the bias sends there get nothing, and the bias chases logits that run away from it.
    - The router learns slower than the experts, by `temperature`: else each of Adam's steps moves the logits further
      than the bias has come.

    Args:
        in_features: I.
        out_features: O.
        num_experts: E.
        rank: R of each expert, from 1 to the smaller of I and O.
        top_k: K.
        alpha: α, from `SMALLEST_ALPHA` to `LARGEST_ALPHA`; R when left out.
        shared_a: one A for all experts (HydraLoRA): what they read is common, what they write is their own.
        kind: of routing, see `engine.moe.kinds`.
        bias_rate: first step of the selection bias, see `engine.moe.selection_bias`.
        temperature: of the router's logits, see `ExpertRouter`.
        balance: what it balances, "texts" or "tokens".
        form: "concatenated" or "grouped"; the cheaper one when left out.

    Raises:
        InputError: a value is out of range.

    Source: Wu et al. 2024, "Mixture of LoRA experts", https://arxiv.org/abs/2404.13628; Li et al. 2024, MixLoRA,
    https://arxiv.org/abs/2404.15159; shared A: Tian et al. 2024, HydraLoRA, https://arxiv.org/abs/2404.19245.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        rank: int,
        top_k: int = 1,
        *,
        alpha: float | None = None,
        shared_a: bool = False,
        kind: Kind = "sigmoid",
        bias_rate: float = 0.02,
        temperature: float = 32.0,
        balance: Unit = "texts",
        form: Form | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        alpha = rank if alpha is None else alpha
        if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
            raise InputError(f"alpha is {alpha}: it must be from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}.")
        if form not in (None, "concatenated", "grouped"):
            raise InputError(f"The form is {form!r}: choose concatenated or grouped, or leave it out for the cheaper.")
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.num_experts, self.top_k, self.shared_a, self.form = num_experts, top_k, shared_a, form
        self.scaling = alpha / rank
        self.router = ExpertRouter(
            in_features, num_experts, top_k, kind=kind, bias_rate=bias_rate, balance=balance, temperature=temperature
        )
        first = [nn.Parameter(torch.empty(in_features, rank)) for _ in range(1 if shared_a else num_experts)]
        self.experts = nn.ModuleList(LoRAExpert(first[e % len(first)], out_features) for e in range(num_experts))
        self.silenced: int | None = None
        """An expert whose gate is taken for 0; the others' stay as they are."""
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every A anew and set every B to 0; the router stays."""
        bound = self.in_features**-0.5
        for expert in self.experts:
            expert.A.uniform_(-bound, bound)
            expert.B.zero_()

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x (…, I) → (…, O), finite for every finite x; exactly 0 where `padding` (…,) is True.

        Raises:
            InputError: as `ExpertRouter.route`.
        """
        routing = self.router.route(x, padding)
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        dtype = product_dtype(x)
        rows = x.reshape(-1, self.in_features).to(dtype)  # (N, I)
        gates = self.scaling * routing.gates  # (A,)
        if self.silenced is not None:
            gates = gates.masked_fill(routing.experts == self.silenced, 0)
        form = self.form or cheaper_form(self, rows.device.type)
        y = (self._grouped if form == "grouped" else self._concatenated)(rows, routing, gates)  # (N, O)
        return _saturated(y).view(*x.shape[:-1], self.out_features)

    def _concatenated(self, rows: Tensor, routing: Routing, gates: Tensor) -> Tensor:
        A, B = self._stacked(rows.dtype)
        table = gates.new_zeros(routing.logits.shape).index_put((routing.tokens, routing.experts), gates)  # (N, E)
        table = table.to(rows.dtype)[:, :, None]  # (N, E, 1)
        u = self._finite(rows @ A.transpose(0, 1).flatten(1))  # (N, E·R), or (N, R) if A is shared
        return (u.unflatten(1, (-1, self.rank)) * table).flatten(1) @ B.flatten(0, 1)  # (N, O)

    def _grouped(self, rows: Tensor, routing: Routing, gates: Tensor) -> Tensor:
        A, B = self._stacked(rows.dtype)
        groups = Groups(routing.counts)
        own = grouped_product(rows[routing.tokens], A, groups) if not self.shared_a else (rows @ A[0])[routing.tokens]
        u = self._finite(own) * gates.to(rows.dtype)[:, None]  # (A, R)
        y = _saturated(grouped_product(u, B, groups))  # (A, O)
        return y.new_zeros(len(rows), self.out_features).index_add(0, routing.tokens, y)

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A, (E, I, R) or (1, I, R), and all B, (E, R, O)."""
        readers = self.experts[:1] if self.shared_a else self.experts
        A = torch.stack([expert.A for expert in readers])
        return A.to(dtype), torch.stack([expert.B for expert in self.experts]).to(dtype)

    def _finite(self, u: Tensor) -> Tensor:
        """u with what overflowed saturated, so that neither s·u nor the sums of the product with B overflow."""
        room = torch.finfo(torch.float32).max / (_WEIGHT_ROOM * self.num_experts * self.rank)
        limit = min(torch.finfo(u.dtype).max, room) / max(self.scaling, 1.0)
        return u.nan_to_num(0.0, limit, -limit).clamp(-limit, limit)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        shared = ", shared_a=True" if self.shared_a else ""
        return f"{self.in_features}, {self.out_features}, experts={self.num_experts}, rank={self.rank}{shared}"


def _saturated(y: Tensor) -> Tensor:
    """y without infinities, which sums in float32 give only if they are rounded to float16."""
    largest = torch.finfo(torch.float16).max
    return y.clamp(-largest, largest) if y.dtype == torch.float16 else y


def cheaper_form(layer: MoELoRALayer, device: str) -> Form:
    """The form that takes less time a token: FLOPs / (FLOPs per byte) + bytes, of a forward pass.

    concatenated: 2·E·R·(I + O) FLOPs, and x, y, and u three times are moved
    grouped: 2·K·R·(I + O) FLOPs, and x and y are moved once for the tokens and twice for the assignments
    """
    E, K, R, width = layer.num_experts, layer.top_k, layer.rank, layer.in_features + layer.out_features
    per_byte = _FLOPS_PER_BYTE.get(device, _FLOPS_PER_BYTE["cuda"])
    size = 2  # bytes a number
    concatenated = 2 * E * R * width / per_byte + size * (width + 3 * E * R)
    grouped = 2 * K * R * width / per_byte + size * (1 + 2 * K) * width
    return "concatenated" if concatenated <= grouped else "grouped"


class MoELoRALinear(nn.Module):
    """base(x) + layer(x), where base is a frozen linear layer.

    Args:
        base: kept as it is, without a gradient.
        layer: with as many inputs and outputs.

    Raises:
        InputError: they differ.
    """

    def __init__(self, base: nn.Linear, layer: MoELoRALayer) -> None:
        super().__init__()
        sizes, own = (base.in_features, base.out_features), (layer.in_features, layer.out_features)
        if sizes != own:
            raise InputError(
                f"A layer of {sizes[0]} to {sizes[1]} has a mixture of {own[0]} to {own[1]}; make them equal."
            )
        self.base, self.layer = base.requires_grad_(False), layer
        self.in_features, self.out_features = sizes
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """W of the base, (O, I)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """b of the base."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) → (…, O)."""
        y = self.base(x)
        return y + self.layer(x).to(y.dtype)
