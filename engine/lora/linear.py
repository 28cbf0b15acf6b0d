"""A frozen linear layer with a low-rank update beside it, that can be merged into it and taken out again.

Legend: I inputs, O outputs, R rank; W (O, I) frozen, A (I, R), B (R, O), s scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.autocast import product_dtype, without_autocast
from engine.errors import InputError
from engine.lora.layer import LoRALayer, ScalingRule, standard_scaling
from engine.lora.product import (
    AdaptedWeight,
    adapted_linear,
    adapted_linears,
)
from engine.model import has_hooks
from engine.quantization.production import StoredWeight

Start = Callable[["LoRALinear"], None]
"""Gives a fresh adapted layer its first A and B, and with them its first frozen weight."""


class LoRALinear(nn.Module):
    """x·Wᵀ + b + s·drop(x)·A·B around a linear layer that is frozen and kept as ``base``.

    Where `base` is exactly an `nn.Linear`, or bitsandbytes' `Linear4bit` (QLoRA), that stays frozen, nothing is dropped
    and no part has hooks or a `forward` of its own, one function computes the sum (`engine.lora.product`). Any other
    base, one in 8 bits or one that computes in another dtype than x's say, computes its own product, and the update is
    added.

    The state (`state_dict`) is that of the unmerged layer, merged or not; loading one into a merged layer unmerges it.

    Args:
        base: the layer to adapt.
        rank: R, from 1 to the smaller side of `base`.
        alpha: α, R when left out.
        dropout: share of the update's inputs that is dropped in training.
        scaling_rule: s from α and R.
        start: gives A and B their first values; when left out, A is random and B is 0.
        dtype: of A and B; `own_dtype` of `base` when left out. They are cast to the input's dtype to compute, so that
            float32 here next to a bfloat16 base keeps exact sums of small steps at the price of casting two small
            matrices; `engine.flat_optimizer` keeps them without that.

    Raises:
        InputError: a value is out of range.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        scaling_rule: ScalingRule = standard_scaling,
        start: Start | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"The dropout is {dropout}: it must be at least 0 and below 1.")
        self.base = base.requires_grad_(False)
        self.adapter = LoRALayer(base.in_features, base.out_features, rank, alpha, scaling_rule=scaling_rule)
        self.adapter.to(base.weight.device, dtype or own_dtype(base))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self._unmerged: tuple[nn.Parameter, ...] = ()  # not the module's own: not in its parameters
        self.register_state_dict_post_hook(_store_unmerged)
        self.register_load_state_dict_pre_hook(_unmerge_before_loading)
        if start is not None:
            start(self)
        self.train(base.training)

    @property
    def in_features(self) -> int:
        """I."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """W as `base` holds it: with the update in it while merged, without it otherwise."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """b."""
        return self.base.bias

    @property
    def merged(self) -> bool:
        """Whether the update is in `base`'s weight."""
        return bool(self._unmerged)

    @property
    def frozen_weight(self) -> Tensor:
        """W without the update, merged or not, (O, I)."""
        self._check_plain()
        return self._unmerged[0] if self._unmerged else self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) → (…, O)."""
        return self.base(x) if self.merged else self.adapted(x)

    @staticmethod
    def together(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
        """What each of several layers makes of the same x, in one function where all of them can be part of it."""
        if all(type(layer) is LoRALinear and not layer.merged for layer in layers):
            operands = [layer._operands(x, layer.base.bias) for layer in layers]
            if all(operands):
                return adapted_linears(x, operands)
        return tuple(layer(x) for layer in layers)

    def adapted(self, x: Tensor) -> Tensor:
        """What `forward` gives while the update is not merged."""
        return self._product(x, self.base.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + s·drop(x)·A·B + `bias`, which is `base`'s own or None."""
        if operands := self._operands(x, bias):
            return adapted_linear(x, *operands)
        if bias is self.base.bias:
            y = self.base(x)  # (…, O)
        elif has_hooks(self.base):
            y = self.base(x) - self.base.bias
        else:
            y = F.linear(x, self.base.weight)
        return y + self._update(self.dropout(x)).to(y.dtype)

    def _update(self, x: Tensor) -> Tensor:
        """s·x·A·B, (…, I) → (…, O); a call of `adapter` would saturate, which costs four passes."""
        if has_hooks(self.adapter):
            return self.adapter(x)
        return self.adapter.scaling * (x @ self.adapter.A.to(x.dtype) @ self.adapter.B.to(x.dtype))

    def _operands(self, x: Tensor, bias: Tensor | None) -> AdaptedWeight | None:
        """What one function needs to compute all; None unless `base` is frozen, nothing is dropped, nobody watches."""
        base, adapter, dropout = self.base, self.adapter, self.dropout  # looking a module's parts up takes its time
        b = base.bias
        dropping = self.training and dropout.p > 0
        if dropping or (b is not None and b.requires_grad) or any(map(has_hooks, (base, adapter, dropout))):
            return None
        if type(base) is nn.Linear:
            weight = None if base.weight.requires_grad else base.weight
        else:
            weight = _stored_weight(base, x)
        return None if weight is None else AdaptedWeight(weight, bias, adapter.A, adapter.B, adapter.scaling)

    def _replace_weight(self, weight: Tensor) -> None:
        """Give `base` another W, (O, I); whoever shares the old one, an embedding say, keeps it."""
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """The weight that the layer was given, (O, I): W, with what `start_from` has taken out of it added again."""
        if self.start_A is None:
            return self.frozen_weight
        started = self._product_of(self.start_A, self.start_B)
        return self.frozen_weight.to(started.dtype) + started

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Set A and B and take s·(A·B)ᵀ out of the given weight, so that the layer gives what it was given to give.

        Raises:
            InputError: A, B or what is left of the weight is too large for its dtype; nothing has changed then.
        """
        A, B = A.to(self.adapter.A), B.to(self.adapter.B)  # the weight makes up for their rounding
        rest = self.rest_of_start(A, B)
        self.adapter.A.copy_(A)
        self.adapter.B.copy_(B)
        self.start_A, self.start_B = A.detach().clone(), B.detach().clone()
        self._replace_weight(rest)

    @torch.no_grad()
    def rest_of_start(self, A: Tensor, B: Tensor) -> Tensor:
        """What `start_from` would leave of the given weight, (O, I).

        Raises:
            InputError: A, B or the rest is too large for its dtype.
        """
        A, B = A.to(self.adapter.A), B.to(self.adapter.B)
        rest = (self.original_weight() - self._product_of(A, B)).to(self.base.weight.dtype)
        if not all(part.isfinite().all() for part in (A, B, rest)):
            raise InputError(
                f"The adapter cannot start inside the weight, its values are too large for {A.dtype} or {rest.dtype}: "
                "give it float32 adapters, or a larger alpha."
            )
        return rest

    def factors(self) -> tuple[Tensor, Tensor]:
        """A' (I, R') and B' (R', O) with s·A'·B' the change from the layer as it was given, transposed.

        They are A and B, unless those started inside the weight (`pissa_start`): then [A, A₀] and [B; −B₀], R' = 2R.
        """
        A, B = self.adapter.A.detach(), self.adapter.B.detach()
        if self.start_A is None:
            return A, B
        return torch.cat([A, self.start_A], dim=1), torch.cat([B, -self.start_B])

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = s·(A'·B')ᵀ, the change of the weight from what the layer was given, (O, I), at least float32."""
        A, B = self.factors()
        return self._product_of(A, B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s·(A·B)ᵀ, (O, I), at least float32: rounded to `base`'s dtype once, by `merge`."""
        update = self._product_of(self.adapter.A, self.adapter.B)
        return self.frozen_weight.to(update.dtype) + update

    def _product_of(self, A: Tensor, B: Tensor) -> Tensor:
        precise = torch.promote_types(A.dtype, torch.float32)
        with without_autocast(A):
            return self.adapter.scaling * (A.to(precise) @ B.to(precise)).T

    def merge(self) -> None:
        """Put the update into `base`'s weight, so that the layer costs what `base` costs; again: nothing.

        The weight without the update is kept as it is, since a difference of rounded numbers would not give it back:
        `unmerge` is exact to the bit in every dtype, and a merged layer holds two matrices, O·I numbers more.

        Raises:
            InputError: `base` is no plain `nn.Linear`, or the update is not finite.
        """
        if self.merged:
            return
        merged = self.merged_weight().to(self.base.weight.dtype)
        if not merged.isfinite().all():
            raise InputError("The adapter holds numbers that are not finite: it cannot be merged.")
        original = self.base.weight
        self._replace_weight(merged)
        self._unmerged = (original,)

    def unmerge(self) -> None:
        """Give `base` the very weight back that it had before `merge`; without one: nothing."""
        if not self._unmerged:
            return
        merged, (original,) = self.base.weight, self._unmerged
        original.data = original.data.to(merged.device, merged.dtype)  # the model may have moved meanwhile
        self.base.weight, self._unmerged = original, ()

    def _check_plain(self) -> None:
        if type(self.base) is not nn.Linear or "weight" not in self.base._parameters:  # hooks may compute a weight
            raise InputError(
                f"The adapted layer is a {type(self.base).__name__}, whose weight cannot be read and written as a "
                "matrix: merging, DoRA and a PiSSA start need a plain nn.Linear."
            )


def _stored_weight(base: nn.Linear, x: Tensor) -> StoredWeight | None:
    """W in few bits as `adapted_linears` takes it; None if `base` may do anything but multiply with it in that dtype.

    A `Linear4bit` gives x's dtype back, whatever autocast's is.
    """
    stored = StoredWeight.of(base)
    plainly = stored and base.compute_dtype in (None, x.dtype) and product_dtype(x) == x.dtype
    return stored if plainly else None


def own_dtype(base: nn.Linear) -> torch.dtype:
    """What A and B of an adapter on `base` are kept in: its weight's dtype, float32 where that holds packed codes."""
    packed = getattr(base.weight, "quant_state", None) is not None or not base.weight.is_floating_point()
    return torch.float32 if packed else base.weight.dtype


class DoRALinear(LoRALinear):
    """m ⊙ (x·W'ᵀ) / ‖W'‖ + b with W' = W + s·(A·B)ᵀ: direction and magnitude of each output's weights apart (DoRA).

    m (O,) is learned and starts at ‖W'‖, the norms of the rows of W', so that the layer starts as it was given. It is
    kept in at least float32, since small steps would not move a bfloat16 number, and so is its ratio to ‖W'‖ until it
    has been multiplied with: outputs in bfloat16 are in float32 for that while. The gradient takes ‖W'‖ for a
    constant, as in section 4.3 of the paper. The norms come from the small factors:
    ‖W'_o‖² = ‖W_o‖² + 2s·(W·A)_o·B_o + s²·B_oᵀ·(AᵀA)·B_o, and W' is never made. Where the update takes W_o away, what
    is left of the sum is rounding: it counts as no less than ε·‖W_o‖², ε that of W's dtype.

    PEFT drops inputs of the base product too when there is dropout; here only the update's are dropped.

    Args and errors: as `LoRALinear`; `base` must be a plain `nn.Linear`.

    Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        scaling_rule: ScalingRule = standard_scaling,
        start: Start | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, scaling_rule=scaling_rule, start=start, dtype=dtype)
        self.magnitude = nn.Parameter(self._row_norms())

    def adapted(self, x: Tensor) -> Tensor:
        """What `forward` gives while the update is not merged."""
        y = self._product(x, None)  # (…, O)
        y = (y * (self.magnitude / self._row_norms())).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W'_o‖ of every output, (O,), at least float32."""
        W, s = self.frozen_weight, self.adapter.scaling
        precise = torch.promote_types(self.adapter.A.dtype, torch.float32)
        with without_autocast(W):
            A, B = self.adapter.A.to(precise), self.adapter.B.to(precise)
            WA = (W @ self.adapter.A.to(W.dtype)).to(precise)  # (O, R)
            frozen = torch.linalg.vector_norm(W, dim=1, dtype=precise).square()
            squares = frozen + 2 * s * (WA * B.T).sum(1) + s**2 * (B * (A.T @ A @ B)).sum(0)  # (O,)
        least = (torch.finfo(W.dtype).eps * frozen).clamp_min(torch.finfo(precise).tiny)
        return squares.maximum(least).sqrt()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """m ⊙ W' / ‖W'‖, (O, I), at least float32."""
        directed = super().merged_weight()
        return (self.magnitude / self._row_norms()).to(directed.dtype)[:, None] * directed

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The change of the weight from what the layer was given, (O, I); unlike A·B it may have any rank."""
        return self.merged_weight() - self.original_weight()


def _store_unmerged(layer: LoRALinear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put the weight without the update into the state: A and B are there too, and it would count twice."""
    if layer.merged:
        merged, original = state[f"{prefix}base.weight"], layer.frozen_weight.to(layer.base.weight)
        state[f"{prefix}base.weight"] = original if isinstance(merged, nn.Parameter) else original.detach()


def _unmerge_before_loading(layer: LoRALinear, *_arguments: Any) -> None:
    layer.unmerge()  # or what is loaded would be lost when the weight from before the merge comes back


def pissa_start(layer: LoRALinear) -> None:
    """Start from the principal part of W = U·S·Vᵀ instead of from nothing, and freeze only the rest (PiSSA).

        A₀ = V_R·√(S_R / s)    B₀ = √(S_R / s)·U_Rᵀ    W ← W − s·(A₀·B₀)ᵀ

    so that the layer starts as it was given, and the first gradients reach A and B along the directions that carry
    most. A₀ and B₀ are kept: they are small, and with them the change from the given weight is s·(A·B − A₀·B₀).

    Args:
        layer: a fresh adapted layer around a plain `nn.Linear`.

    Raises:
        InputError: its base is something else.

    Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948.
    """
    W, rank = layer.frozen_weight, layer.adapter.rank
    precise = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(precise, full_matrices=False)  # (O, K), (K,), (K, I) with K = min(O, I)
    root = (S[:rank] / layer.adapter.scaling).sqrt()  # (R,)
    layer.start_from(Vh[:rank].T * root, root[:, None] * U[:, :rank].T)
