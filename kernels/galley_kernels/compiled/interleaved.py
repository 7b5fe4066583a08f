"""Matrices as the compiled integer products read them: eight neighbouring outputs side by side."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from galley_kernels import compiler
from galley_kernels.quantized.packed import PackedMatrix, SparseRows, unpack_codes

PANEL, BLOCK, SPAN = 8, 32, 64
TYPES = (torch.float32, torch.bfloat16)
"""Of activations, of scales and of weights apart."""


class Matrix(ctypes.Structure):
    """As in products.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "starts", "apart")),
        *((name, ctypes.c_int64) for name in ("first", "outputs", "inputs", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "scales_wide")),
    ]


@functools.cache
def library() -> Any:
    """The compiled code, built the first time; None where there is no compiler."""
    folder = Path(__file__).parent
    headers = (
        folder / "attention.h",
        folder / "matrix.h",
        folder / "products.h",
        folder / "tiles.h",
        folder.parent / "lanes.h",
    )
    found = compiler.load(folder / "decoder.cpp", *headers)
    return None if found is None else typed(found)


def typed(found: Any) -> Any:
    """The compiled code, with the types of its functions."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    found.galley_compiled_linear.argtypes = [pointer] * 3 + [ctypes.c_int64] + [number] * 3
    found.galley_decoder_begin.argtypes = [pointer] * 3
    found.galley_decoder_follow.argtypes = [pointer] * 4
    found.galley_decoder_run.argtypes = [pointer, pointer, ctypes.c_int64, pointer, pointer]
    for name in ("compiled_linear", "decoder_begin", "decoder_follow", "decoder_run"):
        getattr(found, f"galley_{name}").restype = None
    return found


def available() -> bool:
    return library() is not None


@dataclass(frozen=True, slots=True, eq=False)
class InterleavedMatrix:
    """
    Attributes:
        codes: uint8 [panels, bytes]. Of 4 bits: for each eight inputs and each output of the panel four
            bytes, byte j with input j in its low half and input j + 4 in the high one, plus 8. Of 8 bits: for
            each two inputs and each output two bytes, signed.
        scales: float32 or bfloat16 [panels, groups, 8].
        outputs, inputs: without what fills the last panel.
        starts: int32 [outputs + 1], or None: where each output's weights apart start.
        apart: int32 [weights, 2]: the input, and the value as float32's bits.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    outputs: int
    inputs: int
    starts: torch.Tensor | None = None
    apart: torch.Tensor | None = None

    @staticmethod
    def suits(matrix: PackedMatrix) -> bool:
        """Whether groups are whole blocks, and numbers of a type that the code reads."""
        return matrix.group_size % BLOCK == 0 and matrix.scales.dtype in TYPES

    @classmethod
    def of(cls, matrix: PackedMatrix) -> InterleavedMatrix:
        """
        Raises:
            ValueError: it does not suit.
        """
        if not cls.suits(matrix):
            raise ValueError(
                f"found groups of {matrix.group_size} and scales of {matrix.scales.dtype}, expected groups "
                f"of a multiple of {BLOCK} and scales of float32 or bfloat16"
            )
        panels, inputs = -(-matrix.outputs // PANEL), matrix.inputs
        codes = torch.zeros(panels * PANEL, inputs, dtype=torch.int8)
        codes[: matrix.outputs] = unpack_codes(matrix.words, matrix.bits)
        if matrix.bits == 4:
            unsigned = (codes + 8).view(torch.uint8).view(panels, PANEL, inputs // 8, 2, 4)
            made = unsigned[:, :, :, 0] | unsigned[:, :, :, 1] << 4
        else:
            made = codes.view(torch.uint8).view(panels, PANEL, inputs // 2, 2)
        scales = torch.zeros(panels * PANEL, matrix.scales.shape[1], dtype=matrix.scales.dtype)
        scales[: matrix.outputs] = matrix.scales
        return cls(
            made.transpose(1, 2).reshape(panels, -1),
            scales.view(panels, PANEL, -1).transpose(1, 2).contiguous(),
            matrix.bits,
            matrix.outputs,
            inputs,
            *_apart(matrix.outliers),
        )

    def structure(self, first: int = 0) -> Matrix:
        """For compiled code, while this object lives.

        Args:
            first: where this matrix's outputs start in a map that it is a part of.
        """
        return Matrix(
            codes=self.codes.data_ptr(),
            scales=self.scales.data_ptr(),
            starts=None if self.starts is None else self.starts.data_ptr(),
            apart=None if self.apart is None else self.apart.data_ptr(),
            first=first,
            outputs=self.outputs,
            inputs=self.inputs,
            groups=self.scales.shape[1],
            bits=self.bits,
            scales_wide=self.scales.dtype == torch.float32,
        )


@dataclass(frozen=True, slots=True, eq=False)
class FloatMatrix:
    """Weights as they are, where float32's are none but bfloat16's in half the bytes.

    Attributes:
        codes: float32 or bfloat16 [panels, inputs, 8].
        outputs, inputs: without what fills the last panel.
    """

    codes: torch.Tensor
    outputs: int
    inputs: int

    @classmethod
    def of(cls, weights: torch.Tensor) -> FloatMatrix:
        """
        Args:
            weights: float32 or bfloat16 [output, input].

        Raises:
            ValueError: they are of another type.
        """
        if weights.dtype not in TYPES or weights.dim() != 2:
            raise ValueError(
                f"found weights {weights.dtype} {list(weights.shape)}, expected float32 or bfloat16 "
                "[output, input]"
            )
        short = weights.to(torch.bfloat16)
        if torch.equal(short.to(weights.dtype), weights):
            weights = short
        outputs, inputs = weights.shape
        panels = -(-outputs // PANEL)
        codes = torch.zeros(panels * PANEL, inputs, dtype=weights.dtype)
        codes[:outputs] = weights
        return cls(codes.view(panels, PANEL, inputs).transpose(1, 2).contiguous(), outputs, inputs)

    def structure(self, first: int = 0) -> Matrix:
        """As that of `InterleavedMatrix`."""
        return Matrix(
            codes=self.codes.data_ptr(),
            first=first,
            outputs=self.outputs,
            inputs=self.inputs,
            bits=8 * self.codes.element_size(),
        )


def _apart(outliers: SparseRows | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if outliers is None or not outliers.most:
        return None, None
    return outliers.starts, torch.stack([outliers.columns, outliers.values.float().view(torch.int32)], 1)
