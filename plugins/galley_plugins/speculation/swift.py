"""SWIFT: which sub-layers a model skips while it drafts for itself, and when a draft ends (arXiv 2410.06916).

A skip set is a bool array [2 * (L - 2)] over the attention sub-layers of layers 1 to L - 2 and then their
MLPs; the first and the last layer always run. The set is searched while serving: every step a set is tried on
text that was just generated, and kept if it agrees with more of it than the best so far. All requests of a
worker share it, whatever their scope: of their texts it keeps nothing.

Where this differs from the authors' code (github.com/hemingkx/SWIFT): their starting set is scored first, so
that only a better one replaces it; and the surrogate is a Gaussian process over the sets themselves with
expected improvement, not one over continuous points, with an upper confidence bound, of which the largest
become the set.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from galley_plugins.speculation.options import SwiftOptions

_NOISE = 0.1  # of a score, as a share of the scores' variance
_LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the kernel, as shares of the number of sub-layers
_CANDIDATES = 512  # sets that a proposal chooses among
_SWAPS = 4  # the most sub-layers exchanged in a neighbour of the best set


def skip_count(layers: int, ratio: float) -> int:
    """How many sub-layers of a model with so many layers are skipped."""
    return int(2 * (layers - 2) * ratio)


def every_second(layers: int) -> NDArray[np.bool_]:
    """The authors' starting set: both sub-layers of layers 1, 3, 5, ..."""
    return np.tile(np.arange(1, layers - 1) % 2 == 1, 2)


def skipped_layers(skip_set: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Layers whose attention is skipped, and layers whose MLP is."""
    middle = len(skip_set) // 2
    attention, mlp = np.flatnonzero(skip_set[:middle]), np.flatnonzero(skip_set[middle:])
    return (attention + 1).tolist(), (mlp + 1).tolist()


def matchness(predicted: NDArray[np.int32], verified: NDArray[np.int32]) -> float:
    """Share of positions at which the skipping model's best token (int32 [n]) is the text's own."""
    return float((predicted == verified).mean())


class SkipSearch:
    """The search for the set with the highest matchness.

    Attributes:
        skip_set: the best set so far, bool [2 * (layers - 2)].
        score: its matchness; -1 before the first.
        iterations: sets that were scored.
    """

    def __init__(self, layers: int, options: SwiftOptions) -> None:
        self.options = options
        self._count = skip_count(layers, options.skip_ratio)
        if self._count < 1:
            raise ValueError(f"a model of {layers} layers has no sub-layers to skip")
        self.skip_set = every_second(layers)
        self.score = -1.0
        self.iterations = 0
        self._not_better = 0
        self._random = np.random.default_rng(options.seed)
        self._scored: list[NDArray[np.bool_]] = []
        self._scores: list[float] = []

    @property
    def done(self) -> bool:
        options = self.options
        return (
            self.score > options.enough
            or self._not_better >= options.patience
            or self.iterations >= options.iterations
        )

    def propose(self) -> NDArray[np.bool_]:
        """The next set to score, by `judge`."""
        if not self.iterations:
            return self.skip_set
        if (self.iterations + 1) % self.options.bayes_interval:
            return self._any(1)[0]
        near = self._neighbours(_CANDIDATES // 2) if self.skip_set.sum() == self._count else self._any(0)
        candidates = np.concatenate([self._any(_CANDIDATES - len(near)), near])
        gains = expected_improvement(np.array(self._scored), np.array(self._scores), candidates)
        return candidates[int(gains.argmax())]

    def judge(self, skip_set: NDArray[np.bool_], score: float) -> bool:
        """Take the score of a proposed set; whether the set is the best now."""
        self.iterations += 1
        self._scored.append(skip_set)
        self._scores.append(score)
        if score <= self.score:
            self._not_better += 1
            return False
        self.skip_set, self.score, self._not_better = skip_set, score, 0
        return True

    def _any(self, sets: int) -> NDArray[np.bool_]:
        """Random sets. bool [sets, sub-layers]"""
        order = self._random.random((sets, len(self.skip_set))).argsort(axis=1)
        return order < self._count

    def _neighbours(self, sets: int) -> NDArray[np.bool_]:
        """The best set with some sub-layers exchanged. bool [sets, sub-layers]"""
        found = np.tile(self.skip_set, (sets, 1))
        skipped, kept = np.flatnonzero(self.skip_set), np.flatnonzero(~self.skip_set)
        most = min(_SWAPS, len(skipped), len(kept))
        for row in found:
            swaps = int(self._random.integers(1, most + 1))
            row[self._random.choice(skipped, swaps, replace=False)] = False
            row[self._random.choice(kept, swaps, replace=False)] = True
        return found


def expected_improvement(
    scored: NDArray[np.bool_], scores: NDArray[np.float64], candidates: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """By how much each candidate is expected to beat the best score, in standard deviations of the scores.

    A Gaussian process with kernel exp(-Hamming distance / length), an RBF over 0 and 1; the length is the one
    of `_LENGTHS` under which the scores are most likely.

    Args:
        scored: bool [n, sub-layers].
        scores: float64 [n].
        candidates: bool [m, sub-layers].
    """
    targets = (scores - scores.mean()) / max(float(scores.std()), 1e-6)
    distances = _hamming(scored, scored)
    fits = []
    for share in _LENGTHS:
        length = share * scored.shape[1]
        factor = np.linalg.cholesky(np.exp(-distances / length) + _NOISE * np.eye(len(scored)))
        half = np.linalg.solve(factor, targets)
        likelihood = -0.5 * float(half @ half) - float(np.log(factor.diagonal()).sum())
        fits.append((likelihood, length, factor, half))
    _, length, factor, half = max(fits, key=lambda fit: fit[0])
    across = np.linalg.solve(factor, np.exp(-_hamming(scored, candidates) / length))  # [n, m]
    mean = across.T @ half
    spread = np.sqrt(np.maximum(1 - (across**2).sum(axis=0), 1e-9))
    better = (mean - targets.max()) / spread
    below = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in better])
    density = np.exp(-0.5 * better**2) / math.sqrt(2 * math.pi)
    gains: NDArray[np.float64] = spread * (better * below + density)
    return gains


def _hamming(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distances between rows. float64 [rows of one, rows of other]"""
    left, right = one.astype(np.float64), other.astype(np.float64)
    return left @ (1 - right).T + (1 - left) @ right.T


class Chains:
    """Drafts of several requests, growing by a token at a time.

    Attributes:
        tokens: of each request.
        active: int64 [still growing], the requests that the next tokens are for.
    """

    def __init__(self, limits: NDArray[np.int64], confidence: float) -> None:
        self._limits = limits
        self._confidence = confidence
        self.tokens: list[list[int]] = [[] for _ in limits]
        self.active: NDArray[np.int64] = np.flatnonzero(limits > 0)

    def extend(self, tokens: NDArray[np.int64], probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Add one token to each active draft; which of them go on. bool [active]

        A token that the model is unsure of is still drafted, and is its draft's last.
        """
        for request, token in zip(self.active, tokens, strict=True):
            self.tokens[request].append(int(token))
        lengths = np.array([len(self.tokens[request]) for request in self.active])
        onward = (probabilities >= self._confidence) & (lengths < self._limits[self.active])
        self.active = self.active[onward]
        return onward
