"""Clients that leave, at every moment of a request: the worker is let go and nothing stays counted."""

from __future__ import annotations

import asyncio

import pytest

from galley.config import ModelConfig

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}


def cancelled(rig, model: str = "mock") -> float | None:
    return rig.metric("galley_requests_total", model=model, route="chat", outcome="cancelled")


async def worker_let_go(rig) -> None:
    engine = rig.engine
    await engine.until(lambda: bool(engine.requests) and engine.requests[-1].ended)
    assert engine.requests[-1].disconnected
    assert engine.counters.running == 0
    await rig.idle()
    assert rig.workers[0].in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte(rig, stream):
    document = {**CHAT, "stream": stream, "mock": {"gates": {"headers": "held"}}}
    async with rig.raw(document):
        await rig.engine.gates.reached("held")
        assert rig.workers[0].in_flight == 1
    await worker_let_go(rig)
    assert cancelled(rig) == 1


async def test_within_a_unary_answer(rig):
    async with rig.raw({**CHAT, "mock": {"gates": {"body": "held"}}}):
        await rig.engine.gates.reached("held")
    await worker_let_go(rig)
    assert cancelled(rig) == 1


async def test_within_a_stream(rig):
    document = {**CHAT, "stream": True, "mock": {"gates": {"token-3": "held"}}}
    async with rig.raw(document) as (reader, _):
        await rig.engine.gates.reached("held")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    await worker_let_go(rig)
    assert cancelled(rig) == 1


async def test_a_client_that_stops_reading_and_leaves(rig):
    document = {**CHAT, "stream": True, "mock": {"tokens": 100_000}}
    async with rig.raw(document) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
    await worker_let_go(rig)
    assert cancelled(rig) == 1


async def test_while_the_body_is_on_its_way(rig):
    host, port = rig.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    await writer.drain()
    await rig.busy()
    writer.close()
    await writer.wait_closed()
    await rig.idle()
    assert not rig.engine.requests
    assert cancelled(rig, model="unknown") == 1


async def test_while_a_second_worker_is_asked(make_rig):
    rig = await make_rig(replicas=2)
    await rig.listeners[0].stop()
    async with rig.raw({**CHAT, "mock": {"gates": {"headers": "held"}}}):
        await rig.engines[1].gates.reached("held")
    await rig.engines[1].until(lambda: rig.engines[1].requests[-1].ended)
    assert rig.engines[1].requests[-1].disconnected
    await rig.idle()
    assert cancelled(rig) == 1


async def test_the_worker_notices_soon(rig):
    """What users of a busy engine wait for: the work of a client that left ends within 200 ms."""
    loop = asyncio.get_running_loop()
    took = []
    for number in range(20):
        async with rig.raw({**CHAT, "mock": {"gates": {"headers": f"held-{number}"}}}):
            await rig.engine.gates.reached(f"held-{number}")
            left = loop.time()
        await worker_let_go(rig)
        took.append(loop.time() - left)
    assert sorted(took)[-2] < 0.2


async def test_many_that_leave_at_once(make_rig):
    rig = await make_rig(models=(ModelConfig(name="mock", aliases=("other",)),), replicas=2)
    clients = [
        rig.raw(
            {**CHAT, "model": "other", "stream": bool(number % 2), "mock": {"gates": {"headers": "held"}}}
        )
        for number in range(40)
    ]
    for client in clients:
        await client.__aenter__()
    for engine in rig.engines:
        await engine.gates.reached("held", 20)
    assert [worker.in_flight for worker in rig.workers] == [20, 20]
    await asyncio.gather(*(client.__aexit__(None, None, None) for client in clients))
    for engine in rig.engines:
        await engine.until(lambda engine=engine: engine.counters.running == 0)
        assert all(seen.disconnected for seen in engine.requests)
    await rig.idle()
    assert cancelled(rig) == 40


async def test_a_connection_is_used_again_after_an_answer(rig):
    async with rig.raw(CHAT) as (reader, writer):
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    assert not cancelled(rig)
