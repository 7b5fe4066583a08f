"""The workers behind the gateway: their state, their load, and which of them takes the next request.

A supervisor adds each worker once and then reports what happens to its process:

    worker = pool.add(Worker("smollm2-0", "smollm2"))
    worker.mark_starting("http://127.0.0.1:41233")   # a process was started that will listen there
    worker.mark_down("exit code 137")                # it is gone; starting it again counts as a restart
    worker.mark_draining(); worker.mark_stopped()    # the end

The prober (probe.py) turns `starting` into `ready` and back and forth to `unhealthy`. Everything happens in
one event loop; nothing here waits or locks.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from galley.config import ModelConfig

log = structlog.get_logger(__name__)


class State(StrEnum):
    """Only `ready` workers are given requests."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DOWN = "down"
    DRAINING = "draining"
    STOPPED = "stopped"


class Signal:
    """Wakes everyone who waits for the next change of something."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


class Worker:
    """One engine process, or one that runs elsewhere, and what the gateway knows about it.

    Attributes:
        id: unique in the pool and part of metric labels, e.g. `smollm2-0`.
        model: the configured name of the model it serves.
        url: base URL without a trailing slash; None while there is no process.
        external: not started by galley.
        generation: grows whenever the process behind the worker changes.
        cards: the entries of the worker's own `/v1/models`, kept while it is away.
        heard: `time.monotonic()` when its last answer began or ended.
        fingerprint: its JSON-encoded `system_fingerprint`, learned from streams.
    """

    def __init__(self, worker_id: str, model: str, url: str | None = None, *, external: bool = False) -> None:
        self.id = worker_id
        self.model = model
        self.url = url.rstrip("/") if url else None
        self.external = external
        self.state = State.STARTING
        self.reason = ""
        self.since = time.time()
        self.generation = 0
        self.restarts = 0
        self.in_flight = 0
        self.heard = 0.0
        self.fingerprint: bytes | None = None
        self.cards: list[dict[str, Any]] = []
        self.changed = Signal()
        self.turn = 0

    def mark_starting(self, url: str) -> None:
        """A process was started; it will listen at `url`. Counts as a restart after `mark_down`."""
        if self.state is State.DOWN:
            self.restarts += 1
        self.url = url.rstrip("/")
        self.generation += 1
        self.fingerprint = None
        self._enter(State.STARTING)

    def mark_ready(self, url: str | None = None) -> None:
        """The worker answers; `url` where it moved."""
        if url is not None:
            self.url = url.rstrip("/")
        if self.url is None:
            raise ValueError(f"worker {self.id}: ready without a URL")
        self._enter(State.READY)

    def mark_unhealthy(self, reason: str) -> None:
        """It does not answer, but its process may still run."""
        self._enter(State.UNHEALTHY, reason)

    def mark_refused(self) -> None:
        """Nobody listens at its URL; out of the choice until a probe gets through."""
        if self.state is State.READY:
            self.mark_unhealthy("connection refused")

    def mark_down(self, reason: str) -> None:
        """The process is gone. Running requests end through their own connections."""
        self.url = None
        self.generation += 1
        self._enter(State.DOWN, reason)

    def mark_draining(self) -> None:
        """No new requests; running ones go on."""
        self._enter(State.DRAINING)

    def mark_stopped(self) -> None:
        self.url = None
        self.generation += 1
        self._enter(State.STOPPED)

    def set_cards(self, cards: list[dict[str, Any]]) -> None:
        self.cards = cards
        self.changed.notify()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request in flight, from dispatch until the scope ends in whatever way."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def wait_for(self, *states: State) -> State:
        """Wait until the worker is in one of `states`."""
        while self.state not in states:
            await self.changed.wait()
        return self.state

    def _enter(self, state: State, reason: str = "") -> None:
        if (state, reason) != (self.state, self.reason):
            log.info(
                "worker state", worker=self.id, state=state.value, was=self.state.value, reason=reason or None
            )
        if state is not self.state:
            self.since = time.time()
        self.state = state
        self.reason = reason
        self.changed.notify()


class WorkerPool:
    """All workers by model, and the names that clients may use for the models."""

    def __init__(self, models: Sequence[ModelConfig]) -> None:
        self.models = tuple(models)
        self.changed = Signal()
        self._workers: dict[str, Worker] = {}
        self._by_model: dict[str, list[Worker]] = {model.name: [] for model in models}
        self._configured = {name: model for model in models for name in model.served_names}
        self._turn = 0
        for model in models:
            for number, url in enumerate(model.urls):
                self.add(Worker(f"{model.name}-{number}", model.name, str(url), external=True))

    def add(self, worker: Worker) -> Worker:
        """Take a worker in; the ones with configured `urls` are there from the start.

        Raises:
            ValueError: the id is taken, or the model is not configured.
        """
        if worker.id in self._workers:
            raise ValueError(f"worker id {worker.id!r} is used twice")
        if worker.model not in self._by_model:
            raise ValueError(f"worker {worker.id}: found model {worker.model!r}, which is not configured")
        self._workers[worker.id] = worker
        self._by_model[worker.model].append(worker)
        self.changed.notify()
        return worker

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Configured names and aliases, then names that only workers list (adapters)."""
        listed = (card["id"] for worker in self.workers for card in worker.cards)
        return tuple(dict.fromkeys((*self._configured, *listed)))

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def resolve(self, name: str) -> ModelConfig | None:
        """The model that a client means by a configured name, an alias, or a name that its worker lists."""
        found = self._configured.get(name)
        if found is not None:
            return found
        for worker in self._workers.values():
            if any(card["id"] == name for card in worker.cards):
                return self._configured[worker.model]
        return None

    def choose(self, model: str, avoid: Worker | None = None) -> Worker | None:
        """The ready worker with the fewest requests in flight, in turn on ties; `avoid` only if it is the
        last.
        """
        ready = [worker for worker in self._by_model[model] if worker.state is State.READY]
        if avoid is not None and len(ready) > 1:
            ready = [worker for worker in ready if worker is not avoid]
        if not ready:
            return None
        chosen = (
            ready[0] if len(ready) == 1 else min(ready, key=lambda worker: (worker.in_flight, worker.turn))
        )
        self._turn += 1
        chosen.turn = self._turn
        return chosen

    def is_ready(self) -> bool:
        """Every model has a worker that takes requests."""
        return all(
            any(worker.state is State.READY for worker in workers) for workers in self._by_model.values()
        )

    def states(self, model: str) -> dict[str, str]:
        """Each worker of a model with its state, and the reason where there is one."""
        return {
            worker.id: f"{worker.state} ({worker.reason})" if worker.reason else worker.state.value
            for worker in self._by_model[model]
        }
