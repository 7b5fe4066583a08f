"""EasyQuant's ranges (arXiv 2403.02775, section 3.2): scales that minimise the squared error of a group.

The gradient takes the codes of a step as constant (equation 2): d r / d s = 2 sum (s q - w) q. Adam moves the
ratio of a scale to its absmax, so that one learning rate suits weights of any size. The error is not convex
in the scale: Adam starts at the best of a few ratios, and the best scale on the way is kept. A group ends
early where steps no longer bring anything. Where inputs differ in what an error beside them costs, each
square counts so much.

Threads are Python's: numba's own switch on OpenMP's nested parallelism, which makes torch's attention a
hundred times as slow for the rest of the process.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from galley_plugins.quantization.matrix import code_range

BETAS = (0.9, 0.999)  # Adam's usual ones
LOOKS, LEAST_RATIO = 20, 0.4  # ratios from 1 down that are looked at before it starts
PARTS = 8  # of a matrix for each thread: groups take more steps or fewer
PATIENCE = 10
"""Steps that a group may take without a smaller error; more than halves the time, for 0.005% more error."""


def optimise_scales(
    weights: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    *,
    steps: int,
    learning_rate: float,
    costs: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [output, groups]: scales of no larger squared error than the given ones.

    Args:
        weights: float32 [output, input]; zeros have no error at any scale.
        scales: float32 [output, groups], where to start.
        costs: float32 [input] of squared errors, none negative; None is the same for all.
    """
    groups = weights.contiguous().view(scales.numel(), -1).numpy()
    low, high = code_range(bits)
    found = np.empty(len(groups), np.float32)
    initial = scales.float().contiguous().view(-1).numpy()
    beside = None
    if costs is not None:
        shares = costs.float() / costs.mean().clamp_min(1e-30)
        beside = shares.contiguous().view(scales.shape[1], -1).numpy()

    def some(part: slice) -> None:
        _optimise(
            groups[part], beside, initial[part], float(low), float(high), steps, learning_rate, found[part]
        )

    threads = torch.get_num_threads()
    rows = -(-len(scales) // (PARTS * threads))
    parts = [
        slice(start * scales.shape[1], (start + rows) * scales.shape[1])
        for start in range(0, len(scales), rows)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, parts))
    return torch.from_numpy(found).view(scales.shape)


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def _optimise(
    groups: np.ndarray,
    beside: np.ndarray | None,
    initial: np.ndarray,
    low: float,
    high: float,
    steps: int,
    learning_rate: float,
    found: np.ndarray,
) -> None:
    for group in range(len(groups)):
        weights, start = groups[group], initial[group]
        part = 0 if beside is None else group % len(beside)
        energy = np.float32(0)
        for place, weight in enumerate(weights):
            counted = weight if beside is None else beside[part, place] * weight
            energy += counted * weight
        found[group] = start
        if energy == 0:
            continue
        ratio = best = 1.0
        least = np.float32(np.inf)
        momentum = variance = 0.0
        first = second = 1.0  # powers of the betas
        waited = 0
        for step in range(LOOKS + steps + 1):  # the last one only looks
            scale = np.float32(start * ratio)
            inverse = np.float32(1) / scale
            error, gradient = np.float32(0), np.float32(0)
            for place, weight in enumerate(weights):
                code = np.float32(math.floor(weight * inverse + np.float32(0.5)))
                code = min(max(code, np.float32(low)), np.float32(high))
                difference = scale * code - weight
                counted = difference if beside is None else beside[part, place] * difference
                error += counted * difference
                gradient += counted * code
            if error < least:
                least, best, found[group] = error, ratio, scale
                waited = 0
            elif step >= LOOKS:
                waited += 1
                if waited > PATIENCE:
                    break
            if step < LOOKS - 1:
                ratio = 1.0 - (1.0 - LEAST_RATIO) * (step + 1) / (LOOKS - 1)
                continue
            if step == LOOKS - 1:
                ratio = best
                continue
            slope = 2.0 * gradient * start / energy
            momentum = BETAS[0] * momentum + (1 - BETAS[0]) * slope
            variance = BETAS[1] * variance + (1 - BETAS[1]) * slope * slope
            first *= BETAS[0]
            second *= BETAS[1]
            ratio -= learning_rate * momentum / (1 - first) / (math.sqrt(variance / (1 - second)) + 1e-8)
            ratio = max(ratio, 0.05)
