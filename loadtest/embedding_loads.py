"""Embedding requests from closed-loop clients: each sends its next one when the last is answered."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import orjson

from loadtest.servers import NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

ANSWER_SECONDS = 600.0
ROUTE = "/v1/embeddings"
WARM_REQUESTS = 4  # at the most, before each load

Request = list[str]
"""Texts of one request."""


@dataclass(frozen=True)
class Load:
    """What clients send.

    Attributes:
        length: tokens of a text.
        clients: how many send at the same time.
        batch: texts of a request.
    """

    length: int
    clients: int = 1
    batch: int = 1

    @property
    def key(self) -> str:
        return f"{self.length}x{self.clients}" + (f"b{self.batch}" if self.batch > 1 else "")

    def requests(self, tokens: int) -> int:
        """How many come to `tokens`, and at least one for each client."""
        return max(self.clients, -(-tokens // (self.length * self.batch)))

    def fill(self, texts: Sequence[str], tokens: int) -> tuple[list[Request], list[Request]]:
        """Requests that warm a server and requests to measure, from the front of `texts`."""
        warm, measured = min(self.clients, WARM_REQUESTS), self.requests(tokens)
        starts = range(0, (warm + measured) * self.batch, self.batch)
        every = [list(texts[start : start + self.batch]) for start in starts]
        return every[:warm], every[warm:]

    def texts(self, tokens: int) -> int:
        """How many texts `fill` takes."""
        return (min(self.clients, WARM_REQUESTS) + self.requests(tokens)) * self.batch


@dataclass(frozen=True)
class Wave:
    """Some requests through so many clients.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds of each answered request.
        failures: what went wrong with each of the others.
    """

    seconds: float
    latencies: list[float]
    failures: list[str]


def drive(url: str, requests: Sequence[Request], clients: int) -> Wave:
    """Send all requests; a failure is recorded and the client goes on."""
    waiting = deque(
        (len(texts), json.dumps({"model": NAME, "input": texts, "encoding_format": "base64"}).encode())
        for texts in requests
    )
    latencies: list[float] = []
    failures: list[str] = []

    def client() -> None:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_SECONDS)
        while True:
            try:
                count, body = waiting.popleft()
            except IndexError:
                break
            start = time.perf_counter()
            try:
                _embed(connection, body, count)
            except (OSError, HTTPException, ValueError) as error:
                failures.append(repr(error))
                connection.close()  # opens again with the next request
            else:
                latencies.append(time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Wave(time.perf_counter() - start, latencies, failures)


def _embed(connection: HTTPConnection, body: bytes, count: int) -> None:
    connection.request("POST", ROUTE, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise ValueError(f"found the status {answer.status}, expected 200: {data[:300]!r}")
    found = len(orjson.loads(data)["data"])
    if found != count:
        raise ValueError(f"found {found} vectors, expected {count}")
