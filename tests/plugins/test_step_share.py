"""Scripted step times: seconds that a machine with a known cost of tokens would take."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from galley_plugins.step_share import LEAST, PROBE_EVERY, StepShare

if TYPE_CHECKING:
    from collections.abc import Callable


class Machine:
    """Steps of `alone` seconds and `token` seconds more for each token of an embedding."""

    def __init__(self, share: StepShare, alone: float, token: float) -> None:
        self.share, self.alone, self.token = share, alone, token
        self.now = 0.0
        self.noise: Callable[[], float] = lambda: 1.0

    def step(self, *, embeds: bool = True, reading: bool = False) -> int:
        self.share.begin(self.now)
        tokens = self.share.tokens() if embeds else 0
        self.share.end(None if reading else tokens)
        self.now += (self.alone + self.token * tokens + (0.1 if reading else 0.0)) * self.noise()
        return tokens

    def steps(self, number: int) -> list[int]:
        return [self.step() for _ in range(number)]


def test_steps_take_the_slowdown_that_is_asked_for() -> None:
    machine = Machine(StepShare(256, slowdown=1.75), alone=0.025, token=0.001)
    machine.steps(100)
    shares = [tokens for tokens in machine.steps(64) if tokens]
    assert set(shares) <= {18, 19}  # 0.75 x 25 ms at 1 ms a token


def test_one_step_of_sixteen_measures_chats_alone() -> None:
    shares = Machine(StepShare(64), 0.025, 0.001).steps(10 * PROBE_EVERY)
    assert [index for index, tokens in enumerate(shares) if tokens == 0] == list(
        range(PROBE_EVERY - 1, 10 * PROBE_EVERY, PROBE_EVERY)
    )


def test_the_share_follows_a_cost_that_rises_and_falls() -> None:
    machine = Machine(StepShare(256, slowdown=2.0), 0.020, 0.0005)
    machine.steps(100)
    assert machine.steps(8)[-1] == pytest.approx(40, abs=1)
    machine.token = 0.002
    machine.steps(100)
    assert machine.steps(8)[-1] == pytest.approx(10, abs=1)
    machine.alone = 0.060
    machine.steps(150)
    assert machine.steps(8)[-1] == pytest.approx(30, abs=1)


def test_tokens_that_cost_nothing_get_all_there_is() -> None:
    machine = Machine(StepShare(256), 0.025, 0.0)
    machine.steps(200)
    assert max(machine.steps(16)) == 256


def test_embeddings_never_stop() -> None:
    machine = Machine(StepShare(256), 0.010, 1.0)
    machine.steps(100)
    assert sorted(set(machine.steps(32))) == [0, LEAST]
    reading = Machine(StepShare(256), 0.010, 0.001)
    taken = [reading.step(reading=True) for _ in range(64)]  # nothing can be measured
    assert taken.count(0) == 4
    assert sum(taken) > 0


def test_noise_and_single_long_steps_do_not_sway_it() -> None:
    machine = Machine(StepShare(256, slowdown=2.0), 0.025, 0.001)
    random_numbers = random.Random(0)
    machine.noise = lambda: random_numbers.choice([0.95, 1.0, 1.0, 1.05, 1.0, 1.0, 1.0, 6.0])
    machine.steps(200)
    shares = [tokens for tokens in machine.steps(200) if tokens]
    assert min(shares) >= 15
    assert max(shares) <= 40


def test_times_of_steps_scheduled_ahead_are_told_apart() -> None:
    """Asynchronously, a step is begun while the one before still runs: its time is seen one begin later."""
    share = StepShare(256, slowdown=2.0, lag=1)
    now, running = 0.0, 0.0
    taken = []
    for _ in range(200):
        share.begin(now)
        tokens = share.tokens()
        share.end(tokens)
        taken.append(tokens)
        now, running = now + running, 0.025 + 0.001 * tokens  # waits for the earlier step alone
    assert max(taken[-16:]) == pytest.approx(25, abs=2)


def test_a_pause_is_no_steps_time() -> None:
    machine = Machine(StepShare(256, slowdown=2.0), 0.020, 0.001)
    machine.steps(100)
    for _ in range(10):
        machine.share.pause()
        machine.now += 100
        machine.steps(20)
    assert machine.steps(8)[-1] == pytest.approx(20, abs=1)


def test_steps_without_embeddings_measure_too() -> None:
    machine = Machine(StepShare(256, slowdown=2.0), 0.020, 0.001)
    for _ in range(50):
        assert machine.step(embeds=False) == 0
    machine.steps(60)
    assert machine.steps(8)[-1] == pytest.approx(20, abs=1)
