"""Matrices by one method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_plugins.quantization.grouping import absmax_scales, choose_group_size
from galley_plugins.quantization.matrix import QuantizedMatrix, encode
from galley_plugins.quantization.optimisation import optimise_scales
from galley_plugins.quantization.outliers import CostLevel, outliers_of, split_outliers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.quantization.matrix import Outliers
    from galley_plugins.quantization.options import QuantizationOptions
    from galley_plugins.quantization.sensitivity import Sensitivity

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
    sensitivities: Sequence[Sensitivity] | None = None,
    level: float | None = None,
) -> list[QuantizedMatrix]:
    """Quantize matrices of the same input dimension with the same group size, as a server fuses them.

    Args:
        sensitivities: of each matrix; None is not known, so that all errors cost the same.
        level: weights whose rounding costs more are outliers (`rounding_costs`); None is the level that
            gives these matrices as many as the options' sigma would.

    Raises:
        ValueError: as `quantize`.
    """
    found: list[tuple[torch.Tensor, Outliers | None]] = [(_checked(each), None) for each in matrices]
    known = [None] * len(found) if sensitivities is None else list(sensitivities)
    if options.keeps_outliers:
        if sensitivities is not None and level is None:
            own = CostLevel()
            for (weights, _), each in zip(found, sensitivities, strict=True):
                count_costs(own, weights, options, each)
            level = own.value()
        for place, sensitivity in enumerate(known):  # one after the other, so that few are held twice
            weights = found[place][0]
            if sensitivity is None or level is None:
                apart = outliers_of(weights, options.sigma)
            else:
                apart = rounding_costs(weights, options.bits, sensitivity) > level
            found[place] = split_outliers(weights, apart)
    size = options.group_size
    if options.chooses_groups:
        size = choose_group_size(
            torch.cat([weights for weights, _ in found]), options.group_sizes, options.shrink
        )
    return [
        _coded(weights, outliers, size, options, scale_dtype, sensitivity)
        for (weights, outliers), sensitivity in zip(found, known, strict=True)
    ]


def rounding_costs(weights: torch.Tensor, bits: int, sensitivity: Sensitivity) -> torch.Tensor:
    """float32 [output, input]: what rounding each weight costs, up to a factor that all matrices share.

    A weight far from the others widens its group's steps by as much as it is large, and a bit more halves
    them.
    """
    return sensitivity.costs(weights) * 4.0**-bits


def count_costs(
    level: CostLevel, weights: torch.Tensor, options: QuantizationOptions, sensitivity: Sensitivity
) -> None:
    """Count a matrix in, and as many outliers as the options' sigma would give it.

    Raises:
        ValueError: as `quantize`.
    """
    weights = _checked(weights)
    wanted = int(outliers_of(weights, options.sigma).sum())
    level.add(rounding_costs(weights, options.bits, sensitivity), wanted)


def _checked(matrix: torch.Tensor) -> torch.Tensor:
    """float32."""
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"found a tensor of shape {list(matrix.shape)}, expected a matrix")
    weights = matrix.detach().float()
    if not torch.isfinite(weights).all():
        raise ValueError("found weights that are not finite")
    return weights


def _coded(
    weights: torch.Tensor,
    outliers: Outliers | None,
    size: int,
    options: QuantizationOptions,
    scale_dtype: torch.dtype,
    sensitivity: Sensitivity | None,
) -> QuantizedMatrix:
    scales = absmax_scales(weights, size, options.bits)
    if options.keeps_outliers:
        scales = optimise_scales(
            weights,
            scales,
            options.bits,
            steps=options.steps,
            learning_rate=options.learning_rate,
            costs=None if sensitivity is None else sensitivity.inputs,
        )
    stored = scales.to(scale_dtype)
    stored = torch.where(stored == 0, torch.finfo(scale_dtype).tiny, stored)
    return QuantizedMatrix(encode(weights, stored, options.bits), stored, options.bits, outliers)
