"""Health probes: they decide which workers are ready, and never touch the count of their load."""

from __future__ import annotations

import asyncio
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

import httpx
import structlog

from galley.workers import State

if TYPE_CHECKING:
    from galley.workers import Worker, WorkerPool

FAILURES_TO_UNHEALTHY = 3
PROBE_TIMEOUT_SECONDS = 5.0
STARTING_SECONDS = 0.25  # between probes of a worker that starts, if the configured period is longer

_PROBED = frozenset({State.STARTING, State.READY, State.UNHEALTHY})

log = structlog.get_logger(__name__)


class Verdict(Enum):
    HEALTHY = "healthy"
    REFUSED = "connection refused"
    SILENT = "no answer to health probes"
    FAILING = "health probes fail"


async def probe_pool(pool: WorkerPool, seconds: float) -> None:
    """Probe every worker of the pool, also those added later, until cancelled.

    Args:
        seconds: between two probes of one worker.
    """
    probed: set[str] = set()
    limits = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(timeout=PROBE_TIMEOUT_SECONDS, limits=limits)
    async with client, asyncio.TaskGroup() as group:
        while True:
            for worker in pool.workers:
                if worker.id not in probed:
                    probed.add(worker.id)
                    group.create_task(probe_worker(worker, client, seconds))
            await pool.changed.wait()


async def probe_worker(worker: Worker, client: httpx.AsyncClient, seconds: float) -> None:
    """Keep one worker's state true: ready after one success, unhealthy after three failures or a refusal."""
    failures = 0
    generation = worker.generation
    while True:
        if worker.state in _PROBED and worker.url is not None:
            if generation != worker.generation:
                generation, failures = worker.generation, 0
            asked = time.monotonic()
            verdict = await check(client, worker.url)
            if generation != worker.generation or worker.state not in _PROBED:
                continue
            if verdict is Verdict.HEALTHY:
                failures = 0
                await _admit(worker, client)
            elif not (verdict is Verdict.SILENT and worker.heard >= asked):
                # A worker that is too busy to answer a probe but answers requests is not ill.
                failures += 1
                _reject(worker, verdict, failures)
        pause = min(seconds, STARTING_SECONDS) if worker.state is State.STARTING else seconds
        await _pause(worker, pause)


async def check(client: httpx.AsyncClient, url: str) -> Verdict:
    try:
        answer = await client.get(f"{url}/health")
    except httpx.ConnectError:
        return Verdict.REFUSED
    except httpx.HTTPError:
        return Verdict.SILENT
    return Verdict.HEALTHY if answer.status_code == 200 else Verdict.FAILING


async def fetch_cards(client: httpx.AsyncClient, url: str) -> list[dict[str, Any]]:
    """The entries of a worker's `/v1/models`; empty if it gives none that make sense."""
    try:
        listed = (await client.get(f"{url}/v1/models")).json()["data"]
        return [card for card in listed if isinstance(card["id"], str)]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []


async def _admit(worker: Worker, client: httpx.AsyncClient) -> None:
    if worker.state is State.READY and worker.cards:
        return
    assert worker.url is not None
    generation = worker.generation
    cards = await fetch_cards(client, worker.url)
    if worker.generation != generation or worker.state not in _PROBED:
        return
    if cards:
        worker.set_cards(cards)
    if worker.state is not State.READY:
        worker.mark_ready()


def _reject(worker: Worker, verdict: Verdict, failures: int) -> None:
    if worker.state is not State.READY:
        return
    if failures >= FAILURES_TO_UNHEALTHY or verdict is Verdict.REFUSED:
        worker.mark_unhealthy(verdict.value)


async def _pause(worker: Worker, seconds: float) -> None:
    """Wait for the next probe, or for a process to be started."""
    generation = worker.generation
    try:
        async with asyncio.timeout(seconds):
            while worker.generation == generation:
                await worker.changed.wait()
    except TimeoutError:
        pass
