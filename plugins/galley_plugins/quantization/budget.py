"""A budget of bits spread over matrices: each bit goes where it takes away most error.

Each matrix is quantized in several ways; of these only the ones on the lower convex hull of error over bits
can be part of a best spread. All start at their cheapest, and the step with the largest gain for each bit is
taken for as long as the budget lasts.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from galley_plugins.quantization.options import CHANNEL, QuantizationOptions
from galley_plugins.quantization.plan import SUFFIX, Plan
from galley_plugins.quantization.quantizer import quantize_together

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from galley_plugins.quantization.sensitivity import Sensitivity

CANDIDATES = (
    *(
        QuantizationOptions("easyquant", group_size=size, sigma=sigma)
        for size in (128, 64, 32)
        for sigma in (4.0, 3.0, 2.5)
    ),
    *(QuantizationOptions("rtn", bits=8, group_size=size) for size in (128, 64, CHANNEL)),
)


@dataclass(frozen=True)
class Way:
    """One way to quantize a matrix: all its bits, and its error."""

    bits: float
    error: float
    options: QuantizationOptions


def ways(
    weights: Sequence[torch.Tensor],
    candidates: Sequence[QuantizationOptions] = CANDIDATES,
    sensitivities: Sequence[Sensitivity] | None = None,
) -> list[Way]:
    """Of matrices that are quantized together: those that fit.

    Errors are what they cost, and where that is not known relative to the mean square weight.

    Raises:
        ValueError: no candidate's groups divide the input dimension, or a weight is not finite.
    """
    found = []
    for options in candidates:
        if weights[0].shape[1] % (options.group_size or 1):
            continue
        bits = error = 0.0
        matrices = quantize_together(weights, options, sensitivities=sensitivities)
        for place, (original, matrix) in enumerate(zip(weights, matrices, strict=True)):
            whole = original.float()
            off = matrix.dequantize() - whole
            bits += matrix.bits_per_weight * whole.numel()
            if sensitivities is not None:
                error += float(sensitivities[place].costs(off).sum())
            else:
                error += float(off.square().sum() / whole.square().mean().clamp_min(1e-30))
        found.append(Way(bits, error, options))
    if not found:
        raise ValueError(
            f"found an input dimension of {weights[0].shape[1]}, expected a multiple of one of "
            f"{sorted({options.group_size for options in candidates})}"
        )
    return found


def hull(found: Sequence[Way]) -> list[Way]:
    """The ways on the lower convex hull, the fewest bits first."""
    kept: list[Way] = []
    for way in sorted(found, key=lambda way: (way.bits, way.error)):
        if kept and way.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], way):
            kept.pop()
        kept.append(way)
    return kept


def _gain(one: Way, other: Way) -> float:
    return (one.error - other.error) / (other.bits - one.bits)


def spread(choices: dict[str, list[Way]], budget: float) -> dict[str, Way]:
    """The way of each name; the budget is of all bits.

    Raises:
        ValueError: the cheapest ways need more.
    """
    hulls = {name: hull(found) for name, found in choices.items()}
    taken = dict.fromkeys(hulls, 0)
    spent = sum(each[0].bits for each in hulls.values())
    if spent > budget:
        raise ValueError(f"found a budget of {budget:.0f} bits, expected at least {spent:.0f}")
    steps = [(-_gain(each[0], each[1]), name) for name, each in hulls.items() if len(each) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        each, place = hulls[name], taken[name]
        price = each[place + 1].bits - each[place].bits
        if spent + price > budget:
            continue
        spent += price
        taken[name] = place + 1
        if place + 2 < len(each):
            heapq.heappush(steps, (-_gain(each[place + 1], each[place + 2]), name))
    return {name: hulls[name][place] for name, place in taken.items()}


def plan_for(
    groups: Sequence[Sequence[str]],
    tensor: Callable[[str], torch.Tensor],
    plan: Plan,
    bits_per_weight: float,
    *,
    candidates: Sequence[QuantizationOptions] = CANDIDATES,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    advance: Callable[[str, int], None] | None = None,
) -> Plan:
    """The plan with a rule for each group of matrices.

    Args:
        groups: names of tensors that are quantized together.
        tensor: gives a tensor by its name.
        bits_per_weight: of all of them, on average.
        sensitivities: of each module; None is not known.

    Raises:
        ValueError: as `ways` and `spread`.
    """
    choices, weights = {}, 0
    for names in groups:
        matrices = [tensor(name) for name in names]
        known = None
        if sensitivities is not None:
            known = [sensitivities[name.removesuffix(SUFFIX)] for name in names]
        choices[names[0]] = ways(matrices, candidates, known)
        weights += sum(matrix.numel() for matrix in matrices)
        if advance is not None:
            advance(names[0], sum(matrix.numel() for matrix in matrices))
    try:
        chosen = spread(choices, bits_per_weight * weights)
    except ValueError:
        least = sum(hull(found)[0].bits for found in choices.values()) / weights
        raise ValueError(f"target bits: found {bits_per_weight}, expected at least {least:.2f}") from None
    rules = tuple((name.removesuffix(SUFFIX), chosen[names[0]].options) for names in groups for name in names)
    return replace(plan, rules=(*plan.rules, *rules))
