#!/usr/bin/env python
"""What serving through Galley keeps and what it costs, against plain vLLM and against the engine alone.

Sections, each with its baseline in the same run:
    identity  float32 chats equal plain vLLM's while embeddings run beside; embeddings equal transformers'
    memory    resident memory of one engine for both tasks over one that only generates, after the same work
    ready     from the start of `galley serve` to readiness, everything installed and unpacked
    cancel    from a client's leaving to an idle engine: streams, unary requests, prefills, embeddings
    added     what the gateway adds to a request's latency, in front of an engine that costs next to nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest import reference
from loadtest.harness import Report, console, quantile
from loadtest.servers import (
    FLOAT32,
    NAME,
    Server,
    free_port,
    galley_serve,
    galley_worker,
    plain_vllm,
    running,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SETTINGS = {**FLOAT32, "max-num-batched-tokens": 128, "max-num-seqs": 64}
SUBJECTS = ("the sea", "a clock", "bread", "winter", "a bridge", "trade", "music", "a garden", "maps", "iron")
CHAT = "/v1/chat/completions"


def prompts(count: int) -> list[str]:
    forms = ("Write two sentences about {}.", "Why do people care about {}?", "Name three facts about {}.")
    return [form.format(subject) for form, subject in itertools.product(forms, SUBJECTS)][:count]


def text(words: int, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(f"{chosen.choice(SUBJECTS)} {chosen.randrange(1000)}" for _ in range(words // 2))


def resident_bytes(server: Server) -> int:
    """Resident memory of the server's process and all below it; shared pages count once per process."""
    root = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


def answers(server: Server, questions: list[str]) -> list[list[str]]:
    """Tokens of each answer, four questions at a time."""

    def ask(question: str) -> list[str]:
        choice = server.chat(question, max_tokens=48, logprobs=True)["choices"][0]
        return [item["token"] for item in choice["logprobs"]["content"]]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, questions))


