"""Start, drain and end of a whole gateway process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys

import httpx
import pytest

from galley.config import Config, GatewayConfig, ModelConfig
from galley.mock_engine import MockEngine, listen
from galley.server import GatewayFailed, run
from galley.workers import State, Worker, WorkerPool

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}


@pytest.fixture(autouse=True)
def collection_as_before():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture
async def engine():
    engine = MockEngine()
    async with listen(engine) as listener:
        engine.listener = listener
        yield engine


def config(**gateway) -> Config:
    options = {"port": 0, "probe_seconds": 0.01, "access_log": False, **gateway}
    return Config(gateway=GatewayConfig(**options), models=(ModelConfig(name="mock"),))


async def until_health_is(status: int, client: httpx.AsyncClient) -> None:
    while True:
        if (await client.get("/health")).status_code == status:
            return
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(engine, background=(), **gateway):
    """A gateway on a free port with one ready worker, as (client, stop, task)."""
    settings = config(**gateway)
    pool = WorkerPool(settings.models)
    worker = pool.add(Worker("mock-0", "mock", engine.listener.url))
    stop = asyncio.Event()
    url = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(settings, pool, started=url.set_result, background=background, stop=stop))
    async with httpx.AsyncClient(base_url=await url, timeout=20) as client:
        await worker.wait_for(State.READY)
        try:
            yield client, stop, task
        finally:
            engine.gates.release_all()
            stop.set()
            await asyncio.wait([task])


async def test_it_serves_and_ends(engine):
    async with running(engine) as (client, stop, task):
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        assert "server" not in answer.headers
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 4096
        stop.set()
        await task
        with pytest.raises(httpx.TransportError):
            await client.get("/health/live")


async def test_running_requests_finish_while_new_ones_are_refused(engine):
    async with running(engine, drain_seconds=20) as (client, stop, task):
        held = asyncio.create_task(
            client.post("/v1/chat/completions", json={**CHAT, "mock": {"gates": {"headers": "held"}}})
        )
        await engine.gates.reached("held")
        stop.set()
        await until_health_is(503, client)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        engine.gates.release("held")
        assert (await held).status_code == 200
        await task


async def test_what_runs_longer_than_the_limit_is_cut_off_with_an_error(engine):
    async with running(engine, drain_seconds=0) as (client, stop, task):
        document = {**CHAT, "stream": True, "mock": {"gates": {"token-2": "held"}}}
        async with client.stream("POST", "/v1/chat/completions", json=document) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            stop.set()
            rest = [line async for line in lines if line]
        assert "shut_down" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        await task
        await engine.until(lambda: engine.requests[-1].ended)
        assert any(seen.disconnected for seen in engine.requests)


async def test_what_runs_beside_is_ended_after_the_requests(engine):
    running_then = []

    async def supervise() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            running_then.append(engine.counters.running)

    async with running(engine, background=[supervise()], drain_seconds=20) as (client, stop, task):
        held = asyncio.create_task(
            client.post("/v1/chat/completions", json={**CHAT, "mock": {"gates": {"headers": "held"}}})
        )
        await engine.gates.reached("held")
        stop.set()
        await until_health_is(503, client)
        engine.gates.release("held")
        await task
        assert (await held).status_code == 200
    assert running_then == [0]


async def test_a_failure_beside_ends_the_server_with_it(engine):
    async def fail() -> None:
        await failing.wait()
        raise LookupError("no weights")

    failing = asyncio.Event()
    async with running(engine, background=[fail()]) as (_, _, task):
        failing.set()
        with pytest.raises(LookupError, match="no weights"):
            await task


async def test_a_port_that_is_taken_is_named(engine):
    async def never() -> None:
        raise AssertionError

    port = int(engine.listener.url.rsplit(":", 1)[1])
    settings = config(port=port)
    with pytest.raises(GatewayFailed, match=rf"cannot listen on 127\.0\.0\.1:{port}: "):
        await run(settings, WorkerPool(settings.models), background=[never()])
    settings = config(host="no.such.host.invalid")
    with pytest.raises(GatewayFailed, match=r"cannot listen on no\.such\.host\.invalid:0"):
        await run(settings, WorkerPool(settings.models))


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
async def test_an_ipv6_address_is_a_url(engine):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback")
    async with running(engine, host="::1") as (client, _, _):
        assert str(client.base_url).startswith("http://[::1]:")
        assert (await client.get("/health/live")).status_code == 200


PROCESS = """
import asyncio, sys
from galley.config import Config, GatewayConfig, ModelConfig
from galley.server import run
from galley.workers import WorkerPool
config = Config(
    gateway=GatewayConfig(port=0, drain_seconds=600),
    models=(ModelConfig(name="mock", urls=(sys.argv[1],)),),
)
asyncio.run(run(config, WorkerPool(config.models), started=lambda url: print(url, flush=True)))
print("ended", flush=True)
"""


@contextlib.asynccontextmanager
async def process(engine):
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROCESS, engine.listener.url),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        async with asyncio.timeout(30):
            url = ""
            while not url.startswith("http://"):
                url = (await started.stdout.readline()).decode().strip()
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                await until_health_is(200, client)
                yield started, client
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_drains_and_ends_well(engine, number):
    async with process(engine) as (started, client):
        held = asyncio.create_task(
            client.post("/v1/chat/completions", json={**CHAT, "mock": {"gates": {"headers": "held"}}})
        )
        await engine.gates.reached("held")
        started.send_signal(number)
        await until_health_is(503, client)
        engine.gates.release("held")
        assert (await held).status_code == 200
        assert await started.wait() == 0
        assert b"ended" in await started.stdout.read()


async def test_a_second_signal_ends_at_once(engine):
    async with process(engine) as (started, client):
        held = asyncio.create_task(
            client.post("/v1/chat/completions", json={**CHAT, "mock": {"gates": {"headers": "held"}}})
        )
        await engine.gates.reached("held")
        started.send_signal(signal.SIGTERM)
        await until_health_is(503, client)
        started.send_signal(signal.SIGTERM)
        assert await started.wait() == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            await held
