"""Products on a CPU by compiled code (cpu_gemm.cpp), where there is a compiler to build it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from galley_kernels import compiler

if TYPE_CHECKING:
    from galley_kernels.quantized.packed import PackedMatrix

TYPES = (torch.bfloat16, torch.float32)
"""Of scales and of weights apart."""

FEW_ROWS = 24
"""Up to so many rows, each weight becomes a number once for four of them; more go to torch's product."""

PANEL_BYTES = 64 * 2**20  # of weights that are numbers at once


@functools.cache
def available() -> bool:
    """Whether the code is there; builds it the first time."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    found = compiler.load(Path(__file__).with_name("cpu_gemm.cpp"))
    if found is not None:
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        matrix: list[Any] = [pointer, pointer, number, pointer, pointer, pointer, number]
        found.galley_product.argtypes = [number, pointer, *matrix, pointer, size, size, size, size, number]
        found.galley_expand.argtypes = [number, *matrix, pointer, size, size, size, number]
        found.galley_product.restype = found.galley_expand.restype = None
    return found


def gemm(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """[rows, output] in the activations' type, summed in float32."""
    rows, (outputs, inputs) = len(x), matrix.shape
    wide = x.float().contiguous()
    out = torch.empty(rows, outputs)
    threads = torch.get_num_threads()
    if rows <= FEW_ROWS:
        if rows:
            _library().galley_product(
                matrix.bits, wide.data_ptr(), *_pointers(matrix), out.data_ptr(), rows, outputs, inputs,
                matrix.scales.shape[1], threads,
            )  # fmt: skip
        return out.to(x.dtype)
    panel = max(1, PANEL_BYTES // (4 * inputs))
    for first in range(0, outputs, panel):
        some = matrix if panel >= outputs else matrix.rows(first, min(first + panel, outputs))
        weights = torch.empty(some.outputs, inputs)
        _library().galley_expand(
            some.bits,
            *_pointers(some),
            weights.data_ptr(),
            some.outputs,
            inputs,
            some.scales.shape[1],
            threads,
        )
        torch.mm(wide, weights.T, out=out[:, first : first + some.outputs])
    return out.to(x.dtype)


def _pointers(matrix: PackedMatrix) -> tuple[Any, ...]:
    scales = (matrix.scales.data_ptr(), _wide(matrix.scales))
    apart = matrix.outliers
    if apart is None or not apart.most:
        return matrix.words.data_ptr(), *scales, None, None, None, 0
    places = (apart.starts.data_ptr(), apart.columns.data_ptr(), apart.values.data_ptr())
    return matrix.words.data_ptr(), *scales, *places, _wide(apart.values)


def _wide(values: torch.Tensor) -> int:
    """
    Raises:
        ValueError: the values are of a type that the code does not read.
    """
    if values.dtype not in TYPES:
        raise ValueError(f"found scales or values of {values.dtype}, expected bfloat16 or float32")
    return int(values.dtype == torch.float32)
