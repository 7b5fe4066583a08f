from __future__ import annotations

import pytest
import torch

from galley_plugins.quantization.grouping import absmax_scales, choose_group_size, ranges
from galley_plugins.quantization.options import CHANNEL

SIZES = (128, 64, 32)


def test_a_range_is_the_largest_absolute_weight_of_a_group() -> None:
    weights = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.0, 0.0, -4.0, 4.0]])
    assert ranges(weights, 2).tolist() == [[3.0, 2.0], [0.0, 4.0]]
    assert ranges(weights, CHANNEL).tolist() == [[3.0], [4.0]]


def test_the_largest_weight_becomes_the_greatest_code() -> None:
    weights = torch.tensor([[1.0, -14.0, 0.0, 0.0]])
    assert absmax_scales(weights, 2, 4).tolist() == [[2.0, 1.0]]  # of nothing but zeros it is 1
    assert absmax_scales(weights, CHANNEL, 8).tolist() == [[pytest.approx(14 / 127)]]


def test_groups_that_do_not_divide_the_inputs_are_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError, match="found an input dimension of 100, expected a multiple of the group size 32"
    ):
        ranges(torch.zeros(2, 100), 32)


def test_equal_ranges_keep_the_largest_groups() -> None:
    assert choose_group_size(torch.ones(4, 256), SIZES, 0.95) == 128


def test_an_outlier_for_each_large_group_asks_for_the_smallest() -> None:
    """Ranges are 1 with groups of 128, (1 + 0.1) / 2 with 64, and 0.325 with 32."""
    weights = torch.full((4, 256), 0.1)
    weights[:, ::128] = 1.0
    assert choose_group_size(weights, SIZES, 0.95) == 32
    assert choose_group_size(weights, SIZES, 0.58) == 64  # 0.325 is 0.59 of 0.55
    assert choose_group_size(weights, SIZES, 0.54) == 128


def test_the_choice_stops_at_the_first_step_that_does_not_pay() -> None:
    """Both halves of each 128 have an outlier, only one half of each 64: 64 does not pay, 32 would."""
    weights = torch.full((4, 256), 0.1)
    weights[:, ::64] = 1.0
    assert choose_group_size(weights, SIZES, 0.95) == 128
    assert choose_group_size(weights, (64, 32), 0.95) == 32


def test_sizes_that_do_not_fit_are_passed_over() -> None:
    weights = torch.full((2, 576), 0.1)  # 576 is 9 times 64
    weights[:, ::64] = 1.0
    assert choose_group_size(weights, SIZES, 0.95) == 32
    assert choose_group_size(torch.ones(2, 576), SIZES, 0.95) == 64
    assert choose_group_size(torch.ones(2, 50), SIZES, 0.95) == CHANNEL
