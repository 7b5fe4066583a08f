"""Starts the configured workers, watches their processes and starts dead ones again with a growing wait.

One task per worker owns its process from start to end. A worker runs in a process group of its own, so that a
Ctrl-C at the terminal reaches the gateway alone, and so that whatever a dead worker leaves can be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from galley.launch import worker_command, worker_environment
from galley.paths import cache_root
from galley.workers import State, Worker

if TYPE_CHECKING:
    from galley.config import Config, ModelConfig
    from galley.workers import WorkerPool

log = structlog.get_logger(__name__)

UNUSABLE_STATUS = 2  # exit status of a worker whose request can never be served here
STEADY_SECONDS = 60.0  # a worker that was ready this long starts over with the shortest wait
_STATUS_PERIOD = 0.1
_LOG_LINES = 12


class WorkerUnusableError(Exception):
    """A worker said that it can never serve what it was asked for; starting it again would not help."""


@dataclass(frozen=True)
class Stage:
    """One line of a worker's status file."""

    name: str
    detail: dict[str, Any]


class StageListener(Protocol):
    def __call__(self, worker: Worker, stage: Stage) -> None: ...


def _ignore(worker: Worker, stage: Stage) -> None:
    pass


class Supervisor:
    """Runs the workers of every model that has no `urls`.

    Args:
        on_stage: called with each stage that a worker reports while it starts.
    """

    def __init__(self, config: Config, pool: WorkerPool, on_stage: StageListener = _ignore) -> None:
        self._settings = config.worker
        self._on_stage = on_stage
        self._log_dir = config.worker.log_dir or cache_root() / "logs"
        self._workers: list[tuple[ModelConfig, Worker]] = []
        for model in config.models:
            if model.urls:
                continue
            for number in range(model.replicas):
                self._workers.append((model, pool.add(Worker(f"{model.name}-{number}", model.name))))

    def log_file(self, worker: Worker) -> Path:
        return self._log_dir / f"{worker.id.replace('/', '_')}.log"

    async def run(self) -> None:
        """Keep the workers running until cancelled, then end them all.

        Raises:
            WorkerUnusableError: a worker can never start; the others are ended too.
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        runtime = Path(tempfile.mkdtemp(prefix="galley-"))
        try:
            async with asyncio.TaskGroup() as group:
                for model, worker in self._workers:
                    group.create_task(self._keep_running(model, worker, runtime), name=f"worker {worker.id}")
        except* WorkerUnusableError as failures:
            raise failures.exceptions[0] from None
        finally:
            shutil.rmtree(runtime, ignore_errors=True)

    async def _keep_running(self, model: ModelConfig, worker: Worker, runtime: Path) -> None:
        wait = self._settings.backoff_seconds
        started_once = False
        while True:
            run = _WorkerRun(
                model, worker, runtime / f"{worker.id.replace('/', '_')}.status", self.log_file(worker)
            )
            reason = await self._run_once(run, worker)
            if run.exit_status == UNUSABLE_STATUS and not started_once and not run.ready_at:
                raise WorkerUnusableError(f"worker {worker.id} cannot start: {reason}")
            started_once = started_once or bool(run.ready_at)
            if run.ready_at and time.monotonic() - run.ready_at > STEADY_SECONDS:
                wait = self._settings.backoff_seconds
            tail = None if run.ready_at else "\n".join(["", *run.last_log_lines()])
            log.warning(
                "worker ended",
                worker=worker.id,
                reason=reason,
                restart_in=wait,
                log=str(run.log_file),
                tail=tail,
            )
            await asyncio.sleep(wait)
            wait = min(2 * wait, self._settings.backoff_max_seconds)

    async def _run_once(self, run: _WorkerRun, worker: Worker) -> str:
        """One process from start to end; returns why it ended, with nothing of it left."""
        try:
            await run.start()
            watcher = asyncio.ensure_future(self._watch(run))
            try:
                return await run.wait(self._settings.ready_seconds)
            finally:
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher
        except asyncio.CancelledError:
            worker.mark_draining()
            await run.stop(self._settings.stop_seconds)
            worker.mark_stopped()
            raise
        finally:
            run.sweep()
            if worker.state is not State.STOPPED:
                worker.mark_down(run.reason())

    async def _watch(self, run: _WorkerRun) -> None:
        """Pass on the stages that the worker reports, and note when it is ready."""
        while True:
            for stage in run.new_stages():
                self._on_stage(run.worker, stage)
            if run.worker.state is State.READY and not run.ready_at:
                run.ready_at = time.monotonic()
            await asyncio.sleep(_STATUS_PERIOD)


class _WorkerRun:
    """One process of a worker."""

    def __init__(self, model: ModelConfig, worker: Worker, status_file: Path, log_file: Path) -> None:
        self.model = model
        self.worker = worker
        self.status_file = status_file
        self.log_file = log_file
        self.ready_at = 0.0
        self.exit_status: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._offset = 0
        self._failure = ""

    async def start(self) -> None:
        port = free_port()
        self.status_file.write_bytes(b"")
        if self.log_file.exists():
            self.log_file.replace(self.log_file.with_suffix(".previous.log"))
        with self.log_file.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *worker_command(self.model, "127.0.0.1", port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=worker_environment(self.model, self.status_file),
                start_new_session=True,
            )
        self.worker.mark_starting(f"http://127.0.0.1:{port}")

    async def wait(self, ready_seconds: float) -> str:
        """Wait for the process to end, or to be ended because it was not ready in time."""
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        ready = asyncio.ensure_future(self.worker.wait_for(State.READY))
        try:
            await asyncio.wait({ended, ready}, timeout=ready_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and not ready.done():
                self._failure = f"not ready after {ready_seconds:g} s"
                return self.reason()
            self.exit_status = await ended
            return self.reason()
        finally:
            ended.cancel()
            ready.cancel()

    async def stop(self, seconds: float) -> None:
        """Ask the process to stop; `sweep` ends it if it has not after `seconds`."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), seconds)

    def sweep(self) -> None:
        """End whatever is left in the worker's process group."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def new_stages(self) -> list[Stage]:
        stages = []
        for line in self._new_lines():
            name = line.pop("stage", "")
            if name == "failed":
                self._failure = str(line.get("reason", ""))
            stages.append(Stage(name, line))
        return stages

    def _new_lines(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):
            text = self.status_file.read_bytes()[self._offset :]
            complete = text[: text.rfind(b"\n") + 1]
            self._offset += len(complete)
            return [json.loads(line) for line in complete.splitlines()]
        return []

    def reason(self) -> str:
        """Why the process ended, for people."""
        self.new_stages()
        if self._failure:
            return self._failure
        if self.exit_status is None:
            return "ended"
        if self.exit_status < 0:
            return f"killed by {signal.Signals(-self.exit_status).name}"
        return f"exit status {self.exit_status}"

    def last_log_lines(self) -> list[str]:
        with contextlib.suppress(OSError), self.log_file.open(encoding="utf-8", errors="replace") as lines:
            return [line.rstrip() for line in deque(lines, _LOG_LINES)]
        return []


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
