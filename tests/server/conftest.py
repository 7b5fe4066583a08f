"""A gateway and mock engines on real sockets in the test's own loop, and what must hold after every test."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from galley.app import Gateway, create_app
from galley.config import Config, GatewayConfig, ModelConfig
from galley.mock_engine import MockEngine, listen
from galley.workers import Worker, WorkerPool

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@dataclass
class Rig:
    """One gateway with its workers.

    `engines` and `listeners` are in the order of `pool.workers`.
    """

    gateway: Gateway
    pool: WorkerPool
    url: str
    client: httpx.AsyncClient
    engines: list[MockEngine] = field(default_factory=list)
    listeners: list = field(default_factory=list)

    @property
    def engine(self) -> MockEngine:
        return self.engines[0]

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self.pool.workers

    async def post(self, path="/v1/chat/completions", document=None, **options) -> httpx.Response:
        return await self.client.post(path, json=CHAT if document is None else document, **options)

    async def chat(self, headers=None, **members) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={**CHAT, **members}, headers=headers)

    async def direct(self, path="/v1/chat/completions", document=None, headers=None) -> httpx.Response:
        """The same request to the first worker, without the gateway."""
        async with httpx.AsyncClient(base_url=self.listeners[0].url) as client:
            return await client.post(path, json=CHAT if document is None else document, headers=headers)

    @contextlib.asynccontextmanager
    async def raw(self, document, path="/v1/chat/completions"):
        """A connection on which the request was sent, as (reader, writer), closed at the end."""
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def metric(self, name, **labels) -> float | None:
        return self.gateway.metrics.registry.get_sample_value(name, labels)

    async def busy(self) -> None:
        """Wait until the gateway has begun with a request."""
        while True:
            if self.gateway.relay.running:
                return
            await asyncio.sleep(0)

    async def idle(self) -> None:
        """Wait until the gateway has ended every request."""
        while self.gateway.relay.running:
            await self.gateway.relay.ended.wait()

    def invariants(self) -> None:
        assert not self.gateway.relay.running
        for worker in self.workers:
            assert worker.in_flight == 0
            in_flight = self.metric("galley_in_flight_requests", model=worker.model, worker=worker.id)
            assert in_flight == 0
        for engine in self.engines:
            assert engine.counters.running == 0
            assert all(seen.ended for seen in engine.requests)


@contextlib.asynccontextmanager
async def serve_gateway(gateway: Gateway):
    """The gateway behind uvicorn's protocol on a free port, as its URL."""
    config = uvicorn.Config(gateway, lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    gateway.relay.open()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpToolsProtocol(config, state, {}), "127.0.0.1", 0
    )
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in tuple(state.connections):
            connection.transport.close()
        await server.wait_closed()
        while state.tasks:
            await asyncio.wait(state.tasks)
        await gateway.relay.close()


@pytest.fixture
async def make_rig():
    """Start a rig: `replicas` mock engines for each model, all of them ready unless said otherwise."""
    before = asyncio.all_tasks()
    async with contextlib.AsyncExitStack() as stack:
        rigs = []

        async def make(models=None, replicas=1, ready=True, **gateway) -> Rig:
            models = models or (ModelConfig(name="mock"),)
            config = Config(gateway=GatewayConfig(port=0, access_log=False, **gateway), models=models)
            pool = WorkerPool(models)
            engines, listeners = [], []
            for model in models:
                for number in range(replicas):
                    engine = MockEngine(models=model.served_names)
                    listener = await stack.enter_async_context(listen(engine))
                    worker = pool.add(Worker(f"{model.name}-{number}", model.name))
                    if ready:
                        worker.mark_starting(listener.url)
                        worker.mark_ready()
                    engines.append(engine)
                    listeners.append(listener)
            app = create_app(config, pool)
            url = await stack.enter_async_context(serve_gateway(app))
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
            rigs.append(Rig(app, pool, url, client, engines, listeners))
            return rigs[-1]

        yield make
        async with asyncio.timeout(20):
            for rig in rigs:
                for engine in rig.engines:
                    engine.gates.release_all()
                await rig.idle()
                for engine in rig.engines:
                    await engine.until(lambda engine=engine: engine.counters.running == 0)
                rig.invariants()
    await no_tasks_but(before)


async def no_tasks_but(before: set[asyncio.Task]) -> None:
    """What a test started is over; a cancelled task may need a few turns of the loop for it."""
    for _ in range(10):
        left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
        left = {task for task in left if "TestRunner" not in repr(task.get_coro())}
        if not left:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"still running: {left}")


@pytest.fixture
async def rig(make_rig) -> Rig:
    """One model, one worker."""
    return await make_rig()
