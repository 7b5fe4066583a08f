"""Servers that take turns: all run at once, and all but the one that is asked are stopped.

Each wave of prompts goes to one server after the other before the next wave begins, so that all of them meet
the machine at the same speed.
"""

from __future__ import annotations

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil

from loadtest.servers import Server, processes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from loadtest.specbench import Prompt

CLIENTS = {"b1": 1, "c8": 8}
STARTING = 2


@dataclass(frozen=True)
class Wave:
    server: str
    load: str
    repeat: int
    seconds: float
    tokens: int
    prompt_tokens: int

    @property
    def speed(self) -> float:
        """Tokens a second, prompts' time included."""
        return self.tokens / self.seconds


@contextlib.contextmanager
def all_serving(starters: Mapping[str, AbstractContextManager[Server]]) -> Iterator[dict[str, Server]]:
    """Every server, stopped; ended in any case. Two start at once: much of a start is one thread's work."""
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(STARTING) as pool:
            starts = {name: pool.submit(_started, scope) for name, scope in starters.items()}
        servers: dict[str, Server] = {}
        for name, start in starts.items():
            if start.exception() is None:
                servers[name] = start.result()
                stack.push(starters[name])
                stack.callback(_signal, servers[name], signal.SIGCONT)
        for start in starts.values():
            start.result()
        yield servers


def _started(scope: AbstractContextManager[Server]) -> Server:
    """A server that has answered, and is stopped."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(scope)
        ask_all(server, [f"Say hello to guest number {guest}." for guest in range(8)], 8, 8)
        _signal(server, signal.SIGSTOP)
        stack.pop_all()
        return server


@contextlib.contextmanager
def awake(server: Server) -> Iterator[None]:
    """A stopped server goes on for as long as this."""
    _signal(server, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(server, signal.SIGSTOP)


def _signal(server: Server, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for pid in processes_of(server):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(number)


def ask_all(
    server: Server, texts: Sequence[str], clients: int, max_tokens: int, **fields: Any
) -> tuple[float, int, int]:
    """Seconds, tokens written and tokens of prompts."""

    def ask(text: str) -> tuple[int, int]:
        usage = server.chat(text, max_tokens=max_tokens, ignore_eos=True, **fields)["usage"]
        return usage["completion_tokens"], usage["prompt_tokens"]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(ask, texts))
    seconds = time.perf_counter() - start
    return seconds, sum(written for written, _ in counts), sum(read for _, read in counts)


def measure(
    servers: Mapping[str, Server],
    prompts: Sequence[Prompt],
    per_wave: Mapping[str, int],
    repeats: int,
    max_tokens: int,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Wave]:
    """No prompt is asked twice of a server, so that nobody answers from a cache.

    Args:
        per_wave: prompts of a wave, by load.
        fields: of the requests to a server, beside the common ones.
    """
    left = iter(prompts)
    for repeat in range(repeats):
        for load, count in per_wave.items():
            texts = [next(left).text for _ in range(count)]
            order = list(servers)
            for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
                more = (fields or {}).get(name, {})
                with awake(servers[name]):
                    found = ask_all(servers[name], texts, CLIENTS[load], max_tokens, **more)
                yield Wave(name, load, repeat, *found)


def values_of(waves: Sequence[Wave]) -> list[dict[str, Any]]:
    return [{**asdict(wave), "speed": round(wave.speed, 3)} for wave in waves]
