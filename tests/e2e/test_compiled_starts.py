"""torch.compile on a CPU: the second start runs what the first one compiled."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from loadtest.servers import FLOAT32, galley_worker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]

ASKED = "Name three colours of the rainbow."


def test_a_second_start_loads_the_pass_and_answers_the_same(shallow: str, tmp_path: Path) -> None:
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    answers, logs = [], []
    for _ in range(2):
        with galley_worker(FLOAT32, "--compile", "on", env=cache, weights=shallow) as server:
            answers.append(server.chat(ASKED, max_tokens=24)["choices"][0]["message"]["content"])
            logs.append(server.log.read_text())
    first, second = logs
    assert "saved AOT compiled function" in first
    assert "Directly load AOT compilation" in second
    assert "Compiling model again" not in second
    assert "saved AOT compiled function" not in second
    assert answers[0]
    assert answers[0] == answers[1]
