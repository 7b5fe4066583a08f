"""Workers and their pool: states, load by scope, and choice."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.config import ModelConfig
from galley.workers import Signal, State, Worker, WorkerPool

pytestmark = pytest.mark.anyio


def pool_of(count: int) -> WorkerPool:
    pool = WorkerPool((ModelConfig(name="m"),))
    for number in range(count):
        pool.add(Worker(f"m-{number}", "m", f"http://w{number}/")).mark_ready()
    return pool


def test_a_worker_through_its_life():
    worker = Worker("m-0", "m")
    assert (worker.state, worker.url) == (State.STARTING, None)
    worker.mark_starting("http://host:1/")
    assert (worker.state, worker.url, worker.restarts) == (State.STARTING, "http://host:1", 0)
    worker.mark_ready()
    worker.mark_unhealthy("slow")
    assert (worker.state, worker.reason) == (State.UNHEALTHY, "slow")
    worker.mark_ready("http://host:2")
    assert (worker.state, worker.reason, worker.url) == (State.READY, "", "http://host:2")
    generation = worker.generation
    worker.mark_down("exit code 9")
    assert (worker.state, worker.url) == (State.DOWN, None)
    worker.mark_starting("http://host:3")
    assert worker.restarts == 1
    assert worker.generation > generation
    worker.mark_ready()
    worker.mark_draining()
    worker.mark_stopped()
    assert (worker.state, worker.url) == (State.STOPPED, None)


def test_a_worker_cannot_be_ready_nowhere():
    with pytest.raises(ValueError, match="m-0: ready without a URL"):
        Worker("m-0", "m").mark_ready()


def test_a_refusal_only_concerns_a_ready_worker():
    worker = Worker("m-0", "m", "http://w")
    worker.mark_refused()
    assert worker.state is State.STARTING
    worker.mark_ready()
    worker.mark_refused()
    assert worker.state is State.UNHEALTHY


def test_what_was_learned_of_a_process_goes_with_it():
    worker = Worker("m-0", "m", "http://w")
    worker.fingerprint = b'"fp"'
    worker.mark_down("gone")
    worker.mark_starting("http://w")
    assert worker.fingerprint is None


def test_load_is_counted_by_scope():
    worker = Worker("m-0", "m", "http://w")
    with worker.request(), worker.request():
        assert worker.in_flight == 2
    with pytest.raises(RuntimeError), worker.request():
        raise RuntimeError
    assert worker.in_flight == 0


def test_ids_and_models_are_checked():
    pool = pool_of(1)
    with pytest.raises(ValueError, match="'m-0' is used twice"):
        pool.add(Worker("m-0", "m"))
    with pytest.raises(ValueError, match="found model 'x', which is not configured"):
        pool.add(Worker("x-0", "x"))
    assert pool.get("m-0") is pool.workers[0]
    assert pool.get("m-1") is None
    assert pool.workers == (pool.get("m-0"),)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(State)), min_size=1, max_size=8))
def test_the_choice_is_ready_and_none_is_less_loaded(workers):
    pool = WorkerPool((ModelConfig(name="m"),))
    for number, (load, state) in enumerate(workers):
        worker = pool.add(Worker(f"m-{number}", "m", "http://w"))
        worker.in_flight, worker.state = load, state
    ready = [load for load, state in workers if state is State.READY]
    chosen = pool.choose("m")
    assert (chosen is None) == (not ready)
    assert pool.is_ready() == bool(ready)
    if chosen is not None:
        assert chosen.state is State.READY
        assert chosen.in_flight == min(ready)


@given(st.integers(1, 6), st.integers(1, 5))
def test_equal_workers_take_turns(count, rounds):
    pool = pool_of(count)
    chosen = Counter(pool.choose("m").id for _ in range(count * rounds))
    assert set(chosen.values()) == {rounds}
    assert len(chosen) == count


def test_a_worker_to_avoid_is_the_last_resort():
    pool = pool_of(2)
    first, second = pool.workers
    assert all(pool.choose("m", avoid=first) is second for _ in range(3))
    second.mark_down("gone")
    assert pool.choose("m", avoid=first) is first
    first.mark_draining()
    assert pool.choose("m", avoid=first) is None


def test_names_and_what_they_mean():
    pool = WorkerPool((ModelConfig(name="one", aliases=("uno",)), ModelConfig(name="two")))
    worker = pool.add(Worker("two-0", "two", "http://w"))
    worker.set_cards([{"id": "two"}, {"id": "adapter"}])
    assert pool.names == ("one", "uno", "two", "adapter")
    assert pool.resolve("uno").name == "one"
    assert pool.resolve("adapter").name == "two"
    assert pool.resolve("three") is None


async def test_waiting_for_a_state():
    worker = Worker("m-0", "m", "http://w")
    waiting = asyncio.create_task(worker.wait_for(State.READY, State.STOPPED))
    await asyncio.sleep(0)
    worker.mark_unhealthy("slow")
    await asyncio.sleep(0)
    assert not waiting.done()
    worker.mark_ready()
    assert await waiting is State.READY


async def test_a_signal_wakes_all_that_wait_and_forgets_those_that_left():
    signal = Signal()
    stays, leaves = asyncio.create_task(signal.wait()), asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    signal.notify()
    await stays
    signal.notify()
    assert leaves.cancelled()
