from __future__ import annotations

import itertools

import pytest
import torch

from galley_plugins.quantization.outliers import CostLevel, outliers_of, split_outliers


def test_a_weight_far_from_the_mean_is_kept_apart() -> None:
    """99 weights of 1 and one of 11: the mean is 1.1, the standard deviation sqrt(0.99), about 0.995."""
    weights = torch.ones(10, 10)
    weights[3, 4] = 11.0
    rest, outliers = split_outliers(weights, outliers_of(weights, 9.9))
    assert (outliers.rows.tolist(), outliers.columns.tolist(), outliers.values.tolist()) == ([3], [4], [11.0])
    assert rest[3, 4] == 0
    assert rest.sum() == 99
    assert not outliers_of(weights, 10.0).any()


def test_three_sigma_keeps_what_a_normal_distribution_has_beyond_them() -> None:
    weights = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))
    share = float(outliers_of(weights, 3.0).float().mean())
    assert abs(share - 0.0027) < 0.0002


def test_a_matrix_without_spread_has_none() -> None:
    weights = torch.full((4, 8), 0.5)
    rest, outliers = split_outliers(weights, outliers_of(weights, 3.0))
    assert len(outliers) == 0
    assert torch.equal(rest, weights)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_as_many_weights_cost_more_than_the_level_as_are_wanted(scale: float) -> None:
    """Of several matrices together, and beside a sort of all costs."""
    generator = torch.Generator().manual_seed(2)
    costs = [scale * size * torch.randn(200, 300, generator=generator).square() for size in (1, 3, 100)]
    level = CostLevel()
    for each, wanted in zip(costs, (0, 900, 600), strict=True):
        level.add(each, wanted)
    above = sum(int((each > level.value()).sum()) for each in costs)
    assert 1500 * 0.99 <= above <= 1500
    exact = torch.cat([each.flatten() for each in costs]).sort(descending=True).values
    assert exact[1500] <= level.value() <= exact[1500] * 1.01


@pytest.mark.parametrize("order", itertools.permutations([0.25, 1.0, 4.0, 0.0]))
def test_of_three_costs_each_number_wanted_takes_the_largest(order: tuple[float, ...]) -> None:
    costs = torch.tensor([order])
    for wanted, taken in enumerate(([], [4.0], [4.0, 1.0], [4.0, 1.0, 0.25], [4.0, 1.0, 0.25])):
        level = CostLevel()
        level.add(costs, wanted)
        assert sorted(costs[costs > level.value()].tolist(), reverse=True) == taken


def test_equal_costs_of_which_only_some_are_wanted_are_all_left() -> None:
    level = CostLevel()
    level.add(torch.full((8, 8), 0.5), 10)
    assert level.value() >= 0.5
