"""A quantized matrix: integer codes, a scale for each group of inputs, and weights kept apart.

Everything here is [output, input], as in `torch.nn.Linear`; groups run along the input dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OUTLIER_BITS = 16 + 16
"""Of one outlier: its value in bfloat16 and its column."""

ROW_BITS = 32
"""Of one row that has outliers apart: where they start."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """Weights kept as they were, in the order of their places.

    Attributes:
        rows, columns: int64 [outliers].
        values: bfloat16 [outliers].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """
    Attributes:
        codes: int8 [output, input], from -2^(bits-1) to 2^(bits-1) - 1; 0 where an outlier is.
        scales: [output, groups], never 0; a weight is about its code times its group's scale.
        outliers: None where the method keeps none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    outliers: Outliers | None = None

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def bits_per_weight(self) -> float:
        outliers = None if self.outliers is None else len(self.outliers)
        rows, columns = self.codes.shape
        return total_bits((rows, columns), self.bits, self.scales, outliers) / self.codes.numel()

    @property
    def outlier_share(self) -> float:
        return 0.0 if self.outliers is None else len(self.outliers) / self.codes.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[output, input] that the matrix stands for."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scales.shape[1], -1).float()
        weights = (grouped * self.scales.float().unsqueeze(-1)).view(rows, columns)
        if self.outliers is not None:
            weights[self.outliers.rows, self.outliers.columns] = self.outliers.values.float()
        return weights.to(dtype)


def total_bits(shape: tuple[int, int], bits: int, scales: torch.Tensor, outliers: int | None) -> int:
    """Codes, scales, and of outliers their values, columns and the starts of rows.

    Args:
        shape: output, input.
        outliers: how many; None where the matrix keeps none apart.
    """
    total = bits * shape[0] * shape[1] + 8 * scales.nbytes
    if outliers is not None:
        total += OUTLIER_BITS * outliers + ROW_BITS * shape[0]
    return total


def code_range(bits: int) -> tuple[int, int]:
    """Least and greatest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def encode(weights: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [output, input]: weights over their scales, rounded to the nearest code.

    Args:
        weights: float32 [output, input].
        scales: [output, groups].
    """
    rows, columns = weights.shape
    grouped = weights.view(rows, scales.shape[1], -1) / scales.float().unsqueeze(-1)
    return grouped.round_().clamp_(*code_range(bits)).to(torch.int8).view(rows, columns)
