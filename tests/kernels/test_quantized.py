"""Products with quantized matrices: every implementation is the formula's, within its type's rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_kernels import PackedMatrix, SparseRows, pack_codes, w4a16_gemm, w8a16_gemm
from galley_kernels.bench import PRODUCTS, random_matrix, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable

# Of float32 sums, and of types whose products and results are rounded once each.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 7e-3}
SHAPES = [  # rows, input, output, group, share of weights apart
    (1, 576, 96, 64, 0.02),
    (2, 576, 40, 576, 0.0),  # a scale of a whole channel, turns that do not divide it
    (17, 256, 33, 32, 0.02),
    (5, 96, 64, 24, 0.0),  # groups of no power of two
    (70, 96, 50, 8, 0.02),
    (1, 2048, 24, 128, 0.0),  # the input is split
    (3, 2048, 24, 64, 0.1),
    (200, 128, 40, 64, 0.02),  # weights are written out
    (200, 96, 40, 24, 0.0),
]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_is_a_sum_of_codes_times_scales(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (3, 16))
    scales = torch.rand(3, 2, dtype=torch.float64)
    x = torch.randn(2, 16, dtype=torch.float64)
    product = PRODUCTS[bits]
    matrix = PackedMatrix(pack_codes(codes, bits), scales, bits)
    found = product(x, matrix, implementation="reference")
    for row in range(2):
        for output in range(3):
            expected = sum(
                float(x[row, k]) * int(codes[output, k]) * float(scales[output, k // 8]) for k in range(16)
            )
            assert float(found[row, output]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *(("torch", dtype) for dtype in TOLERANCE),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("triton", torch.float32),  # the interpreter has no products of bfloat16: they are a GPU's to check
        ("triton", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_the_references(call: Callable[..., Any], bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    for rows, inputs, outputs, group, share in SHAPES:
        matrix = random_matrix(inputs, outputs, bits, group, dtype, "cpu", share)
        x = torch.randn(rows, inputs).to(dtype)
        expected = PRODUCTS[bits](x, matrix, implementation="reference")
        found = call(PRODUCTS[bits], x, matrix)
        assert found.dtype == dtype
        assert relative_error(found, expected) < TOLERANCE[dtype], (rows, inputs, outputs, group, share)


@pytest.mark.parametrize("implementation", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_values_stay_what_they_are(call: Callable[..., Any], bits: int) -> None:
    """Zeros, activations and scales far apart in size, denormals: each output on its own.

    An output's error is of float32's rounding, of the sum of its products and, where codes are summed with an
    offset, of that many activations.
    """
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (6, 128))
    codes[0] = 0
    codes[1] = -half
    scales = torch.ones(6, 2)
    scales[2] = 1e-30
    scales[3] = torch.tensor([1e30, 1e-30])
    scales[4] = 1e-40  # a denormal
    apart = SparseRows.of(torch.tensor([5]), torch.tensor([127]), torch.tensor([1e20]), 6)
    matrix = PackedMatrix(pack_codes(codes, bits), scales, bits, apart)
    x = torch.randn(3, 128)
    x[1] = 0
    x[2, :5] = torch.tensor([1e6, -1e6, 1e-40, 3e5, 1.0])
    found = call(PRODUCTS[bits], x, matrix)
    weights = matrix.dequantize(torch.float64)
    expected = x.double() @ weights.T
    size = x.double().abs() @ weights.abs().T + 32 * (1 << bits) * x.double().abs().sum(1, keepdim=True) * (
        scales.double().amax(1)
    )
    assert ((found.double() - expected).abs() <= 4e-7 * size + 1e-44).all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("implementation", ["torch", "cpu", "triton"])
def test_leading_dimensions_are_kept_and_no_rows_give_none(call: Callable[..., Any]) -> None:
    matrix = random_matrix(64, 24, 4, 32, torch.float32, "cpu")
    x = torch.randn(2, 3, 64)
    assert torch.allclose(call(w4a16_gemm, x, matrix), x @ matrix.dequantize().T, atol=1e-5)
    assert call(w4a16_gemm, torch.empty(0, 64), matrix).shape == (0, 24)
    spread = torch.randn(5, 128)[:, ::2]
    assert torch.allclose(call(w4a16_gemm, spread, matrix), spread @ matrix.dequantize().T, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    matrix = random_matrix(64, 24, 4, 32, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"found activations \[2, 32\], expected \[..., 64\]"):
        w4a16_gemm(torch.randn(2, 32), matrix)
    with pytest.raises(ValueError, match="found codes of 4 bits, expected 8"):
        w8a16_gemm(torch.randn(2, 64), matrix)
    with pytest.raises(ValueError, match="implementation: found 'cuda'"):
        w4a16_gemm(torch.randn(2, 64), matrix, implementation="cuda")
    with pytest.raises(ValueError, match="expected a GPU"):
        w4a16_gemm(torch.randn(2, 64), matrix, implementation="triton")
