"""CUDA's worker class: it imports on a CPU too, so that its wiring is tested without a GPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.cuda_worker import GalleyCUDAWorker
from galley_plugins.runners.v1 import EmbeddingV1
from galley_plugins.runners.v2 import EmbeddingV2

MODULES = {False: "vllm.v1.worker.gpu_model_runner", True: "vllm.v1.worker.gpu.model_runner"}


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("embed", [False, True], ids=["plain", "embed"])
def test_the_worker_builds_its_runner_on_its_device(
    v2: bool, embed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = importlib.import_module(MODULES[v2]).GPUModelRunner
    built: list[tuple[Any, ...]] = []
    monkeypatch.setattr(base, "__init__", lambda self, *arguments: built.append(arguments))
    worker: Any = object.__new__(GalleyCUDAWorker)
    options = PluginOptions(embedding=EmbeddingOptions() if embed else None)
    model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2))
    worker.vllm_config = SimpleNamespace(additional_config=options.to_additional_config(), model_config=model)
    worker.use_v2_model_runner, worker.device = v2, "cuda:0"
    runner = worker._make_model_runner()
    assert isinstance(runner, base)
    assert (type(runner) is base) == (not embed)
    assert isinstance(runner, EmbeddingV2 if v2 else EmbeddingV1) == embed
    assert built == [(worker.vllm_config, "cuda:0")]
