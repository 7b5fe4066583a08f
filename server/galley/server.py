"""Running the gateway: start, serve, and end in stages that lose no request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn

from galley.app import Gateway, create_app
from galley.probe import probe_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from galley.config import Config
    from galley.workers import WorkerPool

# Longer than clients keep idle connections, so that none is closed while a request is on its way in.
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 2048
_FLUSH_SECONDS = 2.0  # for error events to leave and connections to close
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GC_THRESHOLD = 50_000  # new objects between two collections; requests leave few cycles behind

log = structlog.get_logger(__name__)


class GatewayFailed(Exception):  # noqa: N818
    """The gateway could not start or go on; says why."""


async def run(
    config: Config,
    pool: WorkerPool,
    *,
    started: Callable[[str], None] | None = None,
    background: Sequence[Coroutine[Any, Any, None]] = (),
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain and return; a second signal ends the process at once.

    Args:
        started: called with the base URL when connections are accepted.
        background: run beside the server and cancelled when it has drained, e.g. a supervisor of workers; one
            that ends with an exception ends the server.
        stop: set to stop as a signal would.

    Raises:
        GatewayFailed: the port cannot be taken.
        Exception: whatever a background coroutine failed with.
    """
    stop = stop or asyncio.Event()
    gateway = create_app(config, pool)
    listening = _listen(config, background)
    server = _Server(_server_config(gateway))
    serving = asyncio.create_task(server.serve([listening]))
    beside = [asyncio.create_task(each) for each in background]
    beside.append(asyncio.create_task(probe_pool(pool, config.gateway.probe_seconds)))
    with _signals_set(stop):
        try:
            await _first_of(server.listening, serving)
            _settle_memory()
            if started is not None:
                started(_base_url(listening))
            await _first_of(stop, serving, *beside)
        finally:
            await _end(gateway, server, serving, beside, config.gateway.drain_seconds)
    for task in beside:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _end(
    gateway: Gateway,
    server: _Server,
    serving: asyncio.Task[None],
    beside: list[asyncio.Task[None]],
    drain_seconds: float,
) -> None:
    # 1. Say no: readiness and new requests get 503, on a socket that still listens.
    gateway.begin_drain()
    log.info("draining", running=len(gateway.relay.running), seconds=drain_seconds)
    # 2. Let running requests finish.
    if not await gateway.drained(drain_seconds):
        # 3. End the rest with an error that clients can read.
        log.warning("requests cut off", count=gateway.abort())
        await gateway.drained(_FLUSH_SECONDS)
    # 4. Stop what runs beside: probes, workers.
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    # 5. Close the socket and all connections.
    server.should_exit = True
    await serving


async def _first_of(event: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Wait until the event is set or one of the tasks has ended."""
    set_ = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({set_, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        set_.cancel()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `run` and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server_config(gateway: Gateway) -> uvicorn.Config:
    return uvicorn.Config(
        gateway,
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(_FLUSH_SECONDS),
    )


def _listen(config: Config, background: Sequence[Coroutine[Any, Any, None]]) -> socket.socket:
    host, port = config.gateway.host, config.gateway.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        return socket.create_server((str(address[0]), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        for each in background:
            each.close()
        raise GatewayFailed(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _base_url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _signals_set(stop: asyncio.Event) -> Iterator[None]:
    """The first signal sets `stop`; the second one has its default effect on the process."""
    loop = asyncio.get_running_loop()

    def caught(number: signal.Signals) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        log.info("stopping", signal=number.name)
        stop.set()

    installed = []
    for number in _SIGNALS:
        with contextlib.suppress(RuntimeError, ValueError):  # signals are for the main thread only
            loop.add_signal_handler(number, caught, number)
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


def _settle_memory() -> None:
    """Take what the start made out of garbage collection, and collect more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 20)
