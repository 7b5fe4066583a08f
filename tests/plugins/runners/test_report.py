from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins import progress
from galley_plugins.memory.served import NamedMemory
from galley_plugins.runners.report import ReportingWorker

if TYPE_CHECKING:
    from pathlib import Path


class VllmWorker:
    rank = 3
    device = "cuda:1"
    use_v2_model_runner = True
    model_runner = SimpleNamespace(get_supported_tasks=lambda: ("generate", "embed"))

    def __init__(self) -> None:
        self.stages_seen: list[str] = []

    def load_model(self, *, load_dummy_weights: bool = False) -> str:
        self.stages_seen.append(progress.read()[-1]["stage"])
        return f"loaded, dummy={load_dummy_weights}"

    def determine_available_memory(self) -> int:
        self.stages_seen.append(progress.read()[-1]["stage"])
        return 2**30


class Worker(ReportingWorker, VllmWorker):
    pass


def test_each_stage_is_reported_before_it_begins(status_file: Path) -> None:
    worker = Worker()
    assert worker.load_model(load_dummy_weights=True) == "loaded, dummy=True"
    assert worker.determine_available_memory() == 2**30
    assert worker.stages_seen == ["loading weights", "warming up"]


@pytest.mark.parametrize(("v2", "version"), [(False, 1), (True, 2)])
def test_a_worker_says_what_it_runs(v2: bool, version: int) -> None:
    class GalleyRunner:
        def get_supported_tasks(self) -> tuple[str, ...]:
            return ("generate", "embed")

    worker: Any = Worker()
    worker.model_runner, worker.use_v2_model_runner = GalleyRunner(), v2
    assert worker.galley_report() == {
        "pid": os.getpid(),
        "rank": 3,
        "runner": "GalleyRunner",
        "runner_version": version,
        "tasks": ["generate", "embed"],
        "device": "cuda:1",
        "memory": [],
    }


def test_a_worker_names_its_memories() -> None:
    worker: Any = Worker()
    memories = (
        NamedMemory("wiki", 0.25, SimpleNamespace(layer=21)),
        NamedMemory("code", 0.5, SimpleNamespace(layer=3)),
    )
    worker.model_runner = SimpleNamespace(get_supported_tasks=lambda: ("generate",), memories=memories)
    assert worker.galley_report()["memory"] == [
        {"name": "wiki", "layer": 21, "weight": 0.25},
        {"name": "code", "layer": 3, "weight": 0.5},
    ]
