"""One client request while it runs: what is known of it, and the one way to stop it from outside.

A request can be stopped because its client went away, because a worker took too long, or because the server
shuts down. All of these cancel the task that serves it and leave the reason behind, so that there is one
clean-up.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

from galley.errors import ErrorKind, GatewayError
from galley.headers import request_id
from galley.metrics import UNKNOWN_MODEL

if TYPE_CHECKING:
    from galley.asgi import Receive, Scope, Send
    from galley.headers import RawHeaders
    from galley.routes import Route
    from galley.sse import EventStream


class Exchange:
    """A request and its answer; created in the task that serves it."""

    __slots__ = (
        "answer",
        "arrived",
        "body_read",
        "deadline",
        "ended",
        "error",
        "events",
        "finished",
        "model",
        "overhead",
        "receive",
        "request_id",
        "route",
        "scope",
        "send",
        "started",
        "status",
        "stopped_by",
        "stream",
        "task",
        "worker",
    )

    def __init__(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        # the client's connection
        self.scope = scope
        self.receive = receive
        self.send = send
        self.task = task
        self.deadline = Deadline(self)
        # the request; times are `time.perf_counter()`
        self.route = route
        self.request_id = request_id(scope["headers"])
        self.arrived = time.perf_counter()
        self.body_read = 0.0
        self.model = UNKNOWN_MODEL
        self.stream = False
        # the answer
        self.worker = ""
        self.started = False  # its status line was sent
        self.finished = False  # nothing can stop it any more
        self.status = 0
        self.events: EventStream | None = None
        self.answer = b""  # the body, where it is not a stream
        self.ended = 0.0
        self.overhead = 0.0  # seconds
        # how it failed
        self.stopped_by: GatewayError | None = None
        self.error: GatewayError | None = None

    def stop(self, kind: ErrorKind, **details: Any) -> None:
        """Cancel the serving task because of `kind`; the first reason counts, none after the last byte."""
        if self.stopped_by is None and not self.finished:
            self.stopped_by = GatewayError(kind, **details)
            self.task.cancel()

    async def watch_client(self) -> None:
        """Stop when the client closes the connection; the body must have been read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.stop(ErrorKind.CLIENT_GONE)

    async def start(self, status: int, headers: RawHeaders) -> None:
        """Send the status line and the headers."""
        self.started = True
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes) -> None:
        """Send a part of the body, with more to come."""
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes) -> None:
        """Send the last part of the body."""
        await self.send({"type": "http.response.body", "body": body})
        self.finished = True


class Deadline:
    """Stops an exchange that waits too long for its worker.

    One timer serves all waits of a request: moving the deadline is an assignment, and the timer looks at it
    when it fires.
    """

    __slots__ = ("_at", "_exchange", "_kind", "_loop", "_seconds", "_timer", "_wakes_at")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange: Exchange | None = exchange
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = math.inf
        self._at = math.inf
        self._seconds = math.inf
        self._kind = ErrorKind.IDLE_TIMEOUT

    def arm(self, seconds: float, kind: ErrorKind) -> None:
        """From now on the worker has `seconds`; afterwards the exchange is stopped with `kind`."""
        self._kind = kind
        self._seconds = seconds
        self._at = self._loop.time() + seconds
        if self._at < self._wakes_at:
            self._schedule()

    def rest(self) -> None:
        """Nothing is waited for."""
        self._at = math.inf

    def close(self) -> None:
        """The end, also of the reference to the exchange: nothing is left for garbage collection."""
        self._exchange = None
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = self._at
        self._timer = self._loop.call_at(self._at, self._look)

    def _look(self) -> None:
        self._wakes_at = math.inf
        self._timer = None
        if self._at == math.inf or self._exchange is None:
            return
        if self._loop.time() < self._at:
            self._schedule()
        else:
            self._exchange.stop(self._kind, worker=self._exchange.worker, seconds=self._seconds)
