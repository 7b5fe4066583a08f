"""Products with weight-only quantized matrices: 4- or 8-bit codes, activations as they are.

Contract of `w4a16_gemm` and `w8a16_gemm`: [..., input] times the matrix [output, input] gives
[..., output] in the activations' type, summed in float32 (the reference: in float64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from galley_kernels.choice import AUTO, choose
from galley_kernels.quantized import cpu_gemm, reference

if TYPE_CHECKING:
    import torch

    from galley_kernels.quantized.packed import PackedMatrix

IMPLEMENTATIONS = ("reference", "torch", "cpu", "triton")


def w4a16_gemm(x: torch.Tensor, matrix: PackedMatrix, *, implementation: str = AUTO) -> torch.Tensor:
    """
    Args:
        x: bfloat16, float16 or float32 [..., input].
        matrix: of 4-bit codes, on the same device.

    Raises:
        ValueError: shapes do not fit, or codes have other bits.
    """
    return _gemm(x, matrix, 4, implementation)


def w8a16_gemm(x: torch.Tensor, matrix: PackedMatrix, *, implementation: str = AUTO) -> torch.Tensor:
    """As `w4a16_gemm`, with 8-bit codes."""
    return _gemm(x, matrix, 8, implementation)


def _gemm(x: torch.Tensor, matrix: PackedMatrix, bits: int, implementation: str) -> torch.Tensor:
    if matrix.bits != bits:
        raise ValueError(f"found codes of {matrix.bits} bits, expected {bits}")
    if x.shape[-1] != matrix.inputs:
        raise ValueError(f"found activations {list(x.shape)}, expected [..., {matrix.inputs}]")
    chosen = choose(implementation, IMPLEMENTATIONS, x.device)
    if implementation == AUTO and x.device.type == "cpu" and matrix.scales.dtype in cpu_gemm.TYPES:
        chosen = "cpu" if cpu_gemm.available() else "torch"
    rows = x.reshape(-1, matrix.inputs)
    if chosen == "triton":
        from galley_kernels.quantized import triton_gemm

        found = triton_gemm.gemm(rows, matrix)
    elif chosen == "cpu":
        found = cpu_gemm.gemm(rows, matrix)
    else:
        found = (reference.exact if chosen == "reference" else reference.dequantized)(rows, matrix)
    return found.view(*x.shape[:-1], matrix.outputs)
