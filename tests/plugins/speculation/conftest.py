from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.support.interpreter import interpreting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORDS = ("<unk>", "a", "b", "c", "d", "e", "f", "g")


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A checkpoint's folder as far as its tokenizer goes: a is 1, b is 2, ..., g is 7."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    yield from interpreting()
