"""Two models' probabilities of a text's tokens, and the share at which their mix predicts it best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEPS = 40  # of bisection: the weight is exact to 1e-12


@dataclass(frozen=True)
class Mixture:
    """How a mix predicts a text.

    Attributes:
        weight: share of the second model, lambda.
        nats: mean negative log-likelihood of a token.
        plain: the same of the first model alone.
    """

    weight: float
    nats: float
    plain: float

    @property
    def gain(self) -> float:
        """In nats a token."""
        return self.plain - self.nats


def mixture(
    log_probs: NDArray[np.floating], other: NDArray[np.floating], weight: float | None = None
) -> Mixture:
    """
    Args:
        log_probs: [tokens] of the first model, in nats.
        other: [tokens] probabilities of the second.
        weight: None for the best, from 0 to 1; the likelihood has one maximum there.
    """
    first = np.exp(np.asarray(log_probs, np.float64))
    second = np.asarray(other, np.float64)
    chosen = _best(first, second) if weight is None else weight
    mixed = np.maximum((1 - chosen) * first + chosen * second, np.finfo(np.float64).tiny)
    return Mixture(chosen, float(-np.log(mixed).mean()), float(-np.asarray(log_probs, np.float64).mean()))


def _best(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Where the derivative of the mean log-likelihood, which falls, is 0."""

    def slope(weight: float) -> float:
        mixed = (1 - weight) * first + weight * second
        return float(((second - first) / np.maximum(mixed, np.finfo(np.float64).tiny)).mean())

    low, high = 0.0, 1.0
    if slope(low) <= 0:
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if slope(middle) > 0:
            low = middle
        else:
            high = middle
    return low
