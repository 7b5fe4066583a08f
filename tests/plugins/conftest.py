from __future__ import annotations

import json
import os
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from galley_plugins import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def status_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process, and every process it starts, reports its progress."""
    path = tmp_path / "status.jsonl"
    monkeypatch.setenv(progress.VARIABLE, str(path))
    return path


@pytest.fixture
def own_environment() -> Iterator[None]:
    """Takes back what vLLM writes into the environment of the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def distributions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these the only installed distributions, by name (with `_` for `-`) and version."""

    def become(**installed: str) -> None:
        def version(name: str) -> str:
            try:
                return installed[name.replace("-", "_")]
            except KeyError:
                raise metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(metadata, "version", version)

    return become


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model of which only the configuration exists: enough for vLLM to plan an engine."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    # The class itself: its name alone would be looked up in another process.
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    configuration = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "dtype": "float32",
    }
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configuration))
    return folder
