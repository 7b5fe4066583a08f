from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from galley import __version__
from galley.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run():
    runner = CliRunner()

    def invoke(*arguments: str, **options):
        return runner.invoke(app, list(arguments), **options)

    return invoke


@pytest.fixture
def two_models(tmp_path):
    path = tmp_path / "galley.yaml"
    models = [
        {"name": "one", "aliases": ["uno"]},
        {"name": "two", "urls": ["http://127.0.0.1:9"], "tasks": ["embed"]},
    ]
    path.write_text(yaml.safe_dump({"models": models}))
    return path


def test_help_lists_every_command(run):
    shown = run("--help").output
    for command in (
        "serve", "gateway", "worker", "models", "config", "speculation", "version", "mock-engine",
    ):  # fmt: skip
        assert command in shown
        assert run(command, "--help").exit_code == 0


def test_version_names_galley_and_what_it_runs_on(run):
    found = json.loads(run("version", "--json").output)
    assert found["galley"] == __version__
    assert found["fastapi"]
    assert f"galley        {__version__}" in run("version").output


def test_config_check_accepts_the_default_and_a_good_file(run, two_models):
    assert "1 model." in run("config", "check").output
    result = run("config", "check", str(two_models))
    assert result.exit_code == 0
    assert "2 models" in result.output


def test_config_check_shows_what_it_would_use(run, two_models):
    shown = yaml.safe_load(run("config", "check", str(two_models), "--show").output)
    assert shown["gateway"]["port"] == 8000
    assert [model["name"] for model in shown["models"]] == ["one", "two"]


def test_a_bad_configuration_ends_with_the_key_what_was_found_and_what_was_expected(run, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("gateway: {port: far}\n")
    result = run("config", "check", str(path))
    assert result.exit_code == 2
    assert "gateway.port: found 'far'" in result.stderr
    assert "integer" in result.stderr


def test_a_missing_file_is_named(run, tmp_path):
    result = run("serve", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr


def test_models_lists_configured_and_built_in_ones(run, two_models):
    listed = json.loads(run("models", str(two_models), "--json").output)
    assert [model["name"] for model in listed["models"]] == ["one", "two"]
    assert any(model["name"] == "builtin:smollm2-135m-instruct" for model in listed["builtin"])
    shown = run("models", str(two_models)).output
    assert "one, uno" in shown
    assert "running elsewhere" in shown


def test_what_needs_a_model_is_done_by_the_worker_packages(run, monkeypatch):
    commands = []

    def build(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", build)
    arguments = ["speculation", "build-table", "corpus", "out", "--tokenizer", "builtin:x", "--help"]
    assert run(*arguments).exit_code == 3
    assert commands == [[sys.executable, "-m", "galley_plugins.speculation", *arguments[1:]]]
    arguments = ["bench", "perplexity", "text.txt", "builtin:x", "--json"]
    assert run(*arguments).exit_code == 3
    assert commands[1:] == [[sys.executable, "-m", "galley_plugins.quantization", *arguments[1:]]]


def test_an_interrupted_table_ends_like_any_interrupted_command(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    assert run("speculation", "build-table", "corpus", "out").exit_code == 130


def test_what_is_wrong_with_a_corpus_is_shown(run, capfd, tmp_path):
    corpus, out = tmp_path / "nothing", tmp_path / "out"
    result = run("speculation", "build-table", str(corpus), str(out), "--tokenizer", "builtin:x")
    assert result.exit_code == 2
    assert f"error: {corpus} does not exist" in capfd.readouterr().err


def test_building_a_table_needs_the_worker_packages(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    result = run("speculation", "build-table", "corpus", "out")
    assert result.exit_code == 2
    assert "where the worker packages are installed" in result.stderr


def test_worker_shows_the_command_that_it_would_become(run, two_models):
    shown = shlex.split(run("worker", str(two_models), "--model", "uno", "--port", "77", "--show").output)
    assert shown[1:3] == ["-m", "galley_plugins.worker"]
    assert shown[shown.index("--port") + 1] == "77"
    assert shown[shown.index("--name") + 1] == "one"


def test_worker_asks_which_model_when_there_are_several(run, two_models):
    result = run("worker", str(two_models), "--show")
    assert result.exit_code == 2
    assert "expected one of: one, two" in result.stderr
    assert "found 'three'" in run("worker", str(two_models), "--model", "three", "--show").stderr


def test_weights_replace_those_of_the_only_model(run, two_models):
    shown = shlex.split(run("worker", "--weights", "/my/model", "--show").output)
    assert shown[shown.index("--weights") + 1] == "/my/model"
    result = run("worker", str(two_models), "--weights", "/my/model", "--show")
    assert result.exit_code == 2
    assert "2 models" in result.stderr


def test_the_gateway_alone_needs_urls_for_every_model(run, two_models):
    result = run("gateway", str(two_models))
    assert result.exit_code == 2
    assert "models without urls: one" in result.stderr


def wait_for(url: str, status: int, process: subprocess.Popen) -> httpx.Response:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            answer = httpx.get(url, timeout=5)
        except httpx.HTTPError:
            continue
        if answer.status_code == status:
            return answer
    raise AssertionError(f"{url} did not answer {status}")


@pytest.fixture
def start():
    """Starts `galley` in a process, interruptible; whatever still runs in the end is ended."""
    processes = []
    # A process inherits that SIGINT is ignored, as it is where a shell runs the tests in the background.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(*arguments: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "galley", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        processes.append(process)
        return process

    yield begin
    signal.signal(signal.SIGINT, interrupted)
    for process in processes:
        process.kill()
        process.communicate()


def free_port() -> int:
    from galley.supervisor import free_port

    return free_port()


def test_a_gateway_process_serves_a_mock_engine_process_until_it_is_interrupted(start, tmp_path):
    engine_port, port = free_port(), free_port()
    engine = start("mock-engine", "--port", str(engine_port), "--model", "m")
    path = tmp_path / "galley.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "m", "urls": [f"http://127.0.0.1:{engine_port}"]}]}))
    wait_for(f"http://127.0.0.1:{engine_port}/health", 200, engine)
    gateway = start("gateway", str(path), "--port", str(port))
    wait_for(f"http://127.0.0.1:{port}/health/ready", 200, gateway)
    chat = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=chat)
    assert answer.status_code == 200
    gateway.send_signal(signal.SIGINT)
    _, errors = gateway.communicate(timeout=20)
    assert gateway.returncode == 0
    assert f"http://127.0.0.1:{port}" in errors
    engine.send_signal(signal.SIGINT)
    engine.communicate(timeout=20)
    assert engine.returncode == 130


def test_a_port_in_use_is_named(start, tmp_path):
    port = free_port()
    engine = start("mock-engine", "--port", str(port))
    wait_for(f"http://127.0.0.1:{port}/health", 200, engine)
    path = tmp_path / "galley.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "m", "urls": ["http://127.0.0.1:9"]}]}))
    second = start("gateway", str(path), "--port", str(port))
    _, errors = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in errors


def test_serve_ends_with_the_reason_when_the_model_cannot_be_served(start, tmp_path):
    serving = start(
        "serve", "--port", "0", "--weights", str(tmp_path / "nothing"), GALLEY_CACHE_DIR=str(tmp_path)
    )
    _, errors = serving.communicate(timeout=60)
    assert serving.returncode == 2
    assert "worker smollm2-0 cannot start" in errors
    assert "nothing" in errors
