from __future__ import annotations

import numpy as np
import pytest

from galley_plugins.speculation.cost import StepCost, least_worthwhile, worthwhile
from galley_plugins.speculation.drafting import Timing


def measured(
    step_time, *, steps: int = 3000, noise: float = 0.0, drift: float = 0.0, seed: int = 0
) -> StepCost:
    cost = StepCost()
    random = np.random.default_rng(seed)
    speed = 1.0
    for _ in range(steps):
        tokens = int(random.integers(1, 33))
        speed *= np.exp(drift * random.normal())
        seconds = step_time(tokens) * speed * np.exp(noise * abs(random.normal()))
        cost.add(Timing(tokens, 1, seconds))
    return cost


def relative(cost: StepCost, tokens: int) -> float:
    return float(cost(tokens) / cost(1))


@pytest.mark.parametrize("slope", [0.005, 0.02, 0.1])
def test_the_curve_takes_the_shape_of_measured_steps(slope: float) -> None:
    cost = measured(lambda tokens: 0.04 * (1 + slope * tokens))
    for tokens in (4, 8, 16, 30):
        assert relative(cost, tokens) == pytest.approx((1 + slope * tokens) / (1 + slope), rel=0.08)


def test_noise_and_a_machine_that_changes_speed_do_not_bend_it() -> None:
    cost = measured(lambda tokens: 0.04 + 0.002 * tokens, noise=0.3, drift=0.02)
    for tokens in (8, 16, 30):
        assert relative(cost, tokens) == pytest.approx((0.04 + 0.002 * tokens) / 0.042, rel=0.15)


def test_a_stray_step_hardly_changes_the_shape() -> None:
    cost = measured(lambda tokens: 0.04 + 0.001 * tokens)
    before = [relative(cost, tokens) for tokens in range(1, 33)]
    cost.add(Timing(8, 1, 5.0))
    assert [relative(cost, tokens) for tokens in range(1, 33)] == pytest.approx(before, rel=0.01)


def test_the_curve_never_falls() -> None:
    cost = measured(lambda tokens: 0.05 - 0.001 * tokens)
    values = cost(np.arange(1, 200))
    assert (np.diff(values) >= 0).all()


def test_nothing_is_drafted_that_does_not_pay() -> None:
    cost = measured(lambda tokens: 0.01 * tokens)  # a step is as long as its tokens are many
    assert worthwhile(cost, 4, np.array([0.6, 0.5, 0.1]))[0] == 0


def test_free_tokens_are_all_drafted() -> None:
    cost = measured(lambda tokens: 0.04)
    assert worthwhile(cost, 1, np.array([0.5, 0.2, 0.05])) == (3, pytest.approx(0.75, rel=0.05))


def test_the_draft_is_cut_where_the_rate_is_best() -> None:
    """One token 1.00, each more 0.10: (1 + .9) / 1.1 = 1.73, (+ .5) / 1.2 = 2.0, (+ .15) / 1.3 = 1.96."""
    cost = StepCost()
    cost.shape = 0.9 + 0.1 * cost.knots
    assert worthwhile(cost, 1, np.array([0.9, 0.5, 0.15])) == (2, pytest.approx(1.0))


def test_tokens_that_nearly_pay_are_drafted_too() -> None:
    """The best draft makes 2.0 tokens in a step of 1.2: a token of 0.1 more must bring 0.2, or nearly so."""
    cost = StepCost()
    cost.shape = 0.9 + 0.1 * cost.knots
    assert worthwhile(cost, 1, np.array([0.9, 0.5, 0.18, 0.18, 0.1])) == (4, pytest.approx(1.0))


def test_in_a_batch_tokens_must_pay_in_full() -> None:
    """The best draft makes 8.9 tokens in a step of 1.7, so 0.1 more must bring 0.52; alone 0.16 for 0.19 do."""
    cost = StepCost()
    cost.shape = 0.8 + 0.1 * cost.knots
    assert worthwhile(cost, 8, np.array([0.9, 0.47]))[0] == 1
    assert worthwhile(cost, 1, np.array([0.9, 0.18]))[0] == 2


def test_larger_batches_draft_less() -> None:
    cost = measured(lambda tokens: 0.04 + 0.0015 * tokens)
    reach = np.array([0.6, 0.4, 0.3, 0.2, 0.1, 0.05])
    counts = [worthwhile(cost, requests, reach)[0] for requests in (1, 8, 32)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_impossible_timings_are_ignored() -> None:
    cost = StepCost()
    cost.add(Timing(0, 0, 1.0))
    cost.add(Timing(1, 1, 0.0))
    assert cost.scale == 0.0
    assert worthwhile(cost, 0, np.array([0.5])) == (0, 0.0)
    assert worthwhile(cost, 1, np.array([])) == (0, 0.0)


def test_what_looking_for_drafts_takes_must_come_back_too() -> None:
    """Free tokens bring a tenth more; with a quarter of each step spent on looking, that does not pay."""
    cost = measured(lambda tokens: 0.04)
    assert worthwhile(cost, 10, np.array([1.0])) == (1, pytest.approx(0.1, rel=0.01))
    for _ in range(200):
        cost.add(Timing(8, 8, 0.04, 0.01))
    assert cost.overhead == pytest.approx(0.25, rel=0.01)
    assert worthwhile(cost, 10, np.array([1.0])) == (0, pytest.approx(-0.25, rel=0.01))


def test_what_was_not_measured_is_no_flatter_than_what_was() -> None:
    cost = StepCost()
    for tokens in [8, 16] * 200:
        cost.add(Timing(tokens, 8, 0.02 + 0.004 * tokens))
    slope = float(cost(16) - cost(8)) / 8
    assert float(cost(64) - cost(24)) / 40 == pytest.approx(slope, rel=0.1)


@pytest.mark.parametrize("requests", [1, 8])
def test_no_draft_that_pays_has_a_candidate_below_the_least(requests: int) -> None:
    cost = measured(lambda tokens: 0.02 + 0.002 * tokens)
    random = np.random.default_rng(2)
    least = least_worthwhile(cost, requests, 16)
    assert least > 0.05
    for _ in range(300):
        reach = np.sort(random.random(16))[::-1]
        count, _ = worthwhile(cost, requests, reach)
        assert count == 0 or reach[count - 1] >= least
