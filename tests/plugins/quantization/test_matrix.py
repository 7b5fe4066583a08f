from __future__ import annotations

import pytest
import torch

from galley_plugins.quantization.matrix import Outliers, QuantizedMatrix, code_range, encode


@pytest.mark.parametrize(("bits", "expected"), [(4, (-8, 7)), (8, (-128, 127))])
def test_codes_are_those_of_twos_complement(bits: int, expected: tuple[int, int]) -> None:
    assert code_range(bits) == expected


def test_weights_are_rounded_to_the_nearest_code_and_kept_in_range() -> None:
    weights = torch.tensor([[0.0, 0.24, 0.26, -0.76, 5.0, -5.0]])
    codes = encode(weights, torch.tensor([[0.5]]), 4)
    assert codes.tolist() == [[0, 0, 1, -2, 7, -8]]
    assert codes.dtype == torch.int8


def test_a_code_stands_for_itself_times_the_scale_of_its_group() -> None:
    codes = torch.tensor([[1, -2, 3, 4], [0, 5, -6, 7]], dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    apart = Outliers(torch.tensor([1]), torch.tensor([0]), torch.tensor([9.5], dtype=torch.bfloat16))
    matrix = QuantizedMatrix(codes, scales, 4, apart)
    assert matrix.group_size == 2
    assert matrix.dequantize().tolist() == [[0.5, -1.0, 6.0, 8.0], [9.5, 5.0, -1.5, 1.75]]


def test_bits_count_scales_and_what_outliers_take() -> None:
    codes = torch.zeros(64, 128, dtype=torch.int8)
    scales = torch.ones(64, 2, dtype=torch.bfloat16)
    assert QuantizedMatrix(codes, scales, 4).bits_per_weight == 4 + 16 / 64
    ten = torch.arange(10)
    apart = Outliers(ten, ten, torch.ones(10, dtype=torch.bfloat16))
    matrix = QuantizedMatrix(codes, scales, 4, apart)
    assert matrix.bits_per_weight == 4.25 + (10 * (16 + 16) + 64 * 32) / (64 * 128)
    assert matrix.outlier_share == 10 / (64 * 128)
