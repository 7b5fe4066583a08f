"""A mock engine and a gateway in front of it, each a process of its own, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from loadtest.servers import Server, free_port, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "mock"
WORKER = f"{MODEL}-0"


@dataclass
class MockStack:
    """The two servers; `engine.process` may be ended to take the only worker away."""

    gateway: Server
    engine: Server

    def script(self, **members: Any) -> None:
        """What every request meets from now on."""
        self.engine.client.post("/mock/script", json=members).raise_for_status()


@contextlib.contextmanager
def mock_stack(folder: Path) -> Iterator[MockStack]:
    """Both servers on free ports of loopback, healthy; `folder` takes the gateway's configuration."""
    galley = [sys.executable, "-m", "galley"]
    engine_port, gateway_port = free_port(), free_port()
    config = folder / "galley.yaml"
    model = {"name": MODEL, "urls": [f"http://127.0.0.1:{engine_port}"]}
    config.write_text(yaml.safe_dump({"gateway": {"probe_seconds": 0.2}, "models": [model]}))
    environment = dict(os.environ)
    mock = [*galley, "mock-engine", "--port", str(engine_port), "--model", MODEL]
    gateway = [*galley, "gateway", str(config), "--port", str(gateway_port)]
    with (
        running(mock, environment, engine_port) as engine,
        running(gateway, environment, gateway_port, health="/health/ready") as served,
    ):
        yield MockStack(served, engine)
