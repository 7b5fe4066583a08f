from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from galley_plugins import progress, registration
from galley_plugins.status import PluginMissingError, StatusEndpoint, check_processes

if TYPE_CHECKING:
    from pathlib import Path

EXPECTED = {"galley": "1.2.0", "vllm": "0.32.0"}
WORKERS = [{"pid": 30, "rank": 0}, {"pid": 31, "rank": 1}]


def line(process: str, pid: int, **versions: str) -> dict[str, Any]:
    return {"stage": "plugins loaded", "process": process, "pid": pid, **EXPECTED, **versions}


WHOLE = [line("MainProcess", 10), line("EngineCore", 20), line("Worker_TP0", 30), line("Worker_TP1", 31)]


def without(process: str) -> list[dict[str, Any]]:
    return [entry for entry in WHOLE if entry["process"] != process]


def test_an_engine_whose_processes_all_loaded_the_same_plugins_is_fine() -> None:
    check_processes(EXPECTED, WORKERS, WHOLE)


def test_a_worker_that_shares_the_engine_cores_process_is_fine() -> None:
    check_processes(EXPECTED, [{"pid": 20, "rank": 0}], [line("MainProcess", 10), line("EngineCore_DP0", 20)])


def test_without_a_status_file_nothing_can_be_compared() -> None:
    check_processes(EXPECTED, WORKERS, [])


@pytest.mark.parametrize(
    ("loaded", "named"),
    [
        (without("Worker_TP0"), ["worker process 30 (rank 0) did not load"]),
        (without("Worker_TP1"), ["worker process 31 (rank 1) did not load"]),
        (without("EngineCore"), ["the engine core did not load"]),
        ([line("MainProcess", 10)], ["30 (rank 0)", "31 (rank 1)", "the engine core"]),
        (
            [*without("EngineCore"), line("EngineCore", 20, galley="1.1.9")],
            ["process EngineCore (20)", "'galley': '1.1.9'", "expected", "'galley': '1.2.0'"],
        ),
        (
            [*without("Worker_TP1"), line("Worker_TP1", 31, vllm="0.32.1")],
            ["process Worker_TP1 (31)", "'vllm': '0.32.1'", "expected", "'vllm': '0.32.0'"],
        ),
        (
            [*without("Worker_TP0"), {"stage": "plugins loaded", "process": "Worker_TP0", "pid": 30}],
            ["process Worker_TP0 (30)", "None"],
        ),
    ],
    ids=["first worker", "second worker", "core", "all", "old core", "other vllm", "no versions"],
)
def test_a_process_without_the_right_plugins_is_named(loaded: list[dict[str, Any]], named: list[str]) -> None:
    with pytest.raises(PluginMissingError) as failure:
        check_processes(EXPECTED, WORKERS, loaded)
    for part in named:
        assert part in str(failure.value)


def test_only_the_processes_at_fault_are_named() -> None:
    with pytest.raises(PluginMissingError) as failure:
        check_processes(EXPECTED, WORKERS, without("Worker_TP1"))
    message = str(failure.value)
    assert "31" in message
    assert "30" not in message
    assert "engine core" not in message


@pytest.fixture(autouse=True)
def vllms_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what an API server's plugins do to it."""
    monkeypatch.setattr(SamplingParams, "verify", SamplingParams.verify)


class Engine:
    """An engine client whose worker processes answer with their reports."""

    def __init__(self, *pids: int) -> None:
        self.workers = [{"pid": pid, "rank": rank, "tasks": ["generate"]} for rank, pid in enumerate(pids)]
        self.vllm_config = SimpleNamespace(additional_config={})

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        return {"galley_report": self.workers}[method]


def get_status(endpoint: StatusEndpoint) -> httpx.Response:
    app = FastAPI()
    endpoint.attach_router(app)

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
            return await client.get("/galley/status")

    return asyncio.run(get())


def initialise(endpoint: StatusEndpoint, engine: Engine) -> None:
    asyncio.run(endpoint.init_state(engine, SimpleNamespace(), Namespace()))


def report_loaded(monkeypatch: pytest.MonkeyPatch, process: str, pid: int) -> None:
    with monkeypatch.context() as other:
        other.setattr(os, "getpid", lambda: pid)
        progress.report("plugins loaded", process=process, **registration.versions())


def test_the_status_page_shows_versions_workers_and_processes(
    status_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_loaded(monkeypatch, "MainProcess", 10)
    report_loaded(monkeypatch, "EngineCore", 20)
    progress.report("loading weights")
    endpoint = StatusEndpoint()
    initialise(endpoint, Engine(20))
    assert get_status(endpoint).json() == {
        **registration.versions(),
        "workers": [{"pid": 20, "rank": 0, "tasks": ["generate"]}],
        "processes": [{"process": "MainProcess", "pid": 10}, {"process": "EngineCore", "pid": 20}],
    }
    assert progress.read()[-1]["stage"] == "ready"


def test_weights_of_memories_are_checked_by_what_the_workers_report(status_file: Path) -> None:
    engine = Engine(20)
    engine.workers[0]["memory"] = [{"name": "wiki", "layer": 20, "weight": 0.25}]
    initialise(StatusEndpoint(), engine)
    with pytest.raises(
        VLLMValidationError, match=r"found memory_weight\.code, expected .*memory_weight\.wiki"
    ):
        SamplingParams(extra_args={"memory_weight.code": 0.5}).verify(None, None, None, None)


def test_a_worker_that_lacks_the_plugins_keeps_the_server_from_becoming_ready(
    status_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_loaded(monkeypatch, "MainProcess", 10)
    report_loaded(monkeypatch, "EngineCore", 20)
    with pytest.raises(PluginMissingError, match=r"worker process 77 \(rank 1\)"):
        initialise(StatusEndpoint(), Engine(20, 77))
    assert "ready" not in [entry["stage"] for entry in progress.read()]


def test_vllm_mounts_the_status_page_where_its_list_of_plugins_names_it(
    own_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.plugins import load_endpoint_plugins
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from galley_plugins.worker.environment import worker_environment

    monkeypatch.setenv("VLLM_PLUGINS", worker_environment("cpu", {})["VLLM_PLUGINS"])
    for tasks in (("generate",), ("embed",), ("generate", "embed")):
        (plugin,) = load_endpoint_plugins(tasks)
        assert isinstance(plugin, StatusEndpoint)
        assert isinstance(plugin, EndpointPlugin)
