"""Who gets the token? A router chooses K of E experts for each token and says how much each one counts.

    router = ExpertRouter(d_model=512, num_experts=8, top_k=2)
    routing = router.route(x)  # x (B, T, D)
    for every assignment a:  y[routing.tokens[a]] += routing.gates[a] · expert[routing.experts[a]](x[routing.tokens[a]])

Legend: B batch, T tokens of a text, N = B·T tokens, D model width, E experts, K experts chosen per token,
A assignments of a token to an expert, C capacity (tokens that an expert takes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from engine.errors import InputError
from engine.lora.product import without_autocast
from engine.moe.balance import capacity, check_capacity_factor
from engine.moe.kinds import KINDS, Kind, Step, Unit
from engine.moe.selection_bias import SelectionBias, in_backward

_HEADROOM = 2.0**40
"""The weight is divided by it before the product and the logits multiplied after: no sum of finite numbers overflows
on the way, and powers of two round nothing."""
_LARGEST_LOGIT = 2.0**100
_SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE = 1e-3, 1e6


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, and with what weight.

    The assignments are those that are carried out, sorted by expert and by token within an expert.

    Args:
        logits: with the noise in them if there is some, (N, E).
        probs: of the experts for each token, rows sum to 1, (N, E).
        tokens: of each assignment, index of the token, (A,).
        experts: of each assignment, (A,).
        gates: the weight of each assignment, (A,).
        counts: assignments of each expert, (E,).
        wanted: the same before capacity refused some, (E,).
        dropped: (token, expert) that capacity refused, (A', 2); with expert choice the tokens that no expert took,
            with the expert that is most probable for them.
        indices: the K experts of each token, best first, −1 for padding, (N, K); None for expert choice.
        num_tokens: how many of the N are no padding.
        valid: which ones, (N,); None if all are.
    """

    logits: Tensor
    probs: Tensor
    tokens: Tensor
    experts: Tensor
    gates: Tensor
    counts: Tensor
    wanted: Tensor
    dropped: Tensor
    indices: Tensor | None
    num_tokens: int
    valid: Tensor | None = None

    def dense_gates(self) -> Tensor:
        """The gates as a table, exactly 0 where a token does not go to an expert, (N, E)."""
        return self.gates.new_zeros(self.logits.shape).index_put((self.tokens, self.experts), self.gates)


