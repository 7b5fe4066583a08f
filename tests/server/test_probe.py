"""Probes: how a worker becomes ready, ill, and well again."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest

from galley.config import ModelConfig
from galley.mock_engine import MockEngine, listen
from galley.probe import Verdict, check, fetch_cards, probe_pool, probe_worker
from galley.workers import State, Worker, WorkerPool

pytestmark = pytest.mark.anyio

OFTEN = 0.005


@contextlib.asynccontextmanager
async def probing(pool: WorkerPool):
    task = asyncio.create_task(probe_pool(pool, OFTEN))
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def engine():
    engine = MockEngine(models=("mock", "adapter"))
    async with listen(engine) as listener:
        engine.listener = listener
        yield engine


async def test_a_worker_is_ready_after_one_success_and_its_models_are_known(engine):
    pool = WorkerPool((ModelConfig(name="mock"),))
    worker = pool.add(Worker("mock-0", "mock"))
    async with probing(pool):
        worker.mark_starting(engine.listener.url)
        await worker.wait_for(State.READY)
    assert [card["id"] for card in worker.cards] == ["mock", "adapter"]
    assert worker.cards[0]["max_model_len"] == 4096
    assert pool.resolve("adapter").name == "mock"
    assert worker.in_flight == 0


async def test_a_worker_that_was_added_later_is_probed_too(engine):
    pool = WorkerPool((ModelConfig(name="mock"),))
    async with probing(pool):
        await asyncio.sleep(0)
        worker = pool.add(Worker("mock-0", "mock", engine.listener.url))
        await worker.wait_for(State.READY)


async def test_workers_that_run_elsewhere_are_found_by_their_urls(engine):
    models = (ModelConfig(name="mock", urls=(engine.listener.url, "http://127.0.0.1:9/")),)
    pool = WorkerPool(models)
    assert [(worker.id, worker.external) for worker in pool.workers] == [("mock-0", True), ("mock-1", True)]
    async with probing(pool):
        await pool.workers[0].wait_for(State.READY)
    assert pool.workers[1].state is State.STARTING
    assert pool.is_ready()


async def test_failures_make_a_worker_unhealthy_and_one_success_brings_it_back(engine):
    pool = WorkerPool((ModelConfig(name="mock"),))
    worker = pool.add(Worker("mock-0", "mock", engine.listener.url))
    async with probing(pool):
        await worker.wait_for(State.READY)
        asked = len(engine.requests)
        engine.healthy = False
        await worker.wait_for(State.UNHEALTHY)
        probes = [seen for seen in list(engine.requests)[asked:] if seen.path == "/health"]
        assert len(probes) >= 3
        assert worker.reason == Verdict.FAILING.value
        engine.healthy = True
        await worker.wait_for(State.READY)


async def test_a_refused_connection_counts_at_once_and_the_worker_comes_back(engine):
    pool = WorkerPool((ModelConfig(name="mock"),))
    worker = pool.add(Worker("mock-0", "mock", engine.listener.url, external=True))
    async with probing(pool):
        await worker.wait_for(State.READY)
        await engine.listener.stop()
        await worker.wait_for(State.UNHEALTHY)
        assert worker.reason == "connection refused"
        await engine.listener.start()
        await worker.wait_for(State.READY)


async def test_a_worker_that_is_down_or_drains_is_left_alone(engine):
    pool = WorkerPool((ModelConfig(name="mock"),))
    worker = pool.add(Worker("mock-0", "mock", engine.listener.url))
    async with probing(pool):
        await worker.wait_for(State.READY)
        for leave in (worker.mark_draining, lambda: worker.mark_down("gone"), worker.mark_stopped):
            leave()
            state, asked = worker.state, len(engine.requests)
            await asyncio.sleep(OFTEN * 5)
            assert worker.state is state
            assert len(engine.requests) <= asked + 1
        worker.mark_starting(engine.listener.url)
        await worker.wait_for(State.READY)


async def test_an_answer_from_a_process_that_is_gone_changes_nothing():
    """The probe is on its way when the supervisor reports the end of the process."""
    asked, release = asyncio.Event(), asyncio.Event()

    async def answer(_: httpx.Request) -> httpx.Response:
        asked.set()
        await release.wait()
        return httpx.Response(200, json={"data": []})

    worker = Worker("mock-0", "mock", "http://worker")
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        task = asyncio.create_task(probe_worker(worker, client, OFTEN))
        await asked.wait()
        worker.mark_down("exit code 1")
        release.set()
        await asyncio.sleep(OFTEN * 5)
        assert worker.state is State.DOWN
        task.cancel()


async def test_a_busy_worker_that_answers_requests_is_not_ill():
    async def silent(_: httpx.Request) -> httpx.Response:
        if worker.state is State.STARTING:
            return httpx.Response(200, json={"data": [{"id": "mock"}]})
        asked.append(1)
        if len(asked) == 10:
            many.set()
        if busy:
            worker.heard = float("inf")
        else:
            worker.heard = 0.0
        raise httpx.ReadTimeout("late")

    asked, busy, many = [], True, asyncio.Event()
    worker = Worker("mock-0", "mock", "http://worker")
    async with httpx.AsyncClient(transport=httpx.MockTransport(silent)) as client:
        task = asyncio.create_task(probe_worker(worker, client, OFTEN))
        await worker.wait_for(State.READY)
        await many.wait()
        assert worker.state is State.READY
        busy = False
        await worker.wait_for(State.UNHEALTHY)
        assert worker.reason == Verdict.SILENT.value
        task.cancel()


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (httpx.Response(200), Verdict.HEALTHY),
        (httpx.Response(503), Verdict.FAILING),
        (httpx.ConnectError("refused"), Verdict.REFUSED),
        (httpx.ReadTimeout("late"), Verdict.SILENT),
        (httpx.RemoteProtocolError("not HTTP"), Verdict.SILENT),
    ],
)
async def test_what_a_probe_makes_of_an_answer(answer, verdict):
    def handle(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client:
        assert await check(client, "http://worker") is verdict


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"data":[{}]}', b'{"data":[{"id":3}]}', b'{"data":3}', b"null"]
)
async def test_lists_of_models_that_make_no_sense_are_empty(body):
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body))
    async with httpx.AsyncClient(transport=transport) as client:
        assert await fetch_cards(client, "http://worker") == []
