from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from galley_plugins.embedding.adapter import (
    SETTINGS,
    WEIGHTS,
    AdapterError,
    AdapterSettings,
    Base,
    load_settings,
    load_tensors,
    save_adapter,
    saving,
)
from galley_plugins.embedding.options import EmbeddingOptions

if TYPE_CHECKING:
    from pathlib import Path

BASE = Base("llama", 576, 30, "abc")
GEM = AdapterSettings("gem", BASE, "1.0", {"prompt": "prompt-eol"}, {"tokens": 1, "combine": "mean"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "gem", GEM, {"special": torch.ones(1, 4, dtype=torch.bfloat16)})
    return tmp_path / "gem"


def test_what_was_saved_is_loaded_in_float32(folder: Path) -> None:
    assert load_settings(folder) == GEM
    tensors = load_tensors(folder, BASE)
    assert tensors["special"].dtype == torch.float32
    assert tensors["special"].tolist() == [[1.0] * 4]


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), saving(tmp_path / "gem", GEM, {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_replaced_and_other_files_are_not(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, AdapterSettings("gem", BASE, "2.0"), {"special": torch.zeros(1, 4)})
    assert load_settings(folder).version == "2.0"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(AdapterError, match="found other files"):
        save_adapter(tmp_path / "letters", GEM, {})
    assert (tmp_path / "letters" / "mine.txt").read_text() == "dear"


def test_another_model_is_named(folder: Path) -> None:
    other = Base("llama", 64, 2, "abc")
    with pytest.raises(AdapterError, match=r"trained for .*hidden_size=576.* is .*hidden_size=64"):
        load_tensors(folder, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not of format 1"),
        (json.dumps({"format": 2}), "is not of format 1"),
        (json.dumps({"format": 1, "method": "gem"}), "base"),
        (
            json.dumps({"format": 1, "method": "x", "version": "", "base": {**vars(BASE)}}),
            "found the method 'x'",
        ),
    ],
)
def test_a_damaged_file_of_settings_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / SETTINGS).write_text(content)
    with pytest.raises(AdapterError, match=message):
        load_settings(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 20)
    with pytest.raises(AdapterError, match="cannot be read"):
        load_tensors(folder, BASE)
    with pytest.raises(AdapterError, match="cannot be read"):
        load_settings(folder / "absent")


def test_an_adapter_names_its_method_and_the_configuration_overrides_its_options(folder: Path) -> None:
    options = EmbeddingOptions.from_values({"adapter": str(folder)})
    assert (options.method, options.prompt) == ("gem", "prompt-eol")
    options = EmbeddingOptions.from_values({"adapter": str(folder), "prompt": "plain"})
    assert options.prompt == "plain"
    with pytest.raises(ValueError, match="found mean, expected gem"):
        EmbeddingOptions.from_values({"adapter": str(folder), "method": "mean"})


def test_a_trained_method_without_its_adapter_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match="galley embed train causal2vec"):
        EmbeddingOptions.from_values({"method": "causal2vec"})
