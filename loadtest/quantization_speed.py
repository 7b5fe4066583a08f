"""Tokens a second through servers with 4-bit weights and without: one chat at a time, and eight at once.

All servers run at once, and all but the one that is asked are stopped: each wave of prompts goes to one
server after the other before the next wave begins. No prompt is asked twice, so that nobody answers from a
cache or drafts from an earlier answer to the same question.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from loadtest.quantization_peers import GGUF, PACKAGE, SLOT_TOKENS, SLOTS, gguf, llama_server
from loadtest.servers import Server, galley_worker, plain_vllm, processes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from loadtest.specbench import Prompt

SETTINGS: dict[str, Any] = {
    "max-model-len": 2048,
    "max-num-seqs": 16,
    "kv-cache-memory-bytes": 512 * 2**20,
}
INT4 = {"method": "finequant"}
HYBRID = {"method": "hybrid"}
BASE, PEER, OURS, DRAFTING = "vllm_bf16", "llama_cpp", "galley_int4", "galley_int4_hybrid"
SERVERS = (BASE, PEER, OURS, DRAFTING)
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
def serving(name: str) -> Iterator[Server]:
    int4 = ("--quantization", json.dumps(INT4))
    if name == BASE:
        scope = plain_vllm({**SETTINGS, "dtype": "bfloat16"})
    elif name == PEER:
        scope = llama_server(gguf())
    elif name == OURS:
        scope = galley_worker(SETTINGS, *int4)
    else:
        scope = galley_worker(SETTINGS, *int4, "--speculation", json.dumps(HYBRID))
    with scope as server:
        yield server


@contextlib.contextmanager
def all_serving(names: Sequence[str]) -> Iterator[dict[str, Server]]:
    """Every server, stopped; ended in any case. Two start at once: much of a start is one thread's work."""
    with contextlib.ExitStack() as stack:
        scopes = {name: serving(name) for name in names}
        with ThreadPoolExecutor(STARTING) as pool:
            starts = {name: pool.submit(_started, scope) for name, scope in scopes.items()}
        servers: dict[str, Server] = {}
        for name, start in starts.items():
            if start.exception() is None:
                servers[name] = start.result()
                stack.push(scopes[name])
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


def ask_all(server: Server, texts: Sequence[str], clients: int, max_tokens: int) -> tuple[float, int, int]:
    """Seconds, tokens written and tokens of prompts."""

    def ask(text: str) -> tuple[int, int]:
        usage = server.chat(text, max_tokens=max_tokens, ignore_eos=True)["usage"]
        return usage["completion_tokens"], usage["prompt_tokens"]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(ask, texts))
    seconds = time.perf_counter() - start
    return seconds, sum(written for written, _ in counts), sum(read for _, read in counts)


def measure(
    servers: dict[str, Server],
    prompts: Sequence[Prompt],
    per_wave: dict[str, int],
    repeats: int,
    max_tokens: int,
) -> Iterator[Wave]:
    """
    Args:
        per_wave: prompts of a wave, by load.
    """
    left = iter(prompts)
    for repeat in range(repeats):
        for load, count in per_wave.items():
            texts = [next(left).text for _ in range(count)]
            order = list(servers)
            for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
                with awake(servers[name]):
                    seconds, tokens, read = ask_all(servers[name], texts, CLIENTS[load], max_tokens)
                yield Wave(name, load, repeat, seconds, tokens, read)


def settings(max_tokens: int) -> dict[str, Any]:
    """All that the servers were told."""
    return {
        "engine": SETTINGS,
        "quantization": INT4,
        "speculation": HYBRID,
        "max_tokens": max_tokens,
        "llama_cpp": {"package": PACKAGE, "model": GGUF, "slots": SLOTS, "slot_tokens": SLOT_TOKENS},
    }


def figures_of(waves: Sequence[Wave]) -> dict[str, float]:
    """Medians of each server and load, and ratios of waves of the same prompts."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for wave in waves:
        speeds.setdefault((wave.server, wave.load), []).append(wave.speed)
    found = {
        f"tokens_per_second_{server}_{load}": round(median(own), 2) for (server, load), own in speeds.items()
    }
    ratios = {
        "int4_speedup": (OURS, BASE),
        "int4_hybrid_speedup": (DRAFTING, BASE),
        "int4_over_llamacpp": (OURS, PEER),
        "over_llamacpp": (DRAFTING, PEER),
    }
    for name, (ours, theirs) in ratios.items():
        for load in CLIENTS:
            pairs = list(zip(speeds.get((ours, load), []), speeds.get((theirs, load), []), strict=False))
            if pairs:
                found[f"{name}_{load}"] = round(median(our / their for our, their in pairs), 3)
    return found


def values_of(waves: Sequence[Wave]) -> list[dict[str, Any]]:
    return [{**asdict(wave), "speed": round(wave.speed, 3)} for wave in waves]
