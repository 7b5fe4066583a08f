"""Memories meet the model that they are mixed with: shares, and those that do not belong to it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from galley_plugins.memory.options import MemoryOptions
from galley_plugins.memory.served import UnsuitableMemoryError, check_memories, load_memories
from tests.support.shallow_model import make_shallow_model
from tests.support.small_memory import make_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shallow_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def memory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    columns = torch.tensor([2, 5, 7])
    return make_memory(tmp_path_factory.mktemp("memory"), model, layer=5, weight=0.3, seed=1, columns=columns)


@pytest.fixture
def load(model: Path) -> Callable[..., object]:
    config = SimpleNamespace(model=str(model), revision=None)
    return lambda *options: load_memories(options, config, torch.device("cpu"), torch.bfloat16)


def test_a_memorys_own_share_holds_where_none_is_configured(
    memory: Path, load: Callable[..., object]
) -> None:
    first, second = load(MemoryOptions(str(memory), "a"), MemoryOptions(str(memory), "b", 0.5))
    assert [first.report(), second.report()] == [
        {"name": "a", "layer": 5, "weight": 0.3},
        {"name": "b", "layer": 5, "weight": 0.5},
    ]
    assert first.memory.columns.tolist() == [2, 5, 7]
    logits = first.memory.logits(torch.ones(4, 576, dtype=torch.bfloat16))
    assert logits.shape == (4, 3)
    assert logits.dtype == torch.bfloat16


def test_shares_of_more_than_everything_are_refused_before_and_while_loading(
    model: Path, memory: Path, load: Callable[..., object]
) -> None:
    options = (MemoryOptions(str(memory), "a"), MemoryOptions(str(memory), "b", 0.8))
    message = r"memory: found weights of memories that add up to 1\.1 \(a 0\.3, b 0\.8\), expected 1 at most"
    with pytest.raises(UnsuitableMemoryError, match=message):
        check_memories(options, model)
    with pytest.raises(ValueError, match=message):
        load(*options)


def test_another_models_memory_is_refused_with_both_hashes(model: Path, memory: Path, tmp_path: Path) -> None:
    settings = json.loads((memory / "galley_memory.json").read_text())
    (tmp_path / "memory.safetensors").write_bytes((memory / "memory.safetensors").read_bytes())
    other = {**settings, "base": {**settings["base"], "model": "0" * 64}}
    (tmp_path / "galley_memory.json").write_text(json.dumps(other))
    message = f"another model: found hash {'0' * 64}, the model here has {settings['base']['model']}"
    with pytest.raises(UnsuitableMemoryError, match=message):
        check_memories([MemoryOptions(str(tmp_path))], model)


def test_what_is_no_memory_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsuitableMemoryError, match=str(tmp_path)):
        check_memories([MemoryOptions(str(tmp_path))], model)


def test_of_a_model_that_is_not_here_yet_nothing_is_known() -> None:
    check_memories([MemoryOptions("/nowhere")], "some/model")
