"""Perplexity out of what a server answers; no engine."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from loadtest.perplexity import log_likelihoods, perplexity

if TYPE_CHECKING:
    from collections.abc import Iterator


class Engine(BaseHTTPRequestHandler):
    """Gives an even token a half and an odd one an eighth."""

    def do_POST(self) -> None:
        ids = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
        rows = [{str(token): {"logprob": math.log(1 / 8 if token % 2 else 1 / 2)}} for token in ids]
        body = json.dumps({"choices": [{"prompt_logprobs": [None, *rows[1:]]}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{engine.server_port}") as client:
            yield SimpleNamespace(client=client)
        engine.shutdown()
        thread.join()


def test_it_is_the_geometric_mean_over_all_tokens_but_the_first_ones(server: Any) -> None:
    """Likelihoods 1/8, 1/2 and 1/2: the cube root of 2 * 2 * 8."""
    assert perplexity(server, [[1, 3, 2], [5, 4]]) == pytest.approx(32 ** (1 / 3))


def test_a_token_without_its_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="log-probabilities of 1 tokens, expected 2"):
        log_likelihoods([None], [1, 2])
