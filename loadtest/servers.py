"""Real servers for benchmarks and end-to-end tests: plain vLLM, one worker, or all of Galley."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from galley_plugins.models import resolve
from galley_plugins.worker.device import probe, select
from galley_plugins.worker.environment import worker_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "builtin:smollm2-135m-instruct"
NAME = "smollm2"
START_SECONDS = 600.0
ANSWER_SECONDS = 600.0
FLOAT32 = {"dtype": "float32", "max-model-len": 2048, "kv-cache-memory-bytes": 256 * 1024 * 1024}


class Server:
    """A running server process and its base URL."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log
        self.client = httpx.Client(base_url=url, timeout=ANSWER_SECONDS)

    def metric(self, name: str, path: str = "/metrics") -> float:
        """Sum of a metric's samples over its labels; 0 if it has none yet."""
        text = self.client.get(path).text
        lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def chat(self, content: str, **fields: Any) -> dict[str, Any]:
        body = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        answer = self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def embed(self, texts: Any, **fields: Any) -> list[list[float]]:
        answer = self.client.post("/v1/embeddings", json={"model": NAME, "input": texts, **fields})
        assert answer.status_code == 200, answer.text
        rows = answer.json()["data"]
        assert [row["index"] for row in rows] == list(range(len(rows)))
        return [row["embedding"] for row in rows]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str],
    environment: dict[str, str],
    port: int,
    health: str = "/health",
    standard_input: int | None = None,
) -> Iterator[Server]:
    """Start `command`, wait until it is healthy, and end its whole process group afterwards."""
    log = Path(tempfile.mkstemp(prefix="galley-run-", suffix=".log")[1])
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=standard_input,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_healthy(server, health)
        yield server
    finally:
        end(process)
        server.client.close()
        log.unlink(missing_ok=True)


def _wait_healthy(server: Server, health: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if server.client.get(health, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(
        f"not healthy: {server.process.args}\n{server.log.read_text(errors='replace')[-4000:]}"
    )


def end(process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def galley_worker(
    engine: dict[str, Any], *flags: str, env: dict[str, str] | None = None, weights: str = MODEL
) -> Any:
    """One worker without a gateway."""
    import json

    port = free_port()
    status = Path(tempfile.mkstemp(prefix="galley-run-", suffix=".status")[1])
    command = [sys.executable, "-m", "galley_plugins.worker", "--weights", weights, "--name", NAME]
    command += ["--port", str(port), "--engine", json.dumps(engine), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GALLEY_STATUS_FILE": str(status), **(env or {})}
    return running(command, environment, port)


def plain_vllm(
    engine: dict[str, Any],
    env: dict[str, str] | None = None,
    weights: str = MODEL,
    *,
    compiled: bool = False,
) -> Any:
    """vLLM's own server with the same model and settings and none of Galley's plugins.

    Args:
        compiled: with torch.compile on a CPU, which it leaves out otherwise.
    """
    import json

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve(weights))]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    device = select("auto", probe())
    command += ["--enforce-eager"] if device == "cpu" and not compiled else []
    for option, value in engine.items():
        command += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    environment = worker_environment(device, os.environ, compiled=compiled)
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}
    return running(command, {**environment, **(env or {})}, port)


def galley_serve(config: Path | None = None, *flags: str, env: dict[str, str] | None = None) -> Any:
    """The gateway with its workers, as a user starts them."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "galley",
        "serve",
        *([str(config)] if config else []),
        "--port",
        str(port),
        *flags,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
    return running(command, environment, port, health="/health/ready")


def processes_of(server: Server) -> list[int]:
    """The server's process and everything below it."""
    import psutil

    root = psutil.Process(server.process.pid)
    return [root.pid, *(child.pid for child in root.children(recursive=True))]
