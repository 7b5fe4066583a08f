"""Linear maps whose weights and activations are integers, or both floating."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from galley_kernels.compiled.interleaved import (
    SPAN,
    TYPES,
    FloatMatrix,
    InterleavedMatrix,
    Matrix,
    library,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_kernels.quantized.packed import PackedMatrix

ACTIVATION_BITS = {4: 8, 8: 16}
"""Of an activation, by those of the weights beside it."""


class Linear(ctypes.Structure):
    """As in decoder.cpp."""

    _fields_ = [
        ("parts", ctypes.POINTER(Matrix)),
        *((name, ctypes.c_int64) for name in ("count", "inputs", "outputs")),
        ("bias", ctypes.c_void_p),
    ]


class CompiledLinear:
    """Matrices of the same inputs side by side, as a layer fuses them.

    Raises:
        ValueError: inputs differ.
    """

    def __init__(self, parts: Sequence[InterleavedMatrix | FloatMatrix]) -> None:
        inputs = sorted({part.inputs for part in parts})
        if len(inputs) != 1:
            raise ValueError(f"found matrices of {inputs} inputs, expected the same for all")
        self.parts = tuple(parts)
        self.inputs = inputs[0]
        self.outputs = sum(part.outputs for part in self.parts)
        self.bias: torch.Tensor | None = None
        firsts = [sum(part.outputs for part in self.parts[:place]) for place in range(len(self.parts))]
        self._array = (Matrix * len(self.parts))(
            *(part.structure(first) for part, first in zip(self.parts, firsts, strict=True))
        )
        self.structure = Linear(self._array, len(self.parts), self.inputs, self.outputs, None)
        self._address = ctypes.addressof(self.structure)

    def add_bias(self, bias: torch.Tensor) -> None:
        """
        Args:
            bias: floating [outputs of all].
        """
        self.bias = bias.detach().float().contiguous()
        self.structure.bias = self.bias.data_ptr()

    def __call__(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[..., output] of float32 or bfloat16 [..., input].

        A row's result does not depend on the rows beside it.

        Args:
            dtype: of the result, float32 or bfloat16; None for the activations'.

        Raises:
            ValueError: activations are of another type or width, or the result is to be of another type.
        """
        if x.dtype not in TYPES or x.shape[-1] != self.inputs:
            raise ValueError(
                f"found activations {x.dtype} {list(x.shape)}, expected float32 or bfloat16 "
                f"[..., {self.inputs}]"
            )
        made = x.dtype if dtype is None else dtype
        if made not in TYPES:
            raise ValueError(f"found {made} for the result, expected float32 or bfloat16")
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.outputs, dtype=made)
        library().galley_compiled_linear(
            self._address,
            x.data_ptr(),
            out.data_ptr(),
            x.numel() // self.inputs,
            x.dtype == torch.float32,
            made == torch.float32,
            torch.get_num_threads(),
        )
        return out


class IntegerLinear(CompiledLinear):
    """
    Args:
        matrices: each [output, input]; bits and groups may differ.

    Raises:
        ValueError: a matrix does not suit, or inputs differ.
    """

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        super().__init__([InterleavedMatrix.of(matrix) for matrix in matrices])


class FloatLinear(CompiledLinear):
    """A map with weights as they are, for few rows: none of what libraries do for many.

    Args:
        weights: float32 or bfloat16 [output, input].

    Raises:
        ValueError: they are of another type.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__([FloatMatrix.of(weights)])


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float64 [..., input]: what activations stand for once they are integers of `bits` bits.

    Each span of 64 inputs, or what a row ends with, has the scale that its largest magnitude asks for.
    """
    inputs = x.shape[-1]
    spans = torch.nn.functional.pad(x.double(), (0, -inputs % SPAN)).unflatten(-1, (-1, SPAN))
    scales = spans.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    whole = torch.where(scales > 0, spans / scales, 0.0).round()
    return (whole * scales).flatten(-2)[..., :inputs]


def exact(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """float64 [..., output]: the product that `IntegerLinear` computes, rounding apart.

    Weights apart are multiplied with activations as they are.
    """
    apart = matrix.outliers
    bare = type(matrix)(matrix.words, matrix.scales, matrix.bits)
    found = rounded(x, ACTIVATION_BITS[matrix.bits]) @ bare.dequantize(torch.float64).T
    if apart is not None:
        weights = torch.zeros(matrix.shape, dtype=torch.float64)
        weights.index_put_((apart.rows(), apart.columns.long()), apart.values.double(), accumulate=True)
        found += x.double() @ weights.T
    return found
