"""Stopping a request: once, for one reason, and in time."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from galley.errors import ErrorKind
from galley.exchange import Exchange
from galley.routes import route_of

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def served(receive=None):
    """An exchange whose task waits until it is stopped."""
    ready = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        ready.set_result(Exchange(route_of("/v1/chat/completions"), {"headers": []}, receive, None))
        await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(serve())
    try:
        yield await ready
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_the_first_reason_counts():
    async with served() as exchange:
        exchange.stop(ErrorKind.CLIENT_GONE)
        exchange.stop(ErrorKind.SHUT_DOWN)
        await asyncio.wait([exchange.task])
        assert exchange.stopped_by.kind is ErrorKind.CLIENT_GONE


async def test_nothing_stops_what_is_finished():
    async with served() as exchange:
        exchange.finished = True
        exchange.stop(ErrorKind.CLIENT_GONE)
        await asyncio.sleep(0)
        assert exchange.stopped_by is None
        assert not exchange.task.done()


async def test_a_client_is_watched_past_other_messages():
    messages = iter([{"type": "http.request"}, {"type": "http.request"}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async with served(receive) as exchange:
        await exchange.watch_client()
        assert exchange.stopped_by.kind is ErrorKind.CLIENT_GONE


async def test_a_deadline_that_moves_on_does_not_stop():
    async with served() as exchange:
        deadline = exchange.deadline
        for _ in range(8):
            deadline.arm(0.05, ErrorKind.IDLE_TIMEOUT)
            await asyncio.sleep(0.01)
        assert exchange.stopped_by is None
        await asyncio.wait([exchange.task])
        assert exchange.stopped_by.kind is ErrorKind.IDLE_TIMEOUT
        assert "0.05 s" in exchange.stopped_by.message


async def test_a_nearer_deadline_is_kept():
    async with served() as exchange:
        deadline = exchange.deadline
        deadline.arm(600, ErrorKind.FIRST_BYTE_TIMEOUT)
        deadline.arm(0.01, ErrorKind.IDLE_TIMEOUT)
        await asyncio.wait([exchange.task])
        assert exchange.stopped_by.kind is ErrorKind.IDLE_TIMEOUT
        deadline.close()


@pytest.mark.parametrize("end", ["rest", "close"])
async def test_a_deadline_that_rests_or_is_closed_stops_nothing(end):
    async with served() as exchange:
        deadline = exchange.deadline
        deadline.arm(0.01, ErrorKind.IDLE_TIMEOUT)
        getattr(deadline, end)()
        await asyncio.sleep(0.03)
        assert exchange.stopped_by is None


async def test_a_deadline_that_was_never_armed_can_be_closed():
    async with served() as exchange:
        exchange.deadline.close()
        assert not exchange.task.done()
