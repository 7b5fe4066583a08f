"""Quantized matrices as kernels read them: codes packed into words, scales of groups, weights kept apart.

Matrices are [output, input] as in `torch.nn.Linear`. Codes lie as in the `pack-quantized` format of
compressed-tensors: word i of a row holds columns (32 / bits) i and up, the first in the lowest bits, each
code plus 2^(bits-1), so that no sign is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Weights kept apart, row by row (CSR).

    Attributes:
        starts: int32 [output + 1]: where each row's weights start.
        columns: int32 [weights].
        values: floating [weights], added to what codes stand for.
        most: of one row.
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    most: int

    @classmethod
    def of(cls, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, outputs: int) -> SparseRows:
        """
        Args:
            rows, columns: integers [weights], in the order of rows.
        """
        counts = torch.bincount(rows.long(), minlength=outputs)
        starts = torch.zeros(outputs + 1, dtype=torch.int32, device=rows.device)
        starts[1:] = counts.cumsum(0)
        return cls(starts, columns.to(torch.int32).contiguous(), values.contiguous(), int(counts.max()))

    def rows(self) -> torch.Tensor:
        """int64 [weights]: each weight's row."""
        counts = self.starts[1:] - self.starts[:-1]
        return torch.repeat_interleave(
            torch.arange(len(counts), device=counts.device), counts.long(), output_size=len(self.columns)
        )


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """
    Attributes:
        words: int32 [output, input * bits / 32], contiguous.
        scales: floating [output, groups], contiguous; groups of input / groups neighbouring columns.
        bits: 4 or 8.
    """

    words: torch.Tensor
    scales: torch.Tensor
    bits: int
    outliers: SparseRows | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits: found {self.bits}, expected 4 or 8")
        if self.words.dtype != torch.int32 or self.words.dim() != 2 or self.scales.dim() != 2:
            raise ValueError(
                f"found words {self.words.dtype} {list(self.words.shape)} and scales "
                f"{list(self.scales.shape)}, expected int32 [output, words] and [output, groups]"
            )
        if not (self.words.is_contiguous() and self.scales.is_contiguous()):
            raise ValueError("found words or scales with gaps, expected them contiguous")
        groups = self.scales.shape[1]
        if len(self.words) != len(self.scales) or not groups or self.inputs % groups or self.group_size % 8:
            raise ValueError(
                f"found scales {list(self.scales.shape)} for codes {list(self.shape)}, expected groups of "
                "8, 16, 24 and so on that divide each row"
            )

    @property
    def inputs(self) -> int:
        return self.words.shape[1] * 32 // self.bits

    @property
    def outputs(self) -> int:
        return self.words.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def group_size(self) -> int:
        return self.inputs // self.scales.shape[1]

    def rows(self, first: int, last: int) -> PackedMatrix:
        """Outputs from `first` up to `last`; shares memory."""
        apart = self.outliers
        if apart is not None:
            start, end = int(apart.starts[first]), int(apart.starts[last])
            starts = apart.starts[first : last + 1] - start
            most = int(starts.diff().max())
            apart = SparseRows(starts, apart.columns[start:end], apart.values[start:end], most)
        return PackedMatrix(self.words[first:last], self.scales[first:last], self.bits, apart)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[output, input] that the matrix stands for."""
        codes = unpack_codes(self.words, self.bits).view(self.outputs, self.scales.shape[1], -1)
        weights = (codes.to(dtype) * self.scales.to(dtype).unsqueeze(-1)).view(self.shape)
        if self.outliers is not None:
            place = (self.outliers.rows(), self.outliers.columns.long())
            weights.index_put_(place, self.outliers.values.to(dtype), accumulate=True)
        return weights


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [output, input * bits / 32] of integers [output, input] from -2^(bits-1) to 2^(bits-1) - 1.

    Raises:
        ValueError: a row does not fill whole words, or a code is out of range.
    """
    each = 32 // bits
    if codes.dim() != 2 or codes.shape[1] % each:
        raise ValueError(f"found codes {list(codes.shape)}, expected rows of a multiple of {each}")
    half = 1 << (bits - 1)
    if codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise ValueError(
            f"found codes from {int(codes.min())} to {int(codes.max())}, expected {-half} to {half - 1}"
        )
    unsigned = (codes.to(torch.int64) + half).view(len(codes), codes.shape[1] // each, each)
    shifts = torch.arange(each, device=codes.device) * bits
    words = (unsigned << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [output, input], the inverse of `pack_codes`."""
    each, half = 32 // bits, 1 << (bits - 1)
    shifts = torch.arange(each, device=words.device, dtype=torch.int32) * bits
    codes = ((words.unsqueeze(-1) >> shifts) & (2 * half - 1)) - half
    return codes.to(torch.int8).view(len(words), words.shape[1] * each)
