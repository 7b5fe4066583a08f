"""One matrix by one method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_plugins.quantization.grouping import absmax_scales, choose_group_size
from galley_plugins.quantization.matrix import QuantizedMatrix, encode
from galley_plugins.quantization.optimisation import optimise_scales
from galley_plugins.quantization.outliers import split_outliers

if TYPE_CHECKING:
    from galley_plugins.quantization.options import QuantizationOptions

SCALE_DTYPE = torch.bfloat16  # what vLLM's kernels take beside bfloat16 activations


def quantize(
    weights: torch.Tensor, options: QuantizationOptions, *, scale_dtype: torch.dtype = SCALE_DTYPE
) -> QuantizedMatrix:
    """Quantize [output, input] of any floating type.

    Raises:
        ValueError: a weight is not finite, the matrix has no two dimensions, or groups do not divide it.
    """
    if weights.dim() != 2 or not weights.numel():
        raise ValueError(f"found a tensor of shape {list(weights.shape)}, expected a matrix")
    weights = weights.detach().float()
    if not torch.isfinite(weights).all():
        raise ValueError("found weights that are not finite")
    outliers = None
    if options.keeps_outliers:
        weights, outliers = split_outliers(weights, options.sigma)
    size = options.group_size
    if options.chooses_groups:
        size = choose_group_size(weights, options.group_sizes, options.shrink)
    scales = absmax_scales(weights, size, options.bits)
    if options.keeps_outliers:
        scales = optimise_scales(
            weights, scales, options.bits, steps=options.steps, learning_rate=options.learning_rate
        )
    stored = scales.to(scale_dtype)
    stored = torch.where(stored == 0, torch.finfo(scale_dtype).tiny, stored)
    return QuantizedMatrix(encode(weights, stored, options.bits), stored, options.bits, outliers)
