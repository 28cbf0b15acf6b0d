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

from engine.autocast import without_autocast
from engine.errors import InputError
from engine.moe.balance import admit, capacity, check_capacity_factor
from engine.moe.gating import Choice, choose_in_one_launch, has_kernels
from engine.moe.kinds import KINDS, Kind, Step, Unit
from engine.moe.selection_bias import SelectionBias, count_votes, in_backward

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
        choice: the K experts of each token and their gates before capacity; None for expert choice.
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
    choice: Choice | None
    num_tokens: int
    valid: Tensor | None = None

    @property
    def indices(self) -> Tensor | None:
        """The K experts of each token, best first, −1 for padding, (N, K); None for expert choice."""
        return None if self.choice is None else self.choice.indices

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

    W starts with rows of norm τ that sum to 0 each, orthogonal if E < D: the experts are about equally likely for
    tokens without a preferred direction, also with an offset that is the same for all features, which such rows do not
    see. Of 128 normal tokens each of 4 experts gets 5 to 70 % for each of 100 seeds if D is 5 or more; rows of fewer
    features crowd, for D = 4, 3, 2 it is 99, 89, 28 seeds. An offset of its own for each feature is a preferred
    direction, in which a fresh router leans to one expert: if the offsets vary half as much as the tokens 81 to 88 of
    100 seeds stay within these bounds, if they vary as much 30 to 36. The bias or a loss balances that in training.

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
        capacity_factor: an expert takes at most `engine.moe.balance.capacity` tokens, ⌊factor·N·K / E⌋, first those
            whose first choice it is; None for no limit. With expert choice each takes exactly ⌈factor·N·K / E⌉, factor
            1 if None.
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
            InputError: the width is not D; or, on the CPU and outside of torch.compile, W or x is not finite. On a GPU
                and in compiled code nobody looks, since that would wait for the device or break the graph: the logits
                of such a token are NaN, which `check_finite` finds.
        """
        product = self._product(x)
        product = product.masked_fill(product.isinf(), math.nan)  # what is not finite came in: it must not look as if
        logits = product.clamp(-self._largest, self._largest) * self._scale
        if self.kind == "noisy" and self.training:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits

    @property
    def _options(self) -> dict[str, float]:
        """How a choice is made of the product, in one launch."""
        return {
            "sigmoid": self.kind == "sigmoid",
            "normalize": self.normalize,
            "largest": self._largest,
            "scale": self._scale,
        }

    @property
    def _scale(self) -> float:
        return _HEADROOM / self.temperature

    @property
    def _largest(self) -> float:
        """Of the product."""
        return _LARGEST_LOGIT / _HEADROOM * min(self.temperature, 1.0)

    def _product(self, x: Tensor) -> Tensor:
        """x·Wᵀ / headroom, (…, D) → (…, E)."""
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
        return product

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
            InputError: a shape does not fit; or as `logits`.
        """
        x, valid = self._without_padding(x, padding)
        logits = self.logits(x).reshape(-1, self.num_experts)  # (N, E)
        if self.kind == "expert choice":
            routing = self._experts_choose(logits, valid)
        else:
            routing = self._tokens_choose(x, logits, valid)
        self._observe(routing)
        return routing

    def choose(self, x: Tensor, padding: Tensor | None = None) -> Choice:
        """Whom `route` chooses, up to ties, without the sorting: for layers that compute all experts for all tokens.

        With gradient checkpointing the backward pass must be run while the same observers look on, since what they are
        shown is computed only for them.

        Args:
            x: as for `route`.
            padding: as for `route`.

        Raises:
            InputError: as `route`; or not every token has K experts, since the kind is expert choice or there is a
                capacity.
        """
        if not self.tokens_choose_freely:
            raise InputError("With expert choice or a capacity a token has no K experts of its own: call route.")
        if self.observers:
            return self.route(x, padding).choice
        x, valid = self._without_padding(x, padding)
        noisy = self.kind == "random" or (self.kind == "noisy" and self.training)
        if noisy or not has_kernels(x, self.num_experts):
            choice, _ = self._choose(self.logits(x).reshape(-1, self.num_experts), valid)
            return self._watched(choice, x)
        self.balancer.settle()
        product = self._product(x).reshape(-1, self.num_experts)  # (N, E)
        counted = self.balancer.counts(product) and self._balances_tokens(x)
        counts = product.new_zeros(self.num_experts, dtype=torch.int32) if counted else None
        choice = choose_in_one_launch(product, self.balancer.values, valid, counts, self.top_k, self._options)
        return self._watched(choice, x, counts)

    @property
    def tokens_choose_freely(self) -> bool:
        """Whether every token gets the K experts that it chooses."""
        return self.kind != "expert choice" and self.capacity_factor is None

    def _without_padding(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if padding is None:
            return x, None
        if padding.shape != x.shape[:-1]:
            raise InputError(f"The padding has shape {tuple(padding.shape)}: the tokens have {tuple(x.shape[:-1])}.")
        return x.masked_fill(padding[..., None], 0), ~padding.reshape(-1)  # whatever is there, NaN too

    def _observe(self, routing: Routing) -> None:
        if self.observers and not in_backward():
            for observe in self.observers:
                observe(routing)

    def _choose(self, logits: Tensor, valid: Tensor | None) -> tuple[Choice, Tensor]:
        """The choice of (N, E) logits, and the logarithm of the scores, (N, E)."""
        indices, log_scores = self.select(logits)  # (N, K), (N, E)
        chosen = log_scores.gather(-1, indices)  # (N, K)
        if self.normalize or self.kind == "random":
            gates = chosen.softmax(-1)
        elif self.kind == "sigmoid":
            gates = chosen.exp()
        else:
            gates = log_scores.softmax(-1).gather(-1, indices)
        if valid is not None:
            indices = indices.masked_fill(~valid[:, None], -1)
        return Choice(indices, gates), log_scores

    def _balances_tokens(self, x: Tensor) -> bool:
        """Whether the bias counts tokens, as it does too where every token is a text."""
        return self.balance == "tokens" or x.dim() < 3 or x.shape[-2] <= 1

    def _watched(self, choice: Choice, x: Tensor, wanted: Tensor | None = None) -> Choice:
        """The choice, whose tokens (`wanted` an expert, if known) or votes of texts the bias counts."""

        def load() -> Tensor:
            if not self._balances_tokens(x):
                return count_votes(choice.indices.view(-1, x.shape[-2], self.top_k), self.num_experts)
            return (self._count(choice.indices) if wanted is None else wanted).to(torch.float32)

        return choice._replace(gates=self.balancer.watch(choice.gates, load))

    def _count(self, indices: Tensor) -> Tensor:
        """The assignments of each expert, (E,)."""
        places = indices.flatten().remainder(self.num_experts + 1)  # padding's −1 becomes E
        return places.new_zeros(self.num_experts + 1).scatter_add(0, places, torch.ones_like(places))[:-1]

    def _tokens_choose(self, x: Tensor, logits: Tensor, valid: Tensor | None) -> Routing:
        choice, log_scores = self._choose(logits, valid)
        num_tokens = logits.shape[0] if valid is None else int(valid.sum())
        sorting = choice.indices.remainder(self.num_experts + 1)  # padding comes last
        experts, assignment = sorting.flatten().sort(stable=True)  # (N·K,)
        offsets = torch.searchsorted(experts, torch.arange(self.num_experts + 1, device=experts.device))  # (E + 1,)
        wanted = counts = offsets.diff()
        choice = self._watched(choice, x, wanted)
        experts, assignment = experts[: num_tokens * self.top_k], assignment[: num_tokens * self.top_k]  # (A,)
        dropped = experts.new_empty(0, 2)
        tokens = assignment // self.top_k
        if self.capacity_factor is not None:
            C = capacity(num_tokens, self.num_experts, self.top_k, self.capacity_factor)
            kept = admit(sorting, C).flatten()[assignment]  # (A,)
            dropped = torch.stack([tokens[~kept], experts[~kept]], dim=1)
            tokens, experts, assignment = tokens[kept], experts[kept], assignment[kept]
            counts = counts.clamp_max(C)
        gates, probs = choice.gates.flatten()[assignment], log_scores.softmax(-1)
        return Routing(logits, probs, tokens, experts, gates, counts, wanted, dropped, choice, num_tokens, valid)

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
    """Raise `InputError`, with the router's name, if a logit is NaN.

    It waits for a GPU, as `route` does not, and looks where compiled code does not.
    """
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
