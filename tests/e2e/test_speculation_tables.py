"""What a worker has learned outlives it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from loadtest.servers import FLOAT32, Server, end, galley_worker
from tests.e2e.spec_prompts import spec_prompts

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

PROMPTS = spec_prompts(60)[:6]


def answers(server: Server) -> tuple[list[str], float]:
    """Texts, and tokens for each step of the model."""
    texts = [server.chat(prompt, max_tokens=48)["choices"][0]["message"]["content"] for prompt in PROMPTS]
    tokens = server.metric("vllm:generation_tokens_total")
    accepted = server.metric("galley_speculation_accepted_tokens_total")
    return texts, tokens / (tokens - accepted)


def test_tables_are_saved_and_loaded(tmp_path: Path, shallow: str) -> None:
    path = tmp_path / "tables.safetensors"
    flags = ("--speculation", json.dumps({"method": "hybrid", "tables": str(path)}))
    with galley_worker(FLOAT32, *flags, weights=shallow) as server:
        assert "is not there yet" in server.log.read_text()
        texts, cold = answers(server)
        end(server.process)
        assert path.is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    with galley_worker(FLOAT32, *flags, weights=shallow) as server:
        again, warm = answers(server)
        assert again == texts
        assert warm > cold + 0.5  # the same prompts: nearly everything was written before
