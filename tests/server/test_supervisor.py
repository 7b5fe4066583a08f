"""Real processes, with a scripted worker in place of vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from galley import supervisor as supervisor_module
from galley.config import Config, ModelConfig, WorkerConfig
from galley.probe import probe_pool
from galley.supervisor import Supervisor, WorkerUnusableError
from galley.workers import State, WorkerPool

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


class House:
    """A supervisor with its pool, and what its workers reported."""

    def __init__(self, tmp_path: Path, replicas: int = 1, **worker: object) -> None:
        settings = {"backoff_seconds": 0.01, "backoff_max_seconds": 0.04, "stop_seconds": 5, **worker}
        self.config = Config(
            worker=WorkerConfig(log_dir=tmp_path / "logs", **settings),
            models=(ModelConfig(name="mock", replicas=replicas),),
        )
        self.pool = WorkerPool(self.config.models)
        self.stages: list[tuple[str, str]] = []
        self.details: list[dict] = []
        self.supervisor = Supervisor(self.config, self.pool, self._on_stage)
        self.starts = tmp_path / "starts"

    def _on_stage(self, worker, stage) -> None:
        self.stages.append((worker.id, stage.name))
        self.details.append(stage.detail)

    @property
    def worker(self):
        return self.pool.workers[0]

    def pids(self) -> list[int]:
        return [int(line) for line in self.starts.read_text().split()]

    async def until(self, *states: State) -> None:
        async with asyncio.timeout(30):
            await self.worker.wait_for(*states)

    async def __aenter__(self):
        self.tasks = [
            asyncio.create_task(self.supervisor.run()),
            asyncio.create_task(probe_pool(self.pool, 0.02)),
        ]
        return self

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def __aexit__(self, *error) -> None:
        await self.stop()
        if self.starts.exists():
            assert [pid for pid in self.pids() if is_alive(pid)] == []


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_alive(pid):
            await asyncio.sleep(0.01)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Builds a house whose workers behave as told, start by start."""

    def build(*behaviours: str, **options) -> House:
        def command(model, host, port):
            return [sys.executable, "-m", "tests.support.scripted_worker", host, str(port), *behaviours]

        monkeypatch.setattr(supervisor_module, "worker_command", command)
        monkeypatch.setenv("SCRIPTED_STARTS", str(tmp_path / "starts"))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return House(tmp_path, **options)

    return build


async def test_a_worker_becomes_ready_and_answers_where_the_pool_says(house):
    async with house("serve") as it:
        await it.until(State.READY)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{it.worker.url}/health")).status_code == 200
    assert it.worker.state is State.STOPPED
    assert it.worker.url is None


async def test_the_stages_that_a_worker_reports_are_passed_on_in_order(house):
    async with house("serve") as it:
        await it.until(State.READY)
        async with asyncio.timeout(5):
            while len(it.stages) < 2:
                await asyncio.sleep(0.01)
    assert it.stages == [("mock-0", "starting engine"), ("mock-0", "ready")]
    assert it.details[0]["device"] == "none"


async def test_every_replica_gets_a_process_of_its_own(house):
    async with house("serve", replicas=3) as it:
        async with asyncio.timeout(30):
            for worker in it.pool.workers:
                await worker.wait_for(State.READY)
        assert [worker.id for worker in it.pool.workers] == ["mock-0", "mock-1", "mock-2"]
        assert len({worker.url for worker in it.pool.workers}) == 3


async def test_a_killed_worker_is_started_again(house):
    async with house("serve") as it:
        await it.until(State.READY)
        os.kill(it.pids()[0], signal.SIGKILL)
        await it.until(State.DOWN)
        assert it.worker.reason == "killed by SIGKILL"
        await it.until(State.READY)
        assert it.worker.restarts == 1
        assert len(it.pids()) == 2


async def test_a_worker_that_dies_while_it_starts_is_tried_until_it_comes_up(house):
    async with house("die", "die", "die", "serve") as it:
        await it.until(State.READY)
        assert it.worker.restarts == 3
        assert len(it.pids()) == 4


async def test_the_wait_before_a_restart_doubles_up_to_its_limit(house, monkeypatch):
    waits = []
    real_sleep = asyncio.sleep

    async def sleep(seconds):
        if seconds in (0.01, 0.02, 0.04, 0.08):
            waits.append(seconds)
        await real_sleep(0)

    async with house("die", "die", "die", "die", "serve") as it:
        monkeypatch.setattr(supervisor_module.asyncio, "sleep", sleep)
        await it.until(State.READY)
    assert waits[:4] == [0.01, 0.02, 0.04, 0.04]


async def test_a_worker_that_can_never_serve_ends_the_supervisor_with_its_reason(house):
    it = house("unusable")
    with pytest.raises(WorkerUnusableError, match="worker mock-0 cannot start: no such model"):
        await it.supervisor.run()
    assert len(it.pids()) == 1
    assert it.worker.state is State.DOWN


async def test_a_worker_that_is_not_ready_in_time_is_ended_and_started_again(house):
    async with house("hang", "serve", ready_seconds=1.5) as it:
        await it.until(State.DOWN)
        assert it.worker.reason == "not ready after 1.5 s"
        await until_gone(it.pids()[0])
        await it.until(State.READY)


async def test_a_worker_that_does_not_stop_is_ended_with_all_its_children(house):
    async with house("stubborn", stop_seconds=0.2) as it:
        await it.until(State.READY)
        async with asyncio.timeout(5):
            while not any("child" in detail for detail in it.details):
                await asyncio.sleep(0.01)
        child = next(detail["child"] for detail in it.details if "child" in detail)
        assert is_alive(child)
        await it.stop()
        await until_gone(it.pids()[0])
        await until_gone(child)


async def test_the_workers_output_goes_to_its_log_and_the_previous_one_is_kept(house):
    async with house("die", "serve") as it:
        await it.until(State.READY)
        log = it.supervisor.log_file(it.worker)
        assert "a line of the worker's own log" in log.read_text()
        assert log.with_suffix(".previous.log").exists()


async def test_models_that_run_elsewhere_are_not_started(tmp_path):
    models = (ModelConfig(name="far", urls=("http://127.0.0.1:9",)),)
    pool = WorkerPool(models)
    supervisor = Supervisor(Config(worker=WorkerConfig(log_dir=tmp_path), models=models), pool)
    await supervisor.run()  # nothing to do, nothing to wait for
    assert [worker.external for worker in pool.workers] == [True]
