"""Vectors of many texts from a running server, in batches, several at a time."""

from __future__ import annotations

import base64
import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

BATCH = 32
CONCURRENCY = 4


class ServerError(RuntimeError):
    """The server cannot be reached or refuses to embed."""


class EndpointEncoder:
    """`/v1/embeddings` of an OpenAI-compatible server; leaving its context closes the connections.

    Args:
        url: of the server, without `/v1`.
        key: an API key, if it asks for one.
        extra: further fields of every request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 600.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = url.removesuffix("/").removesuffix("/v1")
        self._client = httpx.Client(base_url=base, timeout=timeout, headers=headers)
        self._model = model
        self._extra = extra or {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def encode(
        self, texts: Sequence[str], *, done: Callable[[int], None] = lambda count: None, **fields: Any
    ) -> NDArray[np.float32]:
        """[texts, dimensions] float32, in order.

        Args:
            done: told how many more texts have their vectors.
            fields: of each request, such as `input_type`.

        Raises:
            ServerError: with the server's own message.
        """
        # Alike lengths together; the slowest of a batch does not hold up short ones.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        rows: list[NDArray[np.float32] | None] = [None] * len(texts)
        waiting: deque[tuple[list[int], Future[list[NDArray[np.float32]]]]] = deque()

        def settle() -> None:
            places, future = waiting.popleft()
            for place, row in zip(places, future.result(), strict=True):
                rows[place] = row
            done(len(places))

        with ThreadPoolExecutor(CONCURRENCY) as pool, contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            for start in range(0, len(order), BATCH):
                places = order[start : start + BATCH]
                batch = [texts[place] for place in places]
                waiting.append((places, pool.submit(self._embed, batch, fields)))
                if len(waiting) > 2 * CONCURRENCY:
                    settle()
            while waiting:
                settle()
        return np.stack([row for row in rows if row is not None])

    def _embed(self, texts: list[str], fields: dict[str, Any]) -> list[NDArray[np.float32]]:
        body = {"model": self._model, "input": texts, "encoding_format": "base64"}
        try:
            answer = self._client.post("/v1/embeddings", json={**body, **self._extra, **fields})
        except httpx.HTTPError as error:
            raise ServerError(f"{self._client.base_url}: {error or type(error).__name__}") from None
        if answer.status_code != 200:
            raise ServerError(f"{self._client.base_url}: {answer.status_code}: {answer.text[:500]}")
        rows = sorted(answer.json()["data"], key=lambda row: row["index"])
        return [np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in rows]
