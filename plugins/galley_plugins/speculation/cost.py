"""What does a step cost? A curve of step time over tokens in the step, fitted while serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from galley_plugins.speculation.drafting import Timing

_KNOTS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
_UNUSUAL = 1.5  # a step that took much longer than predicted counts as one that took so much longer
_TRUSTED = 4.0  # measured steps of a knot before others are judged by it
_PRIOR_VISITS = 4.0  # how many measured steps the first assumption is worth, at each knot
_MOST_VISITS = 100.0
_MOST_OVERHEAD = 0.5
_PAID, _FEW = 0.85, 4  # in smaller batches, tokens beyond the best draft bring this share of their cost
_DRIFT = 0.1  # how fast the scale follows the machine


class StepCost:
    """A piecewise-linear curve, never falling, whose knots move with every measured step.

    The speed of the whole machine drifts; one fast-moving scale takes that up, so that the curve's shape,
    which decides how much to draft, stays.

    Args:
        slope: what a token costs, over what a step takes whatever its tokens, until it is measured.
    """

    def __init__(self, slope: float = 0.03) -> None:
        self._slope = slope
        self.knots = np.array(_KNOTS, np.float64)
        self.shape = 1.0 + slope * self.knots
        self.visits = np.zeros(len(_KNOTS))
        self.scale = 0.0  # seconds of shape 1.0; 0 before the first timing
        self.overhead = 0.0  # share of a step that looking for drafts takes

    def add(self, timing: Timing) -> None:
        if timing.seconds <= 0 or timing.tokens < 1:
            return
        share = min(timing.drafting / timing.seconds, _MOST_OVERHEAD)
        self.overhead += _DRIFT * (share - self.overhead)
        if self.scale == 0.0:
            self.scale = timing.seconds / float(self(timing.tokens))
            return
        self.scale = _learn(
            self.knots, self.shape, self.visits, self._slope, self.scale, timing.tokens, timing.seconds
        )

    def __call__(self, tokens: Any) -> Any:
        """Relative cost of steps of so many tokens, in an arbitrary unit."""
        return np.interp(tokens, self.knots, self.shape)


@njit(cache=True)
def _at(knots: NDArray[np.float64], shape: NDArray[np.float64], tokens: float) -> float:
    """The curve at one place; flat beyond its ends."""
    if tokens <= knots[0]:
        return float(shape[0])
    for right in range(1, len(knots)):
        if tokens <= knots[right]:
            left = right - 1
            share = (tokens - knots[left]) / (knots[right] - knots[left])
            return float(shape[left] + share * (shape[right] - shape[left]))
    return float(shape[-1])


@njit(cache=True)
def _learn(
    knots: NDArray[np.float64],
    shape: NDArray[np.float64],
    visits: NDArray[np.float64],
    slope: float,
    scale: float,
    tokens: int,
    seconds: float,
) -> float:
    """Move the curve by one step; returns the scale."""
    ratio = seconds / (scale * _at(knots, shape, tokens))
    ratio = min(max(ratio, 1 / _UNUSUAL), _UNUSUAL)
    right = min(max(int(np.searchsorted(knots, tokens)), 1), len(knots) - 1)
    share = min((tokens - knots[right - 1]) / (knots[right] - knots[right - 1]), 1.0)
    for knot, weight in ((right - 1, 1.0 - share), (right, share)):
        if weight > 0:
            visits[knot] = min(visits[knot] + weight, _MOST_VISITS)
            shape[knot] *= ratio ** (weight / (visits[knot] + _PRIOR_VISITS))
    _mend(knots, shape, visits, slope)
    return float(scale * ratio**_DRIFT)


@njit(cache=True)
def _mend(
    knots: NDArray[np.float64], shape: NDArray[np.float64], visits: NDArray[np.float64], slope: float
) -> None:
    """Keep the curve from falling; where nothing was measured it goes on no flatter than before."""
    slope = slope * shape[0]
    known = -1  # the last measured knot
    for knot in range(1, len(knots)):
        before = shape[knot - 1]
        if visits[knot] < 1.0:
            shape[knot] = before + slope * (knots[knot] - knots[knot - 1])
            continue
        shape[knot] = max(shape[knot], before)
        if visits[knot] < _TRUSTED:
            continue
        if known >= 0:
            slope = max(slope, (shape[knot] - shape[known]) / (knots[knot] - knots[known]))
        known = knot


def least_worthwhile(cost: StepCost, requests: int, most: int) -> float:
    """What a candidate that is ever worth drafting is accepted with at least.

    The last token must bring most of what one more token costs, times (tokens a step) / (cost of it) of the
    best draft, which is at least that of no draft.

    Args:
        most: the most tokens of all drafts.
    """
    if requests < 1 or most < 1:
        return 1.0
    return float(_least(cost.knots, cost.shape, requests, most))


@njit(cache=True)
def _least(knots: NDArray[np.float64], shape: NDArray[np.float64], requests: int, most: int) -> float:
    before = first = _at(knots, shape, requests)
    least = np.inf
    for tokens in range(requests + 1, requests + most + 1):
        here = _at(knots, shape, tokens)
        least = min(least, here - before)
        before = here
    return _share(requests) * requests / first * least


@njit(cache=True)
def _share(requests: int) -> float:
    return _PAID if requests < _FEW else 1.0


def worthwhile(cost: StepCost, requests: int, reach: np.ndarray, margin: float = 1.02) -> tuple[int, float]:
    """How many draft tokens make about the most tokens a second, and how much that is worth.

    Beside few requests, tokens that bring nearly what they cost follow: fewer steps at hardly less speed.

    Args:
        requests: requests in the next step; each brings one token in any case.
        reach: float [candidates], falling probabilities that each is accepted.
        margin: how much better it must be than steps without speculation, which look for no drafts either.

    Returns:
        count: how many of the first candidates to draft, 0 where none pays.
        worth: the share that tokens a second grow by, over steps that look for no drafts; below 0 where
            looking was for nothing.
    """
    if requests < 1 or len(reach) == 0:
        return 0, -cost.overhead
    best, ratio = _best(cost.knots, cost.shape, requests, reach)
    ratio *= 1.0 - cost.overhead
    return (best, ratio - 1.0) if ratio > margin else (0, -cost.overhead)


@njit(cache=True)
def _best(
    knots: NDArray[np.float64], shape: NDArray[np.float64], requests: int, reach: NDArray[np.floating[Any]]
) -> tuple[int, float]:
    """How many candidates to draft, and how many times none's tokens a second the best draft makes."""
    plain = requests / _at(knots, shape, requests)
    expected = float(requests)
    best, most = 0, plain
    for count in range(1, len(reach) + 1):
        expected += reach[count - 1]
        speed = expected / _at(knots, shape, requests + count)
        if speed > most:
            best, most = count, speed
    share = _share(requests)
    if best == 0 or share == 1.0:
        return best, most / plain
    longest = best
    before = at_best = _at(knots, shape, requests + best)
    gained, least = 0.0, np.inf
    for count in range(best + 1, len(reach) + 1):
        here = _at(knots, shape, requests + count)
        least = min(least, here - before)
        before = here
        gained += reach[count - 1]
        if reach[count - 1] < share * most * least:
            break
        if gained >= share * most * (here - at_best):
            longest = count
    return longest, most / plain
