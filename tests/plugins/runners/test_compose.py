from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from galley_plugins import vllm_compat
from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.compose import compose_runner

EMBED = PluginOptions(embedding=EmbeddingOptions())
RUNNERS = [("vllm.v1.worker.gpu_model_runner", False), ("vllm.v1.worker.gpu.model_runner", True)]


@pytest.fixture(params=RUNNERS, ids=["v1", "v2"])
def real(request: pytest.FixtureRequest) -> tuple[type[Any], bool]:
    """vLLM's runner, and whether it is V2."""
    module, v2 = request.param
    return importlib.import_module(module).GPUModelRunner, v2


def test_the_runner_of_vllm_itself_is_used_where_nothing_is_switched_on(real: tuple[type[Any], bool]) -> None:
    base, v2 = real
    assert compose_runner(base, PluginOptions(), v2=v2) is base


def test_a_runner_with_embeddings_is_a_runner_of_vllm(
    real: tuple[type[Any], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, v2 = real
    built: list[tuple[Any, ...]] = []
    monkeypatch.setattr(base, "__init__", lambda self, *arguments: built.append(arguments))
    monkeypatch.setattr(base, "get_supported_tasks", lambda self: ("generate",))
    composed = compose_runner(base, EMBED, v2=v2)
    assert issubclass(composed, base)
    assert composed.__name__ == "GalleyGPUModelRunner"
    model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2))
    config = SimpleNamespace(additional_config=EMBED.to_additional_config(), model_config=model)
    runner = composed(config, "device")
    assert built == [(config, "device")]
    assert runner.get_supported_tasks() == ("generate", "embed")


def test_whatever_is_overridden_exists_in_vllm_takes_the_same_arguments_and_is_checked_at_start(
    real: tuple[type[Any], bool],
) -> None:
    base, v2 = real
    mixin = compose_runner(base, EMBED, v2=v2).__mro__[1]
    checked = {path for _, path, _ in vllm_compat.INTERNALS["runner-v2" if v2 else "runner-v1"]}
    own = {"__init__", "_begin_output_layer", "_pool_embedding_rows", "_pool_rows"}
    overridden = [
        name for name, value in vars(mixin).items() if inspect.isfunction(value) and name not in own
    ]
    assert "sample_tokens" in overridden
    for name in overridden:
        assert f"GPUModelRunner.{name}" in checked
        ours = inspect.signature(getattr(mixin, name))
        # Binds positionally and by name whatever vLLM's own callers may pass.
        names = [
            parameter
            for parameter in inspect.signature(getattr(base, name)).parameters
            if parameter != "self"
        ]
        ours.bind(None, *names)
        ours.bind(None, **dict.fromkeys(names))


def test_a_runner_without_an_internal_is_refused(
    real: tuple[type[Any], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, v2 = real
    monkeypatch.delattr(base, "sample_tokens")
    with pytest.raises(vllm_compat.IncompatibleVllmError, match=r"GPUModelRunner\.sample_tokens"):
        compose_runner(base, EMBED, v2=v2)
