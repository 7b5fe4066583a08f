"""Waiting for another process's step leaves the cores to others, with vLLM's own queue through shared memory."""

from __future__ import annotations

import inspect
import multiprocessing
import threading
import time
from typing import TYPE_CHECKING

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from galley_plugins import waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP_SECONDS = 0.1


@pytest.fixture(autouse=True)
def spin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """vLLM's own wait, in place again: an engine that another test ran in this process has changed it."""
    spin: Callable[..., None] = inspect.unwrap(SpinCondition.wait)
    monkeypatch.setattr(SpinCondition, "wait", spin)
    return spin


@pytest.fixture
def queue() -> Iterator[tuple[MessageQueue, MessageQueue]]:
    """Who writes and who reads."""
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join(10)
    yield writer, reader
    reader.shutdown()
    writer.shutdown()


def exchange(queue: tuple[MessageQueue, MessageQueue], steps: int) -> tuple[list[int], float, float]:
    """What was read, the reader's seconds on a core, and all seconds."""
    writer, reader = queue

    def write() -> None:
        for step in range(steps):
            time.sleep(STEP_SECONDS)
            writer.enqueue(step)

    thread = threading.Thread(target=write)
    thread.start()
    begin, own = time.perf_counter(), time.thread_time()
    found = [reader.dequeue(timeout=30) for _ in range(steps)]
    own, seconds = time.thread_time() - own, time.perf_counter() - begin
    thread.join(10)
    return found, own, seconds


def test_who_waits_takes_little_of_a_core(queue: tuple[MessageQueue, MessageQueue]) -> None:
    waiting.register()
    found, own, seconds = exchange(queue, 5)
    assert found == [0, 1, 2, 3, 4]
    assert own < 0.25 * seconds  # vLLM's own takes nearly all where a core is free


def test_a_second_registration_changes_nothing() -> None:
    waiting.register()
    once = SpinCondition.wait
    waiting.register()
    assert SpinCondition.wait is once


def test_workers_look_as_before(spin: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", "VllmWorker-0")
    waiting.register()
    assert SpinCondition.wait is spin


def test_looks_come_within_a_hundredth_of_the_wait() -> None:
    # A step of 10 ms is seen at most 0.1 ms late, one of a second half a millisecond.
    assert waiting.pause(0.01) == pytest.approx(1e-4)
    assert waiting.pause(0.0) == pytest.approx(2e-5)
    assert waiting.pause(1.0) == pytest.approx(5e-4)
