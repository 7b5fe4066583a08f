"""The relay: from a client's request to a worker's answer and back, as bytes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from galley.asgi import send_json
from galley.errors import ErrorKind, GatewayError, Outcome
from galley.exchange import Exchange
from galley.headers import REQUEST_ID, for_client, for_worker, header
from galley.inbound import find_model, read_body, read_head
from galley.routes import Dialect
from galley.sse import EventStream, anthropic_body
from galley.upstream import Upstream, read_some
from galley.usage import ask_for_usage, count_in_answer
from galley.workers import Signal

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from multidict import CIMultiDict

    from galley.asgi import Receive, Scope, Send
    from galley.config import GatewayConfig
    from galley.metrics import Metrics
    from galley.routes import Route
    from galley.usage import TokenCount
    from galley.workers import Worker, WorkerPool

log = structlog.get_logger(__name__)
access_log = structlog.get_logger("galley.access")


@dataclass(frozen=True, slots=True)
class Outbound:
    """A request as it goes to a worker, whichever takes it.

    Attributes:
        target: raw path and query.
        hide_usage: token counts were asked for that the client did not ask for.
    """

    method: str
    target: str
    headers: CIMultiDict[str]
    body: bytes
    hide_usage: bool


class Relay:
    """Serves the passed-through routes.

    Attributes:
        running: every request between its arrival and its last byte.
        accepting: False while draining; new requests are then refused.
    """

    def __init__(self, config: GatewayConfig, pool: WorkerPool, metrics: Metrics) -> None:
        self._config = config
        self._timeouts = config.timeouts
        self._pool = pool
        self._metrics = metrics
        self._upstream: Upstream | None = None
        self.running: set[Exchange] = set()
        self.accepting = True
        self.ended = Signal()

    def open(self) -> None:
        """Must be called inside the event loop."""
        self._upstream = Upstream(self._timeouts)

    async def close(self) -> None:
        if self._upstream is not None:
            await self._upstream.close()
            self._upstream = None

    async def serve(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every failure ends as an answer or an event that the client can parse."""
        exchange = Exchange(route, scope, receive, send)
        self.running.add(exchange)
        try:
            exchange.error = await self._serve(exchange)
            if exchange.error is not None:
                exchange.finished = True
                await _send_error(exchange, exchange.error)
        finally:
            exchange.finished = True
            exchange.ended = time.perf_counter()
            # In the next turn of the loop: the last bytes leave when everything else of this turn is done.
            asyncio.get_running_loop().call_soon(self._close_exchange, exchange)

    def _close_exchange(self, exchange: Exchange) -> None:
        self._record(exchange)
        self.running.discard(exchange)
        self.ended.notify()

    async def _serve(self, exchange: Exchange) -> GatewayError | None:
        try:
            await self._relay(exchange)
        except GatewayError as error:
            return error
        except asyncio.CancelledError:
            if exchange.stopped_by is None:  # not from here: the server itself is ending
                exchange.error = GatewayError(ErrorKind.SHUT_DOWN)
                raise
            exchange.task.uncancel()
            return exchange.stopped_by
        except Exception:
            log.exception("request failed", request_id=exchange.request_id.decode("ascii"))
            return GatewayError(ErrorKind.INTERNAL_ERROR)
        return None

    async def _relay(self, exchange: Exchange) -> None:
        if not self.accepting:
            raise GatewayError(ErrorKind.DRAINING)
        body = b""
        if exchange.route.method == "POST":
            limit = self._config.max_body_bytes
            body = await read_body(exchange.receive, exchange.scope["headers"], limit)
        exchange.body_read = time.perf_counter()
        outbound = self._prepare(exchange, body)
        watcher = asyncio.create_task(exchange.watch_client())
        try:
            await self._dispatch(exchange, outbound)
        finally:
            exchange.deadline.close()
            watcher.cancel()

    def _prepare(self, exchange: Exchange, body: bytes) -> Outbound:
        route, scope = exchange.route, exchange.scope
        query: bytes = scope["query_string"]
        head = read_head(route, body, query)
        exchange.stream = head.stream
        exchange.model = find_model(head, route, self._pool)
        asking = ask_for_usage(body, head, route) if self._config.count_stream_tokens else None
        target: bytes = scope["raw_path"]
        if query:
            target = b"%b?%b" % (target, query)
        return Outbound(
            method=route.method,
            target=target.decode("ascii"),
            headers=for_worker(scope["headers"], exchange.request_id),
            body=body if asking is None else asking,
            hide_usage=asking is not None,
        )

    async def _dispatch(self, exchange: Exchange, outbound: Outbound) -> None:
        """Send the request to a worker; to one more if the first took nothing of it."""
        refused: Worker | None = None
        failure: GatewayError | None = None
        while True:
            worker = self._pool.choose(exchange.model, avoid=refused)
            if worker is None:
                raise failure or self._no_worker(exchange.model)
            if refused is not None:
                self._metrics.retries.labels(exchange.model).inc()
            exchange.worker = worker.id
            with worker.request():
                try:
                    return await self._ask(worker, exchange, outbound)
                except GatewayError as error:
                    if not error.retryable or refused is not None:
                        raise
                    failure, refused = error, worker

    def _no_worker(self, model: str) -> GatewayError:
        states = ", ".join(f"{worker} {state}" for worker, state in self._pool.states(model).items())
        return GatewayError(ErrorKind.NO_READY_WORKER, model=model, states=states or "none was started")

    async def _ask(self, worker: Worker, exchange: Exchange, outbound: Outbound) -> None:
        """Send the request to this worker and its answer to the client."""
        assert self._upstream is not None, "the relay is open while it serves"
        exchange.deadline.arm(self._timeouts.first_byte, ErrorKind.FIRST_BYTE_TIMEOUT)
        exchange.overhead = time.perf_counter() - exchange.body_read
        response = await self._upstream.send(
            worker, outbound.method, outbound.target, outbound.headers, outbound.body
        )
        try:
            first = await read_some(response, worker)
            worker.heard = time.monotonic()
            if response.content_type == "text/event-stream":
                await self._relay_stream(first, response, worker, exchange, outbound.hide_usage)
            else:
                await self._relay_whole(first, response, worker, exchange)
            worker.heard = time.monotonic()
        finally:
            response.close()

    async def _relay_whole(
        self, first: bytes, response: ClientResponse, worker: Worker, exchange: Exchange
    ) -> None:
        """Send the answer on in one piece, so that a worker that dies within it still gives a clean error."""
        parts = [first]
        while not response.content.at_eof():
            exchange.deadline.arm(self._timeouts.idle, ErrorKind.IDLE_TIMEOUT)
            parts.append(await read_some(response, worker))
        exchange.deadline.rest()
        arrived = time.perf_counter()
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        headers = for_client(response.raw_headers, exchange.request_id, worker.id)
        headers.append((b"content-length", b"%d" % len(body)))
        await exchange.start(response.status, headers)
        await exchange.end(body)
        exchange.overhead += time.perf_counter() - arrived
        exchange.answer = body

    async def _relay_stream(
        self, chunk: bytes, response: ClientResponse, worker: Worker, exchange: Exchange, hide_usage: bool
    ) -> None:
        """Send events on as they come; the status waits for the first, so that a failure can have its own."""
        series = self._metrics.of_stream(exchange.model, exchange.route.name)
        events = exchange.events = EventStream(hide_usage=hide_usage, fingerprint=worker.fingerprint)
        headers = for_client(response.raw_headers, exchange.request_id, worker.id)
        headers.append((b"x-accel-buffering", b"no"))  # for proxies that would collect events
        deadline = exchange.deadline
        relayed = 0.0
        while chunk:
            ready = events.feed(chunk)
            if ready:
                deadline.rest()
                now = time.perf_counter()
                if exchange.started:
                    series.inter_token.observe(now - relayed)
                else:
                    await exchange.start(response.status, headers)
                    series.ttft.observe(now - exchange.arrived)
                relayed = now
                await exchange.write(ready)
            deadline.arm(self._timeouts.idle, ErrorKind.IDLE_TIMEOUT)
            chunk = await read_some(response, worker)
        deadline.rest()
        ended = time.perf_counter()
        if not exchange.started:
            await exchange.start(response.status, headers)
        await exchange.end(events.end())
        exchange.overhead += time.perf_counter() - ended
        worker.fingerprint = events.fingerprint

    def _record(self, exchange: Exchange) -> None:
        """Count and log the request."""
        duration = exchange.ended - exchange.arrived
        error = exchange.error
        outcome = _outcome(exchange)
        count = _count(exchange)
        series = self._metrics.of(exchange.model, exchange.route.name)
        series.outcomes[outcome].inc()
        series.duration.observe(duration)
        if error is None:
            series.overhead.observe(exchange.overhead)
        if count is not None:
            series.prompt_tokens.inc(count.prompt)
            series.completion_tokens.inc(count.completion)
        if self._config.access_log:
            access_log.info(
                "request",
                request_id=exchange.request_id.decode("ascii"),
                method=exchange.scope["method"],
                route=exchange.route.name,
                model=exchange.model,
                worker=exchange.worker or None,
                status=exchange.status if error is None else error.kind.status,
                outcome=outcome.value,
                code=None if error is None else error.kind.code,
                stream=exchange.stream,
                ms=round(duration * 1000, 2),
                prompt_tokens=None if count is None else count.prompt,
                completion_tokens=None if count is None else count.completion,
            )


def _count(exchange: Exchange) -> TokenCount | None:
    if exchange.events is not None:
        return exchange.events.count
    return count_in_answer(exchange.answer) if exchange.status == 200 else None


def _outcome(exchange: Exchange) -> Outcome:
    if exchange.error is not None:
        return exchange.error.kind.outcome
    if exchange.status < 400:
        return Outcome.OK
    return Outcome.CLIENT_ERROR if exchange.status < 500 else Outcome.WORKER_ERROR


async def _send_error(exchange: Exchange, error: GatewayError) -> None:
    dialect = exchange.route.dialect
    if error.kind is ErrorKind.CLIENT_GONE:
        return
    if exchange.started:
        if exchange.events is not None:
            await exchange.end(exchange.events.abort(error, dialect))
        return
    headers = [*error.headers(), (REQUEST_ID, exchange.request_id)]
    if not exchange.body_read and header(exchange.scope["headers"], b"expect"):
        # A client that waits for leave to send its body must not take this connection for its next request.
        headers.append((b"connection", b"close"))
    body = anthropic_body(error) if dialect is Dialect.ANTHROPIC else error.body()
    await send_json(exchange.send, error.kind.status, body, headers)
