"""The containers' health check as Docker runs it: a process that says by its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loadtest.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "docker" / "healthcheck.py"


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/well" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(10)


def check(port: int, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(port), path]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=20, env={**os.environ, **environment}
    )


def test_status_200_is_healthy(port: int) -> None:
    assert check(port, "/well").returncode == 0


def test_another_status_is_unhealthy_and_named(port: int) -> None:
    found = check(port, "/ill")
    assert found.returncode == 1
    assert "found status 503, expected 200" in found.stderr


def test_a_closed_port_is_unhealthy() -> None:
    found = check(free_port(), "/well")
    assert found.returncode == 1
    assert "does not answer" in found.stderr


def test_a_proxy_of_the_environment_is_not_used(port: int) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    assert check(port, "/well", http_proxy=proxy, HTTP_PROXY=proxy).returncode == 0
