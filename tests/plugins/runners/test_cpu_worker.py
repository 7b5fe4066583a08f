from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.cpu_worker import CPUWorker

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.cpu_worker import GalleyCPUWorker

MODULES = {False: "vllm.v1.worker.cpu_worker", True: "vllm.v1.worker.cpu.model_runner"}


def worker(*, v2: bool, embed: bool = True) -> Any:
    """A worker as it is before it has a device."""
    bare = object.__new__(GalleyCPUWorker)
    options = PluginOptions(embedding=EmbeddingOptions() if embed else None).to_additional_config()
    bare.vllm_config = SimpleNamespace(additional_config=options)
    bare.use_v2_model_runner = v2
    return bare


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("embed", [False, True], ids=["plain", "embed"])
def test_only_while_the_worker_builds_its_runner_vllms_class_is_replaced(
    v2: bool, embed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(MODULES[v2])
    original = module.CPUModelRunner
    seen: list[type[Any]] = []
    monkeypatch.setattr(CPUWorker, "init_device", lambda self: seen.append(module.CPUModelRunner))
    worker(v2=v2, embed=embed).init_device()
    (built,) = seen
    assert issubclass(built, original)
    assert (built is not original) == (embed or not v2)  # V1 samples seeded chunks otherwise, whatever is on
    assert built.__name__ == ("GalleyCPUModelRunner" if embed else "CPUModelRunner")
    assert module.CPUModelRunner is original


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_vllms_class_is_back_also_when_building_failed(v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(MODULES[v2])
    original = module.CPUModelRunner

    def fail(self: Any) -> None:
        assert module.CPUModelRunner is not original
        raise MemoryError

    monkeypatch.setattr(CPUWorker, "init_device", fail)
    with pytest.raises(MemoryError):
        worker(v2=v2).init_device()
    assert module.CPUModelRunner is original


PROGRAM = """
import json, sys
import galley_plugins.registration, galley_plugins.scheduling, galley_plugins.status
import galley_plugins.runners.cpu_worker
from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.compose import compose_runner
from vllm.v1.worker.cpu_worker import CPUModelRunner
compose_runner(CPUModelRunner, PluginOptions(embedding=EmbeddingOptions()), v2=False)
import torch
print(json.dumps([sorted(sys.modules), torch.cuda.is_initialized()]))
"""


def test_nothing_that_serves_on_a_cpu_imports_what_only_cuda_has() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    modules, initialised = json.loads(run.stdout.splitlines()[-1])
    assert "galley_plugins.runners.v1" in modules
    assert not initialised
    needing_cuda = ("galley_plugins.runners.cuda_worker", "galley_plugins.runners.v2", "vllm.vllm_flash_attn")
    for name in (*needing_cuda, "flash_attn", "flashinfer", "deep_gemm", "cutlass"):
        assert [each for each in modules if each == name or each.startswith(name + ".")] == []
