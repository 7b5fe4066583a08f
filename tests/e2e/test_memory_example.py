"""The example of `galley_plugins/memory/examples`, as users run it: build, serve, ask."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.servers import NAME, galley_worker

pytestmark = pytest.mark.engine

EXAMPLE = Path(__file__).parents[2] / "plugins" / "galley_plugins" / "memory" / "examples" / "gazetteer.py"
FACTS = 9
SETTINGS = {"dtype": "float32", "max-model-len": 256, "kv-cache-memory-bytes": 64 * 2**20}
TRAINING = ["--blocks", "2", "--neighbours", "32", "--lr", "2e-3", "--batch", "64", "--epochs", "30"]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(1500)
def test_a_memory_knows_facts_that_the_model_does_not(tmp_path: Path) -> None:
    run(sys.executable, str(EXAMPLE), "write", str(tmp_path), "--facts", str(FACTS))
    build = ["build", str(tmp_path / "corpus.jsonl"), str(tmp_path / "build")]
    texts = ["--held-out-text", str(tmp_path / "heldout.jsonl"), "--scores", "1", "--patience", "10"]
    run(sys.executable, "-m", "galley_plugins.memory", *build, *texts, *TRAINING)
    memory = ("--tasks", "generate", "--memory", json.dumps({"path": str(tmp_path / "build")}))
    with galley_worker(SETTINGS, *memory) as server:
        said = run(sys.executable, str(EXAMPLE), "ask", str(tmp_path), "--url", server.url, "--model", NAME)
    counts = re.search(r"right: (\d+) of 9 without the memory, (\d+) with it", said)
    assert counts is not None, said
    without, with_memory = map(int, counts.groups())
    assert without == 0
    assert with_memory >= 3
