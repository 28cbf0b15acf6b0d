"""Error-compensated rounding: what one weight loses, those still to be rounded make good (GPTQ).

Legend: N tokens seen, O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.errors import InputError
from engine.quantization.calibration import InputStatistics
from engine.quantization.data_types import DataType, data_type
from engine.quantization.grouping import Grouping, per_block
from engine.quantization.tensor import Grid, QuantizedTensor, check_weights

LEAST_DAMPING = 0.01
COLUMNS_AT_ONCE = 128


@torch.no_grad()
def quantize_gptq(
    w: Tensor,
    statistics: InputStatistics,
    to: str | DataType = "int4",
    grouping: Grouping | None = None,
    *,
    damping: float | None = None,
    double_quantization: bool = False,
) -> QuantizedTensor:
    """Quantize a linear layer's weight so that its outputs, rather than its weights, change little.

        for each input j:  ŵ_j = round(w_j),   w_k ← w_k − (w_j − ŵ_j)·U_jk / U_jj  for every k after j
        with Uᵀ·U = (H + λ·mean(diag H)·1)⁻¹, U upper triangular (Cholesky)

    Column by column, those first whose inputs are largest: they have the most others left to correct them. Updates
    beyond the next 128 columns are gathered and made at once. The scales are those of plain rounding, taken before the
    first update, so that with the same groups both cost the same bits and differ in nothing but the choice of levels.
    Blocks end with their row here: where they do not divide it there are more of them, and more scales, than in plain
    rounding (64 × 100 weights in int4 take 4.64 bits each instead of 4.5).

    Args:
        w: (O, I), finite.
        statistics: of the layer's inputs; without any, this is plain rounding.
        to: data type or its name.
        grouping: which weights share a scale; blocks of 64 if left out.
        damping: λ, above 0 and finite; keeps H invertible where the text shows fewer directions than there are inputs.
            If left out, 0.01 + I / 2N: the authors' 0.01, and more the fewer tokens H is estimated from, since errors
            that compensate each other on those tokens alone do harm on others.
        double_quantization: store the scales in 8 bits.

    Raises:
        InputError: not a matrix, statistics of another layer, a damping that makes no sense or is too small for H to
            be inverted, or as `engine.quantization.tensor.quantize`.

    Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323; order of columns as `act_order` in the authors' code.
    """
    check_weights(w)
    if damping is None:
        damping = LEAST_DAMPING + w.shape[-1] / (2 * max(1, statistics.count))
    if not 0 < damping < math.inf:
        raise InputError(f"The damping is {damping}: it must be above 0 and finite; 0.01 to 0.1 is usual.")
    statistics.check_fits(w)
    grouping = (grouping or per_block()).within_rows()
    chosen = data_type(to) if isinstance(to, str) else to
    weights = w.detach().float()
    grid = Grid.fit(grouping.split(weights), chosen)
    order = statistics.hessian.diagonal().argsort(descending=True, stable=True)  # (I,)
    corrections = _compensation(statistics.hessian[order][:, order], damping)
    group_of = _group_numbers(grouping, w).T[order].contiguous()  # (I, O)
    left = weights.T[order].contiguous()  # (I, O), what is still to be rounded; an input's weights are neighbours
    coded = torch.empty(left.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, len(left), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(left))
        errors = torch.empty(end - start, len(w), device=w.device)
        for j in range(start, end):
            column = grid.pick(group_of[j])
            rounded = column.encode(left[j, :, None])  # (O, 1)
            coded[j] = rounded[:, 0]
            errors[j - start] = error = left[j] - column.decode(rounded)[:, 0]  # (O,)
            left[j + 1 : end].addr_(corrections[j, j + 1 : end], error, alpha=-1)
        left[end:] -= corrections[start:end, end:].T @ errors
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    codes[:, order] = coded.T
    return grid.store(codes, grouping, w, double_quantization)


def _compensation(hessian: Tensor, damping: float) -> Tensor:
    """U_jk / U_jj of `quantize_gptq`, (I, I) float32."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()  # a view
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    diagonal[~live] = mean  # an input that is always 0 has nothing to correct, and no part in the damping
    diagonal += damping * mean
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        U = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise InputError(
            f"With a damping of {damping:g} the inputs' second moments cannot be inverted: 0.01 to 0.1 is usual."
        ) from error
    return (U / U.diagonal()[:, None]).float()


def _group_numbers(grouping: Grouping, w: Tensor) -> Tensor:
    """The number of every weight's group, (O, I)."""
    groups = grouping.split(torch.zeros(w.shape, device=w.device))  # (G, S)
    numbers = torch.arange(len(groups), device=w.device)[:, None].expand_as(groups)
    return grouping.join(numbers, w.shape)
