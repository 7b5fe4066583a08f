"""The client side of the relay: one connection pool for all workers, and its failures as gateway errors."""

from __future__ import annotations

import errno
import io
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from galley.errors import ErrorKind, GatewayError

if TYPE_CHECKING:
    from multidict import CIMultiDict

    from galley.config import Timeouts
    from galley.workers import Worker

# vLLM closes an idle connection after 5 s; closing first means that no request meets a connection on its
# way out.
_KEEP_ALIVE_SECONDS = 4.0
_AUTOMATIC_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_WHOLE_WRITE_BYTES = 1024 * 1024  # larger bodies are written in pieces, so that the loop stays free
_CACHED_URLS = 1024


class Upstream:
    """Sends requests to workers; lives as long as the process, so that no connection in use is ever
    evicted.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        """Must be called inside the event loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect),
            cookie_jar=aiohttp.DummyCookieJar(),  # cookies belong to clients, not to the gateway
            auto_decompress=False,
            skip_auto_headers=_AUTOMATIC_HEADERS,
        )
        self._connect_seconds = timeouts.connect
        self._urls: dict[tuple[str, str], URL] = {}

    async def send(
        self, worker: Worker, method: str, target: str, headers: CIMultiDict[str], body: bytes
    ) -> aiohttp.ClientResponse:
        """Send a request and wait for the head of the answer; the caller closes it.

        Args:
            target: raw path and query.

        Raises:
            GatewayError: the worker could not be reached, or closed the connection before an answer.
        """
        if worker.url is None:
            raise GatewayError(ErrorKind.WORKER_UNREACHABLE, worker=worker.id)
        data = body if len(body) <= _WHOLE_WRITE_BYTES else io.BytesIO(body)
        try:
            return await self._session.request(
                method,
                self._url(worker.url, target),
                headers=headers,
                data=data or None,
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            raise self._failure(error, worker) from error

    async def close(self) -> None:
        await self._session.close()

    def _url(self, base: str, target: str) -> URL:
        url = self._urls.get((base, target))
        if url is None:
            if len(self._urls) >= _CACHED_URLS:
                self._urls.clear()
            url = self._urls[base, target] = URL(base + target, encoded=True)
        return url

    def _failure(self, error: aiohttp.ClientError, worker: Worker) -> GatewayError:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return GatewayError(ErrorKind.CONNECT_TIMEOUT, worker=worker.id, seconds=self._connect_seconds)
        if isinstance(error, aiohttp.ClientConnectorError):
            if error.errno == errno.ECONNREFUSED:
                worker.mark_refused()
            return GatewayError(ErrorKind.WORKER_UNREACHABLE, worker=worker.id)
        if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)):
            return GatewayError(ErrorKind.WORKER_CLOSED, worker=worker.id)
        return GatewayError(ErrorKind.WORKER_INVALID, worker=worker.id)


async def read_some(response: aiohttp.ClientResponse, worker: Worker) -> bytes:
    """The bytes that have come since the last call, at least one; nothing at the end of the answer.

    Raises:
        GatewayError: WORKER_DIED if the connection ends before the answer does.
    """
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise GatewayError(ErrorKind.WORKER_DIED, worker=worker.id) from error
