"""EasyQuant's outliers (arXiv 2403.02775, section 3.1): a few weights far from the mean are kept as they are.

The paper's formula prints the variance where its text and tables mean the standard deviation. Where it is
known what errors cost (`sensitivity`), as many weights are kept as that rule would, but those whose rounding
would cost most, of all matrices together.
"""

from __future__ import annotations

import torch

from galley_plugins.quantization.matrix import Outliers


def outliers_of(weights: torch.Tensor, sigma: float) -> torch.Tensor:
    """bool [output, input]: so many standard deviations of the whole matrix from its mean, or more.

    Args:
        weights: float32 [output, input].
    """
    deviation, mean = torch.std_mean(weights, correction=0)
    if not deviation > 0:
        return torch.zeros_like(weights, dtype=torch.bool)
    return (weights - mean).abs() >= sigma * deviation


def split_outliers(weights: torch.Tensor, apart: torch.Tensor) -> tuple[torch.Tensor, Outliers]:
    """Weights without outliers, and those.

    Args:
        weights: float32 [output, input].
        apart: bool [output, input], where outliers are.

    Returns:
        float32 [output, input] with 0 where an outlier was, and the outliers.
    """
    rows, columns = apart.nonzero(as_tuple=True)
    return weights.masked_fill(apart, 0.0), Outliers(rows, columns, weights[apart].to(torch.bfloat16))


class CostLevel:
    """Finds the cost that so many of all weights exceed, matrix by matrix.

    Counts weights by the leading bits of their costs, to within 1/256 of a cost.
    """

    _SHIFT = 23 - 8  # of a float32's bits: its exponent and 8 bits of its fraction are left

    def __init__(self) -> None:
        self._counts = torch.zeros(1 << (31 - self._SHIFT), dtype=torch.int64)
        self._wanted = 0

    def add(self, costs: torch.Tensor, wanted: int) -> None:
        """
        Args:
            costs: float32 [output, input], none negative.
            wanted: how many more weights are to exceed the level.
        """
        for some in costs.split(64):
            bins = some.contiguous().view(torch.int32).flatten() >> self._SHIFT
            self._counts += torch.bincount(bins, minlength=len(self._counts))
        self._wanted += wanted

    def value(self) -> float:
        """The lowest level that no more weights exceed than are wanted."""
        above = self._counts.flip(0).cumsum(0).flip(0)  # in each bin or a higher one
        first = int((above > self._wanted).sum())  # the lowest bin that still fits
        bits = torch.tensor([(first << self._SHIFT) - 1], dtype=torch.int32)
        return float(bits.view(torch.float32)) if first else 0.0
