"""FineQuant (arXiv 2308.09723): symmetric absmax scales of groups, as small as a matrix needs them.

The idea: smaller groups keep an outlier from coarsening its neighbours, and cost a scale each; a matrix gets
smaller groups for as long as they shrink its ranges. Here the size is chosen from those that vLLM's kernels
take, by the mean of the groups' ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_plugins.quantization.options import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Sequence


def ranges(weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 [output, groups]: the largest absolute weight of each group.

    Raises:
        ValueError: the groups do not divide the input dimension.
    """
    rows, columns = weights.shape
    size = columns if group_size == CHANNEL else group_size
    if columns % size:
        raise ValueError(
            f"found an input dimension of {columns}, expected a multiple of the group size {size}"
        )
    return weights.view(rows, columns // size, size).abs().amax(-1).float()


def absmax_scales(weights: torch.Tensor, group_size: int, bits: int) -> torch.Tensor:
    """float32 [output, groups]: the largest weight becomes the greatest code; 1 where all are 0."""
    found = ranges(weights, group_size) / (2 ** (bits - 1) - 1)
    return torch.where(found > 0, found, torch.ones_like(found))


def choose_group_size(weights: torch.Tensor, sizes: Sequence[int], shrink: float) -> int:
    """The smallest group size that each step from the largest on pays for.

    Args:
        sizes: smaller and smaller; those that do not divide the input dimension are passed over.
        shrink: a step pays where the mean range shrinks below so much of what it was.

    Returns:
        one of `sizes`, or 0, a whole channel, where none divides the input dimension.
    """
    fitting = [size for size in sizes if weights.shape[1] % size == 0]
    if not fitting:
        return CHANNEL
    chosen, spread = fitting[0], float(ranges(weights, fitting[0]).mean())
    for size in fitting[1:]:
        smaller = float(ranges(weights, size).mean())
        if smaller >= shrink * spread:
            break
        chosen, spread = size, smaller
    return chosen
