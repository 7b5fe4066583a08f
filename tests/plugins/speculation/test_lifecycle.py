"""Tables of an earlier worker, found as they were, damaged, or another model's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from galley_plugins.models import resolve
from galley_plugins.speculation.drafting import Ask, Opening, Seen
from galley_plugins.speculation.lifecycle import DrafterFiles
from galley_plugins.speculation.options import SpeculationOptions

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 49_152
TEXT = [11, 12, 13, 14, 15, 16, 17, 18]


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return str(resolve("builtin:smollm2-135m-instruct"))


def teach(drafter: Any) -> None:
    """Let the model say TEXT, and be sure of it."""
    drafter.begin(1, Opening(tokens=np.array(TEXT[:1], np.int32), scope=0, greedy=True))
    for place in range(1, len(TEXT)):
        tokens = np.full((1, 8), TEXT[place], np.int32)
        tokens[0, 1:] = np.arange(100, 107)
        probabilities = np.array([[0.9, *[0.01] * 7]], np.float32)
        contexts = np.array([[*([-1] * max(0, 3 - place)), *TEXT[max(0, place - 3) : place]]], np.int32)
        numbers = np.array([1], np.int32)
        drafter.observe(Seen(numbers, contexts, tokens, probabilities, np.array([TEXT[place]], np.int32)))
        drafter.extend(1, np.array(TEXT[place : place + 1], np.int32))
    drafter.end(1)


def continuation(drafter: Any) -> list[int]:
    """What it drafts for another request after TEXT's first four tokens."""
    drafter.begin(2, Opening(tokens=np.array(TEXT[:4], np.int32), scope=0, greedy=True))
    (draft,) = drafter.propose([Ask(2, 8, False)])
    drafter.end(2)
    return draft.tokens.tolist()


def test_a_worker_goes_on_with_what_was_saved_and_starts_cold_with_what_was_damaged(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = SpeculationOptions(method="hybrid", tables=tmp_path / "tables.safetensors")
    files = DrafterFiles(options, VOCABULARY, tokenizer)
    drafter = files.open()
    assert continuation(drafter) == []
    teach(drafter)
    learned = continuation(drafter)
    assert learned[:2] == TEXT[4:6]
    files.save(drafter)
    with caplog.at_level(logging.INFO, logger="vllm.galley.speculation"):
        assert continuation(DrafterFiles(options, VOCABULARY, tokenizer).open())[:2] == TEXT[4:6]
        damaged = bytearray(options.tables.read_bytes())
        damaged[len(damaged) // 2] ^= 0xFF
        options.tables.write_bytes(damaged)
        assert continuation(DrafterFiles(options, VOCABULARY, tokenizer).open()) == []
    assert "goes on with the tables of" in caplog.text
    assert "starts cold" in caplog.text
    assert "damaged" in caplog.text
    assert options.tables.read_bytes() == bytes(damaged)  # nobody has touched it
