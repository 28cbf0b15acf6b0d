"""A mixture of low-rank adapters: each token is adapted by K of E experts, without a loop over them.

Legend: N tokens, I inputs, O outputs, E experts, K chosen per token, R rank, A assignments of a token to an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.autocast import product_dtype
from engine.errors import InputError
from engine.lora.layer import LARGEST_ALPHA, SMALLEST_ALPHA, check_rank
from engine.moe.cost import Form, cheaper_form
from engine.moe.gating import Choice, gate_columns, scaled, within
from engine.moe.grouped import Groups, grouped_product
from engine.moe.kinds import Kind, Unit
from engine.moe.routing import ExpertRouter

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
    numbers, small beside the tokens, whose gradient is handed back to the experts as views of one tensor.
    Experts that were views of one tensor would save it, but not survive `to`, `deepcopy` or an optimizer's ideas.

    Experts are kept busy by the router's selection bias, without a loss, so that two inputs with opposite targets end
    on different experts. Measured where it is hardest, ten unrelated tokens an input with a target each, an optimizer
    step for each input, 100 rounds, 50 seeds: how often most tokens of the two are on different experts.

    - 50 times as it is, and 23 times with a `bias_rate` of 0.
    - 34 times if the bias balances tokens: it is content then with half of each input on each of two experts. What it
      balances are texts, each of which counts for the expert that most of its tokens chose.
    - 46 times with softmax gates and a `temperature` of 1 together, 50 times with either alone.

    With a single token an input all of it is on another expert than the other's. Of several tokens that have nothing in
    common a bias, which shifts all of them alike, can part the middle ones only: most of five means three or more, and
    of an even number it may be half, counted for the lower number.

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

    def forward(self, x: Tensor, padding: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """What the mixture makes of x, finite for every finite x.

        Args:
            x: (…, I).
            padding: (…,), True where there is none but padding, for which the result is exactly 0.
            onto: (…, O), to which the result is added: inside the last product, if that is in its dtype. In float16 the
                sum is what stays finite.

        Returns:
            (…, O).

        Raises:
            InputError: as `ExpertRouter.route`; or `onto` has another shape than the result.
        """
        shape = (*x.shape[:-1], self.out_features)
        if onto is not None and onto.shape != shape:
            raise InputError(f"The result of shape {shape} cannot be added to a tensor of shape {tuple(onto.shape)}.")
        base = onto.reshape(-1, self.out_features) if onto is not None and onto.dtype == product_dtype(x) else None
        form = self.form or self.cheaper_form(x.device.type, x.shape[:-1].numel())
        y = (self._grouped if form == "grouped" else self._concatenated)(x, padding, base)  # (N, O)
        y = _saturated(y).view(shape)
        return y if onto is None or base is not None else onto + y.to(onto.dtype)

    def cheaper_form(self, device: str, num_tokens: int) -> Form:
        """The form that takes less time for so many tokens, as `engine.moe.cost.cheaper_form` has it."""
        width = self.in_features + self.out_features
        return cheaper_form(self.num_experts, self.top_k, self.rank, width, device, num_tokens)

    def _rows(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """x as (N, I), 0 where there is padding, in the products' dtype."""
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        return x.reshape(-1, self.in_features).to(product_dtype(x))

    def _concatenated(self, x: Tensor, padding: Tensor | None, base: Tensor | None) -> Tensor:
        choice = self._choice(x, padding)
        rows = self._rows(x, padding)  # (N, I)
        A, B = self._stacked(rows.dtype)
        u = rows @ A.transpose(0, 1).flatten(1)  # (N, E·R), or (N, R) if A is shared
        u = gate_columns(u, choice, self.num_experts, self.rank, self.scaling, self._limit(u.dtype))  # (N, E·R)
        return u @ B.flatten(0, 1) if base is None else base.addmm(u, B.flatten(0, 1))  # (N, O)

    def _choice(self, x: Tensor, padding: Tensor | None) -> Choice:
        if self.router.tokens_choose_freely:
            choice = self.router.choose(x, padding)
        else:  # a token has all experts, with a gate of 0 where it is not theirs
            gates = self.router.route(x, padding).dense_gates()  # (N, E)
            choice = Choice(torch.arange(self.num_experts, device=gates.device).expand(gates.shape), gates)
        return choice if self.silenced is None else choice.without(self.silenced)

    def _grouped(self, x: Tensor, padding: Tensor | None, base: Tensor | None) -> Tensor:
        routing = self.router.route(x, padding)
        gates = self.scaling * routing.gates  # (A,)
        if self.silenced is not None:
            gates = gates.masked_fill(routing.experts == self.silenced, 0)
        rows = self._rows(x, padding)  # (N, I)
        A, B = self._stacked(rows.dtype)
        groups = Groups(routing.counts)
        own = grouped_product(rows[routing.tokens], A, groups) if not self.shared_a else (rows @ A[0])[routing.tokens]
        u = scaled(within(own, self._limit(own.dtype)), gates[:, None])  # (A, R)
        y = _saturated(grouped_product(u, B, groups))  # (A, O)
        base = y.new_zeros(len(rows), self.out_features) if base is None else base
        return base.index_add(0, routing.tokens, y)

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A, (E, I, R) or (1, I, R), and all B, (E, R, O)."""
        readers = self.experts[:1] if self.shared_a else self.experts
        A = torch.stack([expert.A for expert in readers])
        if A.requires_grad and not torch.compiler.is_compiling():
            A.register_hook(Tensor.contiguous)  # else each expert's part of the gradient would be copied by itself
        return A.to(dtype), torch.stack([expert.B for expert in self.experts]).to(dtype)

    def _limit(self, dtype: torch.dtype) -> float:
        """Of |u|, so that neither s·u nor the sums of the product with B overflow."""
        room = torch.finfo(torch.float32).max / (_WEIGHT_ROOM * self.num_experts * self.rank)
        return min(torch.finfo(dtype).max, room) / max(self.scaling, 1.0)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        shared = ", shared_a=True" if self.shared_a else ""
        return f"{self.in_features}, {self.out_features}, experts={self.num_experts}, rank={self.rank}{shared}"


def _saturated(y: Tensor) -> Tensor:
    """y without infinities, which sums in float32 give only if they are rounded to float16."""
    largest = torch.finfo(torch.float16).max
    return y.clamp(-largest, largest) if y.dtype == torch.float16 else y


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
        return self.layer(x, onto=self.base(x))
