"""Serving the mock engine on a socket: for a test in the test's own loop, or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from galley.mock_engine.engine import MockEngine
from galley.mock_engine.playback import TRANSPORT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BACKLOG = 2048


class _Protocol(HttpToolsProtocol):
    """Hands the transport to the application, which breaks it when a script says so."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {TRANSPORT: {"transport": self.transport}}


class Listener:
    """A mock engine on a port; it can refuse connections for a while and come back on the same port."""

    def __init__(self, engine: MockEngine, host: str, port: int) -> None:
        self.engine = engine
        self._host = host
        self._port = port
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen; connections are accepted when this returns."""
        config = uvicorn.Config(self.engine, ws="none", lifespan="off", log_config=None, access_log=False)
        config.load()

        def protocol() -> asyncio.Protocol:
            return _Protocol(config, self._state, {})

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(protocol, self._host, self._port, backlog=BACKLOG)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and break every connection: from now on new ones are refused."""
        if self._server is None:
            return
        self._server.close()
        for connection in tuple(self._state.connections):
            connection.transport.abort()
        await self._server.wait_closed()
        self._server = None
        while self._state.tasks:
            await asyncio.wait(self._state.tasks)


@contextlib.asynccontextmanager
async def listen(engine: MockEngine, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Listener]:
    """Serve the engine in the running loop; port 0 takes a free one."""
    listener = Listener(engine, host, port)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.stop()


async def serve(host: str = "127.0.0.1", port: int = 8001, models: tuple[str, ...] = ("mock",)) -> None:
    """Serve a mock engine until cancelled."""
    async with listen(MockEngine(models=models), host, port):
        await asyncio.get_running_loop().create_future()
