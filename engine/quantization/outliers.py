"""A few large numbers kept in 16 bits, so that they do not set the scale of all the others: LLM.int8's split.

Legend: B rows of activations, I inputs, O outputs, K outlier columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InputError
from engine.quantization.data_types import DataType, integer
from engine.quantization.grouping import Grouping, per_channel
from engine.quantization.tensor import QuantizedTensor, check_weights, quantize

THRESHOLD = 6.0
"""From this magnitude on an activation is an outlier, in LLM.int8."""


@dataclass(frozen=True, eq=False)
class OutlierSplit:
    """A matrix with some columns in 16 bits and the others quantized.

    Args:
        regular: the columns without outliers, (O, I − K).
        outliers: the others, (O, K) float16, or float32 where that would overflow.
        columns: which these are, (K,) int32.
        shape: (O, I).
    """

    regular: QuantizedTensor
    outliers: Tensor
    columns: Tensor
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, outliers and their places."""
        return self.regular.nbytes + self.outliers.nbytes + self.columns.nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 · `nbytes` / (O·I)."""
        return 8 * self.nbytes / self.shape.numel()

    def dequantize(self) -> Tensor:
        """The matrix that is stored, (O, I) of the given dtype."""
        kept = torch.ones(self.shape[1], dtype=torch.bool, device=self.outliers.device)
        kept[self.columns] = False
        matrix = torch.empty(self.shape, dtype=self.regular.dtype, device=self.outliers.device)
        matrix[:, kept] = self.regular.dequantize()
        matrix[:, self.columns] = self.outliers.to(matrix.dtype)
        return matrix


@torch.no_grad()
def split_outliers(
    w: Tensor, threshold: float, to: str | DataType = "int8", grouping: Grouping | None = None
) -> OutlierSplit:
    """Quantize a matrix but for the columns that hold a magnitude of `threshold` or more.

    Args:
        w: (O, I), finite.
        threshold: from which magnitude on a number is an outlier, above 0.
        to: data type of the others.
        grouping: of the others; one scale a row if left out.

    Raises:
        InputError: not a matrix, a threshold that is not above 0, outliers in every column, or as `quantize`.

    Source: the decomposition of Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339, on a stored matrix.
    """
    check_weights(w)
    _check_matrix(w)
    if not threshold > 0:
        raise InputError(f"The threshold is {threshold}: give a magnitude above 0, such as {THRESHOLD:g}.")
    outlying = (w.abs() >= threshold).any(0)  # (I,)
    if outlying.all():
        raise InputError(
            f"Every one of the {w.shape[1]} columns holds a magnitude of {threshold:g} or more: raise the threshold."
        )
    half = w[:, outlying].half()
    return OutlierSplit(
        regular=quantize(w[:, ~outlying], to, grouping or per_channel()),
        outliers=half if half.isfinite().all() else w[:, outlying].float(),
        columns=outlying.nonzero().flatten().int(),
        shape=w.shape,
    )


@dataclass(frozen=True, eq=False)
class Int8Product:
    """x·Wᵀ as LLM.int8 computes it.

    Args:
        output: (…, O) of x's dtype.
        columns: inputs that were multiplied in x's own precision, (K,).
    """

    output: Tensor
    columns: Tensor


@torch.no_grad()
def int8_product(x: Tensor, weight: QuantizedTensor, threshold: float = THRESHOLD) -> Int8Product:
    """Multiply activations with an int8 matrix: outlier columns in full, all else in whole numbers.

        y = x_out·W_outᵀ + (s_x·s_wᵀ) ⊙ (X8·W8ᵀ),   X8 = round(127 · x / max|x|) row by row

    The outliers' own magnitudes have no part in their row's scale s_x, and their columns are zero in X8.

    Args:
        x: (…, I), finite.
        weight: (O, I) from ``quantize(W, "int8", per_channel())``.
        threshold: from which magnitude on an activation is an outlier; 0 for none.

    Raises:
        InputError: the weight is no int8 matrix with a scale for each output, activations that are not finite or have
            another number of inputs, or a threshold below 0 or NaN.

    Source: Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339; bitsandbytes' `Linear8bitLt`.
    """
    if weight.data_type is not integer(8) or weight.grouping != per_channel() or len(weight.shape) != 2:
        raise InputError(
            f"The weight is {weight.data_type.name} {weight.grouping} of shape {tuple(weight.shape)}: "
            "quantize a matrix to int8 per channel."
        )
    check_threshold(threshold)
    check_weights(x, "The activations")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"The activations have the shape {tuple(x.shape)}, the weight {tuple(weight.shape)}: give "
            f"{weight.shape[1]} inputs in the last dimension."
        )
    rows = x.reshape(-1, x.shape[-1]).float()  # (B, I)
    outlying = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    columns = outlying.any(0).nonzero().flatten()  # (K,)
    scaled = quantize(rows.masked_fill(outlying, 0), integer(8), per_channel())
    levels = integer(8).decode(scaled.codes)  # (B, I) whole numbers
    levels[:, columns] = 0
    product = levels.double() @ integer(8).decode(weight.codes).double().T  # exact: whole numbers below 2^53
    product = product.float() * scaled.scales[:, None] * weight.scales  # (B, O)
    product += rows[:, columns] @ weight.dequantize()[:, columns].float().T
    return Int8Product(product.to(x.dtype).view(*x.shape[:-1], -1), columns)


def check_threshold(threshold: float) -> None:
    """Refuse a threshold of activations that is below 0 or NaN.

    Raises:
        InputError: it is.
    """
    if not threshold >= 0:
        raise InputError(
            f"The threshold is {threshold}: give a magnitude above 0, such as {THRESHOLD:g}, or 0 for no outliers."
        )


def _check_matrix(w: Tensor) -> None:
    if w.dim() != 2:
        raise InputError(f"The weights have the shape {tuple(w.shape)}: give a matrix, (outputs, inputs).")
