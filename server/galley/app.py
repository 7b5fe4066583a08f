"""The gateway as one ASGI application: passed-through routes go to the relay, the rest to FastAPI."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from galley.asgi import send_json
from galley.endpoints import Status, create_endpoints
from galley.errors import ErrorKind, GatewayError
from galley.metrics import Metrics
from galley.relay import Relay
from galley.routes import route_of

if TYPE_CHECKING:
    from galley.asgi import Receive, Scope, Send
    from galley.config import Config
    from galley.workers import WorkerPool


class Gateway:
    """The ASGI callable, and the handle by which a server drains it."""

    def __init__(self, config: Config, pool: WorkerPool) -> None:
        self.config = config
        self.pool = pool
        self.metrics = Metrics(pool)
        self.relay = Relay(config.gateway, pool, self.metrics)
        self._endpoints = create_endpoints(Status(pool, self.relay), self.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            route = route_of(scope["path"])
            if route is None:
                # FastAPI routes GET only; the server leaves the body out of an answer to HEAD.
                if scope["method"] == "HEAD":
                    scope = {**scope, "method": "GET"}
                await self._endpoints(scope, receive, send)
            elif scope["method"] in route.methods:
                await self.relay.serve(route, scope, receive, send)
            else:
                await _refuse_method(scope, send, ", ".join(route.methods))
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    @property
    def draining(self) -> bool:
        return not self.relay.accepting

    def begin_drain(self) -> None:
        """Readiness turns 503 and new requests are refused; running ones go on."""
        self.relay.accepting = False

    async def drained(self, seconds: float) -> bool:
        """Wait until no request runs; False if some still do after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while self.relay.running:
                    await self.relay.ended.wait()
        except TimeoutError:
            return False
        return True

    def abort(self) -> int:
        """End every running request with an error its client can read; returns how many there were."""
        running = tuple(self.relay.running)
        for exchange in running:
            exchange.stop(ErrorKind.SHUT_DOWN)
        return len(running)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.relay.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.relay.close()
        await send({"type": "lifespan.shutdown.complete"})


def create_app(config: Config, pool: WorkerPool) -> Gateway:
    """The gateway in front of `pool`; start it through ASGI's lifespan."""
    return Gateway(config, pool)


async def _refuse_method(scope: Scope, send: Send, allowed: str) -> None:
    error = GatewayError(
        ErrorKind.METHOD_NOT_ALLOWED, path=scope["path"], method=scope["method"], allowed=allowed
    )
    await send_json(send, error.kind.status, error.body(), error.headers())
