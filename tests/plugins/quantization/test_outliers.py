from __future__ import annotations

import torch

from galley_plugins.quantization.outliers import split_outliers


def test_a_weight_far_from_the_mean_is_kept_apart() -> None:
    """99 weights of 1 and one of 11: the mean is 1.1, the standard deviation sqrt(0.99), about 0.995."""
    weights = torch.ones(10, 10)
    weights[3, 4] = 11.0
    rest, outliers = split_outliers(weights, 9.9)
    assert (outliers.rows.tolist(), outliers.columns.tolist(), outliers.values.tolist()) == ([3], [4], [11.0])
    assert rest[3, 4] == 0
    assert rest.sum() == 99
    assert len(split_outliers(weights, 10.0)[1]) == 0


def test_three_sigma_keeps_what_a_normal_distribution_has_beyond_them() -> None:
    weights = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))
    share = len(split_outliers(weights, 3.0)[1]) / weights.numel()
    assert abs(share - 0.0027) < 0.0002


def test_a_matrix_without_spread_has_none() -> None:
    rest, outliers = split_outliers(torch.full((4, 8), 0.5), 3.0)
    assert len(outliers) == 0
    assert torch.equal(rest, torch.full((4, 8), 0.5))
