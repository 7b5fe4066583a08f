"""EasyQuant's outliers (arXiv 2403.02775, section 3.1): a few weights far from the mean are kept as they are.

The paper's formula prints the variance where its text and tables mean the standard deviation.
"""

from __future__ import annotations

import torch

from galley_plugins.quantization.matrix import Outliers


def split_outliers(weights: torch.Tensor, sigma: float) -> tuple[torch.Tensor, Outliers]:
    """Weights without outliers, and those.

    Args:
        weights: float32 [output, input].
        sigma: outliers are so many standard deviations of the whole matrix from its mean, or more.

    Returns:
        float32 [output, input] with 0 where an outlier was, and the outliers.
    """
    deviation, mean = torch.std_mean(weights, correction=0)
    apart = (weights - mean).abs() >= sigma * deviation if deviation > 0 else torch.zeros_like(weights).bool()
    rows, columns = apart.nonzero(as_tuple=True)
    return weights.masked_fill(apart, 0.0), Outliers(rows, columns, weights[apart].to(torch.bfloat16))