class ExpertRouter(nn.Module):
    """Logits x·Wᵀ / τ, one for each expert; the K largest choose, their probabilities weigh.

    kind            score s          chosen by                   gates
    softmax         softmax(logits)  logits + bias               s of the chosen
    sigmoid         σ(logits)        σ(logits) + bias            s of the chosen
    noisy           softmax(logits)  logits + noise + bias       s with the noise
    expert choice   softmax(logits)  each expert, by s           s
    random          1                lot                         1 / K

    The gates of a token are divided by their sum if K > 1 and `normalize`; for K = 1 that would make them 1 and leave
    the router without a gradient. The bias (`engine.moe.selection_bias`) takes part in the selection only. For the
    softmax kinds it is added to the logits, which is to multiply the probabilities with its exponential: added to the
    probabilities it could not tell two tokens apart of which both are certain.

    W starts with orthogonal rows of norm τ that sum to 0, as far as D allows: the experts are equally likely for
    tokens without a preferred direction, and for those with an offset that all features share.

    Logits and probabilities are computed in float32 at least, whatever x's dtype or autocast's is (Switch, section
    2.4), and are finite for every finite x.

    Args:
        d_model: D.
        num_experts: E, at least 1.
        top_k: K, from 1 to E.
        kind: one of `KINDS`.
        bias_rate: the first step of the selection bias; 0 leaves the bias as it is.
        bias_step: "adaptive", or "fixed" as DeepSeek-V3's.
        noise: standard deviation of the noise on the logits in training, for the noisy kind.
        capacity_factor: an expert takes at most ⌊factor·N·K / E⌋ tokens, the first ones; None for no limit. With
            expert choice each takes exactly ⌈factor·N·K / E⌉, factor 1 if None.
        normalize: whether a token's gates sum to 1.
        temperature: τ of the logits x·Wᵀ / τ. W starts with rows of norm τ, so that the first logits are the same for
            every τ; with Adam the router then learns τ times slower.
        balance: what the bias counts, "tokens" or "texts": see `route`.

    Raises:
        InputError: a value is out of range.

    Source: Fedus et al. 2021, https://arxiv.org/abs/2101.03961; the other kinds' in `engine.moe.kinds`.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        kind: Kind = "softmax",
        bias_rate: float = 0.0,
        bias_step: Step = "adaptive",
        noise: float = 1.0,
        capacity_factor: float | None = None,
        normalize: bool = True,
        temperature: float = 1.0,
        balance: Unit = "tokens",
    ) -> None:
        super().__init__()
        _check(d_model, num_experts, top_k, kind, balance)
        if not 0 <= noise < math.inf:
            raise InputError(f"The noise is {noise}: it must be at least 0 and finite.")
        if not _SMALLEST_TEMPERATURE <= temperature <= _LARGEST_TEMPERATURE:
            raise InputError(
                f"The temperature is {temperature}: it must be from {_SMALLEST_TEMPERATURE:g} to "
                f"{_LARGEST_TEMPERATURE:g}."
            )
        if capacity_factor is not None:
            check_capacity_factor(capacity_factor)
        self.d_model, self.num_experts, self.top_k, self.kind = d_model, num_experts, top_k, kind
        self.noise, self.capacity_factor, self.balance = noise, capacity_factor, balance
        self.normalize, self.temperature = normalize and top_k > 1, temperature
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.balancer = SelectionBias(num_experts, bias_rate, bias_step)
        self.observers: list[Callable[[Routing], None]] = []
        """Called with every routing, but not when checkpointing computes it a second time."""
        self.reset_parameters()

    @property
    def selection_bias(self) -> Tensor:
        """The bias itself, (E,), float32: to be read, or written in place."""
        self.balancer.settle()
        return self.balancer.values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W anew; the bias stays."""
        rows = torch.randn(self.weight.shape, dtype=torch.float32, device=self.weight.device)  # (E, D)
        if self.d_model > 1:
            rows -= rows.mean(1, keepdim=True)
        if self.num_experts < self.d_model:
            rows = torch.linalg.qr(rows.T).Q.T
        self.weight.copy_(rows * (self.temperature / rows.norm(dim=1, keepdim=True)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (…, D) → probabilities (…, E) and the chosen experts, best first, (…, K); expert choice has no such table.

        Raises:
            InputError: as `route`; or the kind is expert choice, which has no K experts for each token.
        """
        if self.kind == "expert choice":
            raise InputError("With expert choice a token has no K experts of its own: call route instead.")
        logits = self.logits(x)  # (…, E)
        chosen, log_scores = self.select(logits)
        return log_scores.softmax(-1), chosen

    def logits(self, x: Tensor) -> Tensor:
        """x·Wᵀ / τ with the noise in it, (…, D) → (…, E), in float32 at least.

        Raises:
            InputError: the width is not D, or on the CPU: W or x is not finite.
        """
        if x.shape[-1:] != (self.d_model,):
            raise InputError(f"The router takes tokens of width {self.d_model}, given is a tensor of {tuple(x.shape)}.")
        precise = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            if x.is_cuda and x.dtype == self.weight.dtype == torch.bfloat16:
                product = _WideProduct.apply(x.reshape(-1, self.d_model), self.weight / _HEADROOM)  # (N, E)
                product = product.view(*x.shape[:-1], self.num_experts)
            else:
                product = F.linear(x.to(precise), self.weight.to(precise) / _HEADROOM)  # (…, E)
        if product.device.type == "cpu" and not torch.compiler.is_compiling() and not product.isfinite().all():
            raise InputError(self._not_finite(x))
        largest = _LARGEST_LOGIT / _HEADROOM * min(self.temperature, 1.0)
        product = product.masked_fill(product.isinf(), math.nan)  # what is not finite came in: it must not look as if
        logits = product.clamp(-largest, largest) * (_HEADROOM / self.temperature)
        if self.kind == "noisy" and self.training:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (…, E) → the chosen experts, best first, (…, K), and the logarithm of the scores, (…, E)."""
        self.balancer.settle()
        bias = self.balancer.values.to(logits.dtype)
        if self.kind == "random":
            return torch.rand_like(logits).topk(self.top_k, dim=-1).indices, torch.zeros_like(logits)
        if self.kind == "sigmoid":
            return (logits.sigmoid() + bias).topk(self.top_k, dim=-1).indices, F.logsigmoid(logits)
        return (logits + bias).topk(self.top_k, dim=-1).indices, logits

    def route(self, x: Tensor, padding: Tensor | None = None) -> Routing:
        """Who gets which token.

        Args:
            x: (…, D). With `balance="texts"` the dimension before the last runs over the tokens of a text, if there are
                three or more; every token is a text otherwise.
            padding: (…,), True where there is none but padding; it goes to no expert and counts nowhere.

        Returns:
            the routing of the N = product of (…) tokens.

        Raises:
            InputError: a shape does not fit, or on the CPU: W or x is not finite.
        """
        valid = None
        if padding is not None:
            if padding.shape != x.shape[:-1]:
                raise InputError(
                    f"The padding has shape {tuple(padding.shape)}: the tokens have {tuple(x.shape[:-1])}."
                )
            valid = ~padding.reshape(-1)  # (N,)
            x = x.masked_fill(padding[..., None], 0)  # whatever is there, NaN too
        logits = self.logits(x).reshape(-1, self.num_experts)  # (N, E)
        if self.kind == "expert choice":
            routing = self._experts_choose(logits, valid)
        else:
            routing = self._tokens_choose(logits, valid, x.shape[-2] if x.dim() > 2 else 1)
        if self.observers and not in_backward():
            for observe in self.observers:
                observe(routing)
        return routing

    def _tokens_choose(self, logits: Tensor, valid: Tensor | None, text_length: int) -> Routing:
        indices, log_scores = self.select(logits)  # (N, K), (N, E)
        probs = log_scores.softmax(-1)  # (N, E)
        chosen = log_scores.gather(-1, indices)  # (N, K)
        if self.normalize or self.kind == "random":
            gates = chosen.softmax(-1)
        else:
            gates = chosen.exp() if self.kind == "sigmoid" else probs.gather(-1, indices)
        num_tokens, sorting = logits.shape[0], indices
        if valid is not None:
            num_tokens = int(valid.sum())
            indices = indices.masked_fill(~valid[:, None], -1)
            sorting = indices.masked_fill(~valid[:, None], self.num_experts)  # padding comes last
        experts, assignment = sorting.flatten().sort(stable=True)  # (N·K,)
        offsets = torch.searchsorted(experts, torch.arange(self.num_experts + 1, device=experts.device))  # (E + 1,)
        wanted = counts = offsets.diff()
        experts, assignment = experts[: num_tokens * self.top_k], assignment[: num_tokens * self.top_k]  # (A,)
        dropped = experts.new_empty(0, 2)
        tokens = assignment // self.top_k
        if self.capacity_factor is not None:
            C = capacity(num_tokens, self.num_experts, self.top_k, self.capacity_factor)
            kept = torch.arange(len(experts), device=experts.device) - offsets[experts] < C  # (A,)
            dropped = torch.stack([tokens[~kept], experts[~kept]], dim=1)
            tokens, experts, assignment = tokens[kept], experts[kept], assignment[kept]
            counts = counts.clamp_max(C)
        gates = self.balancer.watch(gates.flatten()[assignment], lambda: self._load(wanted, indices, text_length))
        return Routing(logits, probs, tokens, experts, gates, counts, wanted, dropped, indices, num_tokens, valid)

    def _load(self, wanted: Tensor, indices: Tensor, text_length: int) -> Tensor:
        """What the bias balances: the tokens of each expert, or the texts of which it is among the K most used."""
        if self.balance == "tokens":
            return wanted.to(torch.float32)
        texts = indices.reshape(-1, text_length * self.top_k)  # (B, T·K)
        counts = F.one_hot(texts + 1, self.num_experts + 1).sum(1)[:, 1:]  # (B, E)
        order = torch.arange(self.num_experts, 0, -1, device=counts.device) - 1  # the first of those that are equal
        votes = (counts * self.num_experts + order).topk(self.top_k).indices  # (B, K)
        voted = counts.gather(1, votes) > 0
        return torch.zeros_like(counts).scatter(1, votes, voted.to(counts.dtype)).sum(0).to(torch.float32)

    def _experts_choose(self, logits: Tensor, valid: Tensor | None) -> Routing:
        E, N = self.num_experts, logits.shape[0]
        probs = logits.softmax(-1)  # (N, E)
        candidates = torch.arange(N, device=logits.device) if valid is None else valid.nonzero()[:, 0]
        num_tokens = len(candidates)
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        C = min(math.ceil(factor * num_tokens * self.top_k / E - 1e-9), num_tokens)
        best = probs.detach()[candidates].topk(C, dim=0).indices  # (C, E)
        tokens = candidates[best].sort(dim=0).values.T.flatten()  # (A,)
        experts = torch.arange(E, device=logits.device).repeat_interleave(C)  # (A,)
        untaken = torch.ones(N, dtype=torch.bool, device=logits.device) if valid is None else valid.clone()
        untaken[tokens] = False
        left = untaken.nonzero()[:, 0]
        dropped = torch.stack([left, probs[left].argmax(-1)], dim=1)  # (A', 2)
        counts = torch.full((E,), C, device=logits.device)
        wanted = counts + torch.bincount(dropped[:, 1], minlength=E)
        gates = probs[tokens, experts]
        return Routing(logits, probs, tokens, experts, gates, counts, wanted, dropped, None, num_tokens, valid)

    def _not_finite(self, x: Tensor) -> str:
        wrong = int((~self.weight.isfinite()).sum())
        if wrong:
            return (
                f"The router's weight has {wrong} of {self.weight.numel()} numbers that are not finite: training has "
                "diverged; lower the learning rate, or go back to earlier weights."
            )
        wrong = int((~x.isfinite()).any(-1).sum())
        return (
            f"The router was given {wrong} of {x.shape[:-1].numel()} tokens that are not finite: look at the layer "
            "before it."
        )

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.d_model}, experts={self.num_experts}, top_k={self.top_k}, kind={self.kind!r}"


class _WideProduct(torch.autograd.Function):
    """x·Wᵀ of bfloat16 numbers, (N, D) and (E, D) → (N, E), summed up and given in float32, without a float32 x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(x.dtype)  # (N, E)
        return gradient @ weight, gradient.T @ x


def check_finite(routing: Routing, name: str = "The router") -> None:
    """Raise `InputError`, with the router's name, if a logit is NaN; waits for a GPU, as `route` does not."""
    wrong = int(routing.logits.isnan().any(-1).sum())
    if wrong:
        raise InputError(
            f"{name} gave logits that are not finite for {wrong} of {len(routing.logits)} tokens: training has "
            "diverged; lower the learning rate, or go back to earlier weights."
        )


def _check(d_model: int, num_experts: int, top_k: int, kind: str, balance: str) -> None:
    if d_model < 1 or num_experts < 1:
        raise InputError(f"The router has width {d_model} and {num_experts} experts: both must be at least 1.")
    if not 1 <= top_k <= num_experts:
        raise InputError(f"Each token chooses {top_k} of {num_experts} experts: choose from 1 to {num_experts}.")
    if kind not in KINDS:
        raise InputError(f"The kind of routing is {kind!r}: choose one of {', '.join(KINDS)}.")
    if balance not in ("tokens", "texts"):
        raise InputError(f"The bias is to balance {balance!r}: choose tokens or texts.")
