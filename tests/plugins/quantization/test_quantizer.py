from __future__ import annotations

from typing import Any

import pytest
import torch

from galley_plugins.quantization.options import METHODS, QuantizationOptions
from galley_plugins.quantization.quantizer import quantize, quantize_together
from galley_plugins.quantization.sensitivity import Sensitivity


def heavy_tailed(rows: int = 96, columns: int = 256) -> torch.Tensor:
    """Weights with outliers, as a language model's are."""
    generator = torch.Generator().manual_seed(7)
    weights = 0.05 * torch.randn(rows, columns, generator=generator)
    places = torch.rand(rows, columns, generator=generator) < 0.003
    return torch.where(places, 10 * weights, weights)


def error_of(weights: torch.Tensor, **options: Any) -> float:
    matrix = quantize(weights, QuantizationOptions(**options))
    return float((matrix.dequantize() - weights).square().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_inside_the_range_is_off_by_more_than_half_a_step(method: str, bits: int) -> None:
    weights = heavy_tailed()
    matrix = quantize(weights, QuantizationOptions(method=method, bits=bits), scale_dtype=torch.float32)
    steps = matrix.scales.float().repeat_interleave(matrix.group_size, 1)
    inside = (matrix.codes > -(2 ** (bits - 1))) & (matrix.codes < 2 ** (bits - 1) - 1)
    if matrix.outliers is not None:
        inside[matrix.outliers.rows, matrix.outliers.columns] = False
    off = (matrix.dequantize() - weights).abs()
    assert (off[inside] <= steps[inside] / 2 * (1 + 1e-4)).all()
    assert inside.float().mean() > 0.9


def test_outliers_come_back_as_they_were_to_bfloat16() -> None:
    weights = heavy_tailed()
    matrix = quantize(weights, QuantizationOptions(method="easyquant"))
    assert matrix.outliers is not None
    assert 0.001 < matrix.outlier_share < 0.01
    places = matrix.outliers.rows, matrix.outliers.columns
    assert torch.equal(matrix.dequantize()[places], weights[places].bfloat16().float())
    assert not matrix.codes[places].any()


def test_each_part_of_the_methods_lowers_the_error() -> None:
    weights = heavy_tailed()
    plain = error_of(weights, method="rtn")
    grouped = error_of(weights, method="finequant")
    apart = error_of(weights, method="easyquant")
    both = error_of(weights, method="finequant+easyquant")
    assert both < apart < plain
    assert both < grouped < plain
    assert error_of(weights, method="rtn", bits=8) < plain / 100  # steps are 18 times finer


def test_the_chosen_group_size_is_one_that_was_offered() -> None:
    options = QuantizationOptions(method="finequant", group_sizes=(128, 64))
    assert quantize(heavy_tailed(), options).group_size in (128, 64)
    assert quantize(heavy_tailed(), QuantizationOptions(method="rtn", group_size=32)).group_size == 32
    assert quantize(heavy_tailed(), QuantizationOptions(method="rtn")).group_size == 256


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45, 3e38])
def test_zeros_denormals_and_huge_weights_stay_finite(value: float) -> None:
    weights = torch.full((8, 64), value)
    weights[0, 0] = -value
    for method in METHODS:
        back = quantize(weights, QuantizationOptions(method=method, group_size=32)).dequantize()
        assert torch.isfinite(back).all()
        if value == 0:
            assert not back.any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(3), r"found a tensor of shape \[3\], expected a matrix"),
        (torch.zeros(0, 4), r"found a tensor of shape \[0, 4\], expected a matrix"),
        (torch.full((2, 32), float("nan")), "found weights that are not finite"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weights, QuantizationOptions(method="rtn"))


def sensitivity(rows: int = 96, columns: int = 256, seed: int = 8) -> Sensitivity:
    """A few inputs and outputs count for much more than others."""
    generator = torch.Generator().manual_seed(seed)
    return Sensitivity(
        torch.randn(columns, generator=generator).mul(2).exp(),
        torch.randn(rows, generator=generator).mul(2).exp(),
    )


def test_where_costs_are_known_the_costliest_weights_are_kept_apart() -> None:
    weights, known = heavy_tailed(), sensitivity()
    options = QuantizationOptions(method="easyquant", group_size=64)
    (plain,) = quantize_together([weights], options)
    (found,) = quantize_together([weights], options, sensitivities=[known])
    assert plain.outliers is not None
    assert found.outliers is not None
    assert 0.97 * len(plain.outliers) <= len(found.outliers) <= len(plain.outliers)
    costs = weights.square() * known.inputs * known.outputs[:, None]
    apart = torch.zeros_like(weights, dtype=torch.bool)
    apart[found.outliers.rows, found.outliers.columns] = True
    assert costs[apart].min() >= costs[~apart].max() * 0.99

    def cost(matrix: Any) -> float:
        return float(known.costs(matrix.dequantize() - weights).sum())

    assert cost(found) < 0.75 * cost(plain)
    assert torch.equal(found.dequantize()[apart], weights[apart].bfloat16().float())


def test_a_level_is_for_all_matrices_and_a_bit_more_quarters_what_rounding_costs() -> None:
    weights, known = heavy_tailed(), sensitivity()
    options = QuantizationOptions(method="easyquant", group_size=64)
    louder = Sensitivity(known.inputs, 100 * known.outputs)
    level = float(known.costs(weights).flatten().kthvalue(weights.numel() - 50).values) / 4**4

    def kept(options: QuantizationOptions, known: Sensitivity) -> int:
        (matrix,) = quantize_together([weights], options, sensitivities=[known], level=level)
        assert matrix.outliers is not None
        return len(matrix.outliers)

    assert kept(options, known) == 50
    assert kept(options, louder) > 200
    eight = QuantizationOptions(method="easyquant", bits=8, group_size=64)
    assert kept(eight, Sensitivity(known.inputs, 4.0**4 * known.outputs)) == 50
    assert kept(eight, known) < 10


def test_inputs_that_are_never_there_cost_nothing() -> None:
    weights = heavy_tailed()
    weights[:, 3] *= 1000
    known = Sensitivity(torch.ones(256), torch.ones(96))
    known.inputs[3] = 0
    options = QuantizationOptions(method="easyquant", group_size=32)
    (found,) = quantize_together([weights], options, sensitivities=[known])
    assert found.outliers is not None
    assert not (found.outliers.columns == 3).any()
    assert torch.isfinite(found.dequantize()).all()
    nothing = Sensitivity(torch.zeros(256), torch.zeros(96))
    (found,) = quantize_together([weights], options, sensitivities=[nothing])
    assert found.outliers is not None
    assert len(found.outliers) == 0
