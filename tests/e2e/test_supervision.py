"""Death and shutdown: workers come back, requests end cleanly, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

from loadtest.servers import Server, galley_serve, processes_of
from tests.support.cores import needs_binding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.engine

RESTART_SECONDS = 600
STORY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Tell a long story."}],
    "max_tokens": 3000,
    "ignore_eos": True,
    "stream": True,
}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def galley() -> Iterator[Server]:
    """A server of its own, which these tests end."""
    with galley_serve() as server:
        yield server


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def ready(server: Server) -> bool:
    return server.client.get("/health/ready").status_code == 200


def worker_state(server: Server) -> dict[str, Any]:
    (worker,) = server.client.get("/workers").json()["workers"]
    return worker


def titles(server: Server) -> list[str]:
    """Titles or command lines of all processes below the server."""
    return [
        " ".join(process.cmdline()) for process in psutil.Process(server.process.pid).children(recursive=True)
    ]


def process_named(server: Server, text: str) -> psutil.Process:
    """The one process below the server whose title or command line has `text`."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [process for process in below if text in " ".join(process.cmdline())]
    return found


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@needs_binding
def test_the_engine_core_computes_itself_with_threads_bound_to_cores(galley: Server) -> None:
    galley.chat("Say hi.", max_tokens=4)
    core = process_named(galley, "VLLM::EngineCor")
    assert not [name for name in titles(galley) if "VLLM::Worker" in name]
    each = [os.sched_getaffinity(thread.id) for thread in core.threads()]
    cores = {core for bound in each if len(bound) == 1 for core in bound}
    assert len(cores) >= min(2, psutil.cpu_count(logical=False) or 1), each


@pytest.mark.parametrize("victim", ["galley_plugins.worker", "VLLM::EngineCor"])
def test_a_killed_worker_ends_its_streams_with_an_error_and_comes_back(galley: Server, victim: str) -> None:
    with openai.OpenAI(base_url=f"{galley.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="smollm2",
            messages=STORY["messages"],
            max_tokens=STORY["max_tokens"],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        before = worker_state(galley)["restarts"]
        process_named(galley, victim).kill()
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert "worker" in caught.value.message.lower() or "engine" in caught.value.message.lower()
    wait_for(lambda: not ready(galley), 20, "the worker's death is noticed")
    refused = galley.client.post(CHAT, json={**STORY, "stream": False})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["message"]
    wait_for(lambda: ready(galley), RESTART_SECONDS, "the worker is back by itself")
    assert worker_state(galley)["restarts"] == before + 1
    assert galley.chat("Say hi.", max_tokens=4)["choices"]
    assert galley.metric("galley_in_flight_requests") == 0


def test_an_interrupt_drains_running_requests_and_leaves_no_process(galley: Server) -> None:
    """The last test of this module: it ends the server."""
    pids = processes_of(galley)
    events: list[str] = []
    started = threading.Event()

    def read_stream() -> None:
        body = {**STORY, "max_tokens": 120}
        with (
            httpx.Client(base_url=galley.url, timeout=240) as client,
            client.stream("POST", CHAT, json=body) as answer,
        ):
            for line in answer.iter_lines():
                if line:
                    events.append(line)
                    started.set()

    reader = threading.Thread(target=read_stream)
    reader.start()
    assert started.wait(30)
    galley.process.send_signal(signal.SIGINT)
    wait_for(lambda: not ready(galley), 5, "readiness turns 503")
    refused = galley.client.post(CHAT, json=STORY)
    assert refused.status_code == 503
    reader.join(60)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert galley.process.wait(30) == 0
    wait_for(lambda: not alive(pids), 10, "every process has ended")


@pytest.fixture
def second() -> Iterator[Server]:
    with galley_serve() as server:
        yield server


def test_no_process_outlives_a_killed_parent(second: Server) -> None:
    pids = processes_of(second)
    assert len(pids) >= 4  # gateway, API server, fork server, engine core
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait(10)
    wait_for(lambda: not alive(pids), 10, "every process has ended")
