"""What does a step cost? A curve of step time over tokens in the step, fitted while serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from galley_plugins.speculation.drafting import Timing

_KNOTS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
_UNUSUAL = 1.5  # a step that took much longer than predicted counts as one that took so much longer
_TRUSTED = 4.0  # measured steps of a knot before others are judged by it
_PRIOR_VISITS = 4.0  # how many measured steps the first assumption is worth, at each knot
_MOST_VISITS = 100.0
_MOST_OVERHEAD = 0.5
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
        predicted = float(np.interp(timing.tokens, self.knots, self.shape))
        if self.scale == 0.0:
            self.scale = timing.seconds / predicted
            return
        ratio = timing.seconds / (self.scale * predicted)
        ratio = min(max(ratio, 1 / _UNUSUAL), _UNUSUAL)
        self.scale *= ratio**_DRIFT
        right = int(np.searchsorted(self.knots, timing.tokens))
        right = min(max(right, 1), len(self.knots) - 1)
        share = (timing.tokens - self.knots[right - 1]) / (self.knots[right] - self.knots[right - 1])
        share = min(share, 1.0)
        for knot, weight in ((right - 1, 1.0 - share), (right, share)):
            if weight > 0:
                self.visits[knot] = min(self.visits[knot] + weight, _MOST_VISITS)
                self.shape[knot] *= ratio ** (weight / (self.visits[knot] + _PRIOR_VISITS))
        self._mend()

    def _mend(self) -> None:
        """Keep the curve from falling; where nothing was measured it goes on no flatter than before."""
        slope = self._slope * self.shape[0]
        known = -1  # the last measured knot
        for knot in range(1, len(self.knots)):
            before = self.shape[knot - 1]
            width = self.knots[knot] - self.knots[knot - 1]
            if self.visits[knot] < 1.0:
                self.shape[knot] = before + slope * width
                continue
            self.shape[knot] = max(self.shape[knot], before)
            if self.visits[knot] < _TRUSTED:
                continue
            if known >= 0:
                rise = self.shape[knot] - self.shape[known]
                slope = max(slope, rise / (self.knots[knot] - self.knots[known]))
            known = knot

    def __call__(self, tokens: Any) -> Any:
        """Relative cost of steps of so many tokens, in an arbitrary unit."""
        return np.interp(tokens, self.knots, self.shape)


def least_worthwhile(cost: StepCost, requests: int, most: int) -> float:
    """What a candidate that is ever worth drafting is accepted with at least.

    The best draft gains by its last token: (tokens a step) / (cost of it) of the draft before, which is at
    least that of no draft, times what one more token costs.

    Args:
        most: the most tokens of all drafts.
    """
    if requests < 1 or most < 1:
        return 1.0
    costs = cost(requests + np.arange(most + 1))
    return float(requests / costs[0] * np.diff(costs).min())


def worthwhile(cost: StepCost, requests: int, reach: np.ndarray, margin: float = 1.02) -> tuple[int, float]:
    """How many draft tokens make the most tokens a second, and how much that is worth.

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
    tokens = requests + np.arange(len(reach) + 1)
    expected = requests + np.concatenate(([0.0], np.cumsum(reach, dtype=np.float64)))
    speed = expected / cost(tokens)
    best = int(np.argmax(speed))
    ratio = float(speed[best] / speed[0] * (1.0 - cost.overhead))
    return (best, ratio - 1.0) if ratio > margin else (0, -cost.overhead)
