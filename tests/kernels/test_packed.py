"""Packed codes: the layout of compressed-tensors, there and back."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from galley_kernels import PackedMatrix, SparseRows, pack_codes, unpack_codes


def test_the_first_column_is_in_the_lowest_bits() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1], [7, 7, 7, 7, 7, 7, 7, 7]])
    assert pack_codes(codes, 4).tolist() == [[0x76543210], [-1]]  # -1 is 0xffffffff
    assert pack_codes(torch.tensor([[-128, -127, 0, 127]]), 8).tolist() == [[0xFF800100 - (1 << 32)]]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (24, 64), dtype=torch.int8)
    assert torch.equal(pack_codes(codes, bits), pack_to_int32(codes, bits))


@given(st.sampled_from([4, 8]), st.integers(0, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_codes_come_back(bits: int, rows: int, words: int, seed: int) -> None:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, words * 32 // bits), generator=generator).to(torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits), codes)


def test_a_matrix_is_codes_times_scales_and_what_is_apart() -> None:
    codes = torch.tensor([[1] * 8 + [-2] * 8, [0] * 8 + [7] * 8])
    rows, columns, values = torch.tensor([0, 1, 1]), torch.tensor([15, 0, 3]), torch.tensor([0.5, 9.0, -9.0])
    matrix = PackedMatrix(
        pack_codes(codes, 4),
        torch.tensor([[0.5, 0.25], [1.0, 2.0]]),
        4,
        SparseRows.of(rows, columns, values, 2),
    )
    expected = [[0.5] * 8 + [-0.5] * 7 + [0.0], [9.0, 0, 0, -9.0, 0, 0, 0, 0] + [14.0] * 8]
    assert matrix.dequantize().tolist() == expected
    assert (matrix.shape, matrix.group_size) == ((2, 16), 8)
    assert matrix.outliers is not None
    assert matrix.outliers.starts.tolist() == [0, 1, 3]
    assert matrix.outliers.most == 2


@pytest.mark.parametrize(
    ("words", "scales", "bits", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2), 3, "bits: found 3, expected 4 or 8"),
        (torch.zeros(2, 2), torch.ones(2, 2), 4, "found words torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), torch.ones(3, 1), 4, r"found scales \[3, 1\] for codes"),
        (torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 4), 4, "expected groups of 8"),
        (torch.zeros(4, 2, dtype=torch.int32).T, torch.ones(2, 1), 4, "with gaps"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(
    words: torch.Tensor, scales: torch.Tensor, bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackedMatrix(words, scales, bits)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="found codes from -9 to 0, expected -8 to 7"):
        pack_codes(torch.tensor([[-9, 0, 0, 0, 0, 0, 0, 0]]), 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_codes(torch.zeros(2, 7), 4)
