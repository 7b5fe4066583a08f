"""The best share of a mix, against scipy's bounded search."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from galley_plugins.memory.building.mixture import mixture


def nats(weight: float, first: np.ndarray, second: np.ndarray) -> float:
    return float(-np.log((1 - weight) * first + weight * second).mean())


probability = st.floats(1e-6, 1.0)


@given(st.lists(st.tuples(probability, probability), min_size=1, max_size=30))
def test_no_other_share_is_better(pairs: list[tuple[float, float]]) -> None:
    first, second = np.array(pairs).T
    found = mixture(np.log(first), second)
    assert 0 <= found.weight <= 1
    assert found.nats == pytest.approx(nats(found.weight, first, second), abs=1e-9)
    assert found.plain == pytest.approx(nats(0.0, first, second), abs=1e-9)
    best = minimize_scalar(nats, bounds=(0, 1), args=(first, second), method="bounded")
    assert found.nats <= best.fun + 1e-9
    assert found.nats <= min(nats(share, first, second) for share in np.linspace(0, 1, 101)) + 1e-9
    assert found.gain == found.plain - found.nats >= -1e-9


def test_half_of_each_by_hand() -> None:
    # Each is right once: (1 - w) * w is largest at 1/2.
    found = mixture(np.log([1.0, 1e-300]), np.array([0.0, 1.0]))
    assert found.weight == pytest.approx(0.5)
    assert found.nats == pytest.approx(math.log(2))


def test_a_share_that_is_given_stays() -> None:
    found = mixture(np.log([0.5, 0.25]), np.array([0.25, 0.0]), 0.2)
    assert found.weight == 0.2
    assert found.nats == pytest.approx(-(math.log(0.45) + math.log(0.2)) / 2)


def test_the_ends_are_taken() -> None:
    assert mixture(np.log([0.5, 0.5]), np.array([0.4, 0.5])).weight == 0
    assert mixture(np.log([0.5, 0.5]), np.array([0.6, 0.5])).weight == pytest.approx(1, abs=1e-9)
    assert mixture(np.log([0.5]), np.array([0.0]), 1.0).nats == pytest.approx(-math.log(2.2e-308), rel=0.01)
