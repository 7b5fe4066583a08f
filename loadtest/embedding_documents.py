"""Long documents embedded beside streaming chats: what the chats feel of them."""

from __future__ import annotations

import statistics
import threading
import time
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from loadtest.embedding_loads import ANSWER_SECONDS, drive
from loadtest.harness import quantile
from loadtest.servers import NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.servers import Server

CHAT_CLIENTS, DOCUMENT_CLIENTS = 8, 8
CHAT_TOKENS = 512
SUBJECTS = ("the sea", "a clock", "bread", "winter", "a bridge", "trade", "music", "a garden")
WAKE_SECONDS, ALONE_SECONDS = 10.0, 60.0
END_SECONDS = 30.0


class Streams:
    """Clients that stream one chat after another while the scope lasts, and leave with its end.

    Attributes:
        gaps: (when, seconds) of each token after a chat's first one, by `time.perf_counter`.
        first: (when, seconds) of each chat's first token since its request.
        failures: what went wrong, such as a stream without its end.
    """

    def __init__(self, server: Server, clients: int = CHAT_CLIENTS, tokens: int = CHAT_TOKENS) -> None:
        self._address = urlsplit(server.url).netloc
        self._tokens = tokens
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(clients)
        ]
        self.gaps: list[tuple[float, float]] = []
        self.first: list[tuple[float, float]] = []
        self.failures: list[str] = []

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(END_SECONDS)

    def _run(self, index: int) -> None:
        prompt = f"Write a long story about {SUBJECTS[index % len(SUBJECTS)]}."
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "stream": True,
        }
        while not self._stop.is_set():
            connection = HTTPConnection(self._address, timeout=ANSWER_SECONDS)
            try:
                self._stream(connection, orjson.dumps(body))
            except (OSError, HTTPException, ValueError) as error:
                self.failures.append(repr(error))
                self._stop.wait(1)
            finally:
                connection.close()

    def _stream(self, connection: HTTPConnection, body: bytes) -> None:
        last = start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"found the status {answer.status}, expected 200: {answer.read()[:300]!r}")
        while not self._stop.is_set():
            line = answer.readline()
            if not line:
                raise ValueError("the stream ended without [DONE]")
            if line.startswith(b"data: [DONE]"):
                return
            if not has_text(line):
                continue
            now = time.perf_counter()
            (self.first if last == start else self.gaps).append((now, now - last))
            last = now


def has_text(line: bytes) -> bool:
    """Whether a line of an event stream brings a part of the answer.

    Raises:
        ValueError: it brings an error.
    """
    if not line.startswith(b"data: "):
        return False
    event = orjson.loads(line[6:])
    if "error" in event:
        raise ValueError(f"found the error {event['error']}")
    return any(choice["delta"].get("content") for choice in event["choices"])


def within(times: Sequence[tuple[float, float]], start: float, stop: float) -> list[float]:
    """Milliseconds of what ended in a stretch of time."""
    return [1000 * seconds for when, seconds in times if start <= when < stop]


def spread(milliseconds: list[float]) -> dict[str, float | int | None]:
    if not milliseconds:
        return {"count": 0, "p50": None, "p99": None, "max": None}
    return {
        "count": len(milliseconds),
        "p50": round(statistics.median(milliseconds), 2),
        "p99": round(quantile(milliseconds, 0.99), 2),
        "max": round(max(milliseconds), 2),
    }


def beside_chats(server: Server, documents: Sequence[str], seconds: float = ALONE_SECONDS) -> dict[str, Any]:
    """The chats' gaps and first tokens, alone for `seconds` and then until all documents are embedded."""
    with Streams(server) as streams:
        time.sleep(WAKE_SECONDS)
        begun = time.perf_counter()
        time.sleep(seconds)
        alone = time.perf_counter()
        wave = drive(server.url, [[text] for text in documents], DOCUMENT_CLIENTS)
        done = time.perf_counter()
    return {
        "documents": len(documents),
        "seconds": round(wave.seconds, 2),
        "latencies": [round(latency, 3) for latency in wave.latencies],
        "failures": wave.failures + streams.failures,
        "gap_ms": {
            "alone": spread(within(streams.gaps, begun, alone)),
            "beside": spread(within(streams.gaps, alone, done)),
        },
        "first_token_ms": {
            "alone": spread(within(streams.first, begun, alone)),
            "beside": spread(within(streams.first, alone, done)),
        },
    }
