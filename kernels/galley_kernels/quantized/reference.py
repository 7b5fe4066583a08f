"""What the products are, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from galley_kernels.quantized.packed import PackedMatrix


def exact(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """In float64, rounded once."""
    return (x.double() @ matrix.dequantize(torch.float64).T).to(x.dtype)


def dequantized(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """Weights in the activations' type, each product rounded as that type rounds; on any device."""
    return x @ matrix.dequantize(x.dtype).T
