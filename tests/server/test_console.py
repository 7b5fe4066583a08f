from __future__ import annotations

import asyncio
import io
import json
import shlex

import pytest
from rich.console import Console

from galley.config import Config, ModelConfig
from galley.console import StartupView, example_request
from galley.supervisor import Stage
from galley.workers import Worker, WorkerPool

pytestmark = pytest.mark.anyio


def view_on(terminal: bool):
    text = io.StringIO()
    config = Config(models=(ModelConfig(name="m"),))
    pool = WorkerPool(config.models)
    worker = pool.add(Worker("m-0", "m"))
    console = Console(file=text, force_terminal=terminal, width=60)
    return StartupView(console, config, pool), worker, text


async def follow_until_ready(view, worker) -> None:
    following = asyncio.create_task(view.follow("http://127.0.0.1:8000"))
    view.on_stage(worker, Stage("plugins loaded", {}))
    for percent in (1, 50):
        view.on_stage(worker, Stage("unpacking model", {"percent": percent}))
    await asyncio.sleep(0.3)
    worker.mark_ready("http://127.0.0.1:1")
    await following


async def test_each_stage_is_one_line_where_there_is_no_terminal():
    view, worker, text = view_on(terminal=False)
    await follow_until_ready(view, worker)
    lines = text.getvalue().splitlines()
    assert lines.count("m-0: unpacking model") == 1
    assert not any("plugins loaded" in line for line in lines)


async def test_a_terminal_shows_the_percentage():
    view, worker, text = view_on(terminal=True)
    await follow_until_ready(view, worker)
    assert "50 %" in text.getvalue()


async def test_the_command_to_try_stands_on_one_line_and_is_one_that_a_shell_can_run():
    view, worker, text = view_on(terminal=False)
    await follow_until_ready(view, worker)
    (line,) = [line for line in text.getvalue().splitlines() if line.startswith("curl ")]
    words = shlex.split(line)
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[words.index("-d") + 1])["model"] == "m"


def test_an_embedding_model_is_shown_an_embedding_request():
    model = ModelConfig(name="e", tasks=frozenset({"embed"}))
    words = shlex.split(example_request(model, "http://h:1"))
    assert words[1] == "http://h:1/v1/embeddings"
    assert json.loads(words[-1]) == {"model": "e", "input": "What is the capital of France?"}
