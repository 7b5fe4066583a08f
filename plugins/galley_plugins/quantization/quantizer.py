"""Matrices by one method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_plugins.quantization.grouping import absmax_scales, choose_group_size
from galley_plugins.quantization.matrix import QuantizedMatrix, encode
from galley_plugins.quantization.optimisation import optimise_scales
from galley_plugins.quantization.outliers import split_outliers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.quantization.matrix import Outliers
    from galley_plugins.quantization.options import QuantizationOptions

SCALE_DTYPE = torch.bfloat16  # what vLLM's kernels take beside bfloat16 activations


def quantize(
    weights: torch.Tensor, options: QuantizationOptions, *, scale_dtype: torch.dtype = SCALE_DTYPE
) -> QuantizedMatrix:
    """Quantize [output, input] of any floating type.

    Raises:
        ValueError: a weight is not finite, the matrix has no two dimensions, or groups do not divide it.
    """
    return quantize_together([weights], options, scale_dtype=scale_dtype)[0]


def quantize_together(
    matrices: Sequence[torch.Tensor],
    options: QuantizationOptions,
    *,
    scale_dtype: torch.dtype = SCALE_DTYPE,
) -> list[QuantizedMatrix]:
    """Quantize matrices of the same input dimension with the same group size, as a server fuses them.

    Raises:
        ValueError: as `quantize`.
    """
    found: list[tuple[torch.Tensor, Outliers | None]] = []
    for each in matrices:
        if each.dim() != 2 or not each.numel():
            raise ValueError(f"found a tensor of shape {list(each.shape)}, expected a matrix")
        weights = each.detach().float()
        if not torch.isfinite(weights).all():
            raise ValueError("found weights that are not finite")
        found.append(split_outliers(weights, options.sigma) if options.keeps_outliers else (weights, None))
    size = options.group_size
    if options.chooses_groups:
        size = choose_group_size(
            torch.cat([weights for weights, _ in found]), options.group_sizes, options.shrink
        )
    return [_coded(weights, outliers, size, options, scale_dtype) for weights, outliers in found]


def _coded(
    weights: torch.Tensor,
    outliers: Outliers | None,
    size: int,
    options: QuantizationOptions,
    scale_dtype: torch.dtype,
) -> QuantizedMatrix:
    scales = absmax_scales(weights, size, options.bits)
    if options.keeps_outliers:
        scales = optimise_scales(
            weights, scales, options.bits, steps=options.steps, learning_rate=options.learning_rate
        )
    stored = scales.to(scale_dtype)
    stored = torch.where(stored == 0, torch.finfo(scale_dtype).tiny, stored)
    return QuantizedMatrix(encode(weights, stored, options.bits), stored, options.bits, outliers)