class EmbeddingTraffic:
    """Embedding requests of mixed lengths, one after another, while the scope lasts."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[tuple[str, list[float]]] = []

    def __enter__(self) -> EmbeddingTraffic:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for turn in itertools.count():
            if self._stop.is_set():
                return
            texts = [text(words, seed=100 * turn + words) for words in (8, 40, 300)]
            self.answers += zip(texts, self._server.embed(texts), strict=True)


def identity_and_memory(report: Report, quick: bool) -> dict[str, Any]:
    """The generating engine first, then the one for both; never two engines at once."""
    questions = prompts(10 if quick else 30)
    console.print("identity, memory: plain vLLM")
    with plain_vllm(SETTINGS) as plain:
        expected = answers(plain, questions)
        plain_bytes = resident_bytes(plain)
    console.print("identity, memory: one engine for chats and embeddings")
    with galley_worker(SETTINGS) as dual:
        with EmbeddingTraffic(dual) as traffic:
            found = answers(dual, questions)
        batch = [text(4 + 3 * index, seed=index) for index in range(64)]
        traffic.answers += zip(batch, dual.embed(batch), strict=True)
        dual_bytes = resident_bytes(dual)
    cosines = [reference.cosine(vector, reference.embed(words)) for words, vector in traffic.answers]
    identical = sum(ours == plain for ours, plain in zip(found, expected, strict=True))
    report.add(
        "identity",
        {"chats": len(questions), "identical": identical, "embeddings": len(cosines), "cosines": cosines},
    )
    report.add("memory", {"generate_bytes": plain_bytes, "both_bytes": dual_bytes})
    return {
        "chat_identical": identical == len(questions),
        "chats": len(questions),
        "embeddings": len(cosines),
        "embedding_cosine_min": round(min(cosines), 6),
        "memory_ratio": round(dual_bytes / plain_bytes, 3),
    }


class Cancelling:
    """Clients that leave, and the time until the engine is idle."""

    engine_metrics = f"/workers/{NAME}-0/metrics"

    def __init__(self, server: Server) -> None:
        self._server = server
        self._address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        # The worker's own page: polling through the gateway would put load on what is measured.
        (worker,) = server.client.get("/workers").json()["workers"]
        self._metrics = httpx.Client(base_url=worker["url"], timeout=10)

    def busy(self) -> bool:
        lines = self._metrics.get("/metrics").text.splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return any(float(line.rsplit(" ", 1)[1]) > 0 for line in lines if line.startswith(names))

    def leave(self, path: str, body: dict[str, Any], first_byte: bool) -> float:
        """Send a request, close the connection once the engine works on it; milliseconds until it is idle."""
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with socket.create_connection(self._address, timeout=60) as connection:
            connection.sendall(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
            if first_byte:
                connection.recv(64)
            while not self.busy():
                time.sleep(0.005)
            time.sleep(0.05)
        start = time.perf_counter()
        while self.busy():
            time.sleep(0.005)
            if time.perf_counter() - start > 10:
                raise RuntimeError("the engine still works 10 s after the client left")
        return (time.perf_counter() - start) * 1000


def cancellations(report: Report, server: Server, quick: bool) -> dict[str, Any]:
    endless = {"model": NAME, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 4000}
    endless |= {"ignore_eos": True}
    rounds = 8 if quick else 50
    cancelling = Cancelling(server)
    kinds: dict[str, Callable[[int], float]] = {
        "stream": lambda turn: cancelling.leave(CHAT, {**endless, "stream": True}, first_byte=True),
        "unary": lambda turn: cancelling.leave(CHAT, endless, first_byte=False),
        "prefill": lambda turn: cancelling.leave(
            CHAT,
            {**endless, "stream": True, "messages": [{"role": "user", "content": text(600, seed=turn)}]},
            first_byte=False,
        ),
        "embedding": lambda turn: cancelling.leave(
            "/v1/embeddings", {"model": NAME, "input": text(600, seed=7 * turn)}, first_byte=False
        ),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        for kind, leave in kinds.items():
            times[kind].append(leave(turn))
    in_flight = server.metric("galley_in_flight_requests")
    report.add("cancel", {"milliseconds": times, "in_flight_after": in_flight})
    every = [value for values in times.values() for value in values]
    return {
        "cancel_ms_p50": round(statistics.median(every), 1),
        "cancel_ms_p99": round(quantile(every, 0.99), 1),
        **{f"cancel_{kind}_ms_p50": round(statistics.median(values), 1) for kind, values in times.items()},
        "cancels": len(every),
        "in_flight_after": in_flight,
    }


def ready_and_cancel(report: Report, quick: bool) -> dict[str, Any]:
    seconds = []
    figures: dict[str, Any] = {}
    for turn in range(1 if quick else 3):
        console.print(f"ready: start {turn + 1}")
        start = time.monotonic()
        with galley_serve() as server:
            seconds.append(time.monotonic() - start)
            if turn == 0:
                console.print("cancel")
                figures = cancellations(report, server, quick)
    report.add("ready", {"seconds": seconds})
    return {"ready_seconds_warm": round(statistics.median(seconds), 1), **figures}


def added_latency(report: Report, quick: bool) -> dict[str, Any]:
    """Direct and through the gateway, in alternating blocks; the gateway alone on one core."""
    console.print("added: mock engine, direct and through the gateway")
    cores = sorted(os.sched_getaffinity(0))
    engine_port, port = free_port(), free_port()
    configuration = Path(f"/tmp/galley-bench-{os.getpid()}.yaml")
    configuration.write_text(
        json.dumps({"models": [{"name": "mock", "urls": [f"http://127.0.0.1:{engine_port}"]}]})
    )
    galley = [sys.executable, "-m", "galley"]
    environment = dict(os.environ)
    engine_command = [*galley, "mock-engine", "--port", str(engine_port)]
    gateway_command = [*galley, "gateway", str(configuration), "--port", str(port)]
    body = {"model": "mock", "messages": [{"role": "user", "content": "x" * 900}], "max_tokens": 8}
    rounds, block = (5, 200) if quick else (9, 1000)
    direct: list[list[float]] = []
    through: list[list[float]] = []
    try:
        with (
            running(engine_command, environment, engine_port) as engine,
            running(gateway_command, environment, port, health="/health/ready") as gateway,
        ):
            pin(engine.process, cores[-1:])
            pin(gateway.process, cores[:1])
            os.sched_setaffinity(0, set(cores[-1:]))
            payload = json.dumps(body).encode()
            for target in (engine.url, gateway.url):
                block_of(target, payload, block)  # warm up
            for _ in range(rounds):
                direct.append(block_of(engine.url, payload, block))
                through.append(block_of(gateway.url, payload, block))
    finally:
        os.sched_setaffinity(0, set(cores))
        configuration.unlink()
    report.add("added", {"direct_ms": direct, "through_ms": through})
    added = {
        share: [
            quantile(ours, share) - quantile(theirs, share)
            for ours, theirs in zip(through, direct, strict=True)
        ]
        for share in (0.5, 0.99)
    }
    return {
        "added_ms_p50": round(statistics.median(added[0.5]), 3),
        "added_ms_p99": round(statistics.median(added[0.99]), 3),
        "direct_ms_p50": round(statistics.median(quantile(times, 0.5) for times in direct), 3),
        "through_ms_p50": round(statistics.median(quantile(times, 0.5) for times in through), 3),
    }


def pin(process: subprocess.Popen[bytes], cores: list[int]) -> None:
    for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        one.cpu_affinity(cores)


def block_of(url: str, payload: bytes, count: int) -> list[float]:
    """Milliseconds of `count` requests, one after another on one connection, with a minimal client."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload
    times = []
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start = time.perf_counter()
            connection.sendall(request)
            read_answer(connection)
            times.append((time.perf_counter() - start) * 1000)
    return times


def read_answer(connection: socket.socket) -> None:
    data = connection.recv(65536)
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"found {head[:100]!r}, expected a 200")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    missing = length - len(rest)
    while missing > 0:
        missing -= len(connection.recv(65536))


SECTIONS: dict[str, Callable[[Report, bool], dict[str, Any]]] = {
    "added": added_latency,
    "ready": ready_and_cancel,
    "identity": identity_and_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 4 minutes on 2 cores")
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        help="one part: added; ready (with cancel); identity (with memory). Writes no results",
    )
    options = parser.parse_args()
    report = Report("bench_serve.quick" if options.quick else "bench_serve", vars(options))
    figures: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            figures |= section(report, options.quick)
    report.finish(figures, write=options.only is None)


if __name__ == "__main__":
    main()
